import json
from pathlib import Path

import pytest
import torch

from kantha.errors import DigestError
from kantha.spec import ScheduleState
from kantha.swarm.snapshots import PIECE, load_moments, load_weights, read_manifest, read_piece, write_snapshot


def state(seed: int = 0, values: int = 700_000) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    chance = torch.Generator().manual_seed(seed)
    weights = [torch.randn(values // 100, 100, generator=chance), torch.randn(5, generator=chance)]
    moments = [
        {
            "exp_avg": torch.randn(w.shape, generator=chance) * 1e-7,
            "exp_avg_sq": torch.rand(w.shape, generator=chance) * 1e-13,
        }
        for w in weights
    ]
    return weights, moments


def test_a_snapshot_holds_the_state_nearly(tmp_path: Path) -> None:
    weights, moments = state()
    manifest = write_snapshot(tmp_path / "s", 7, "x", ScheduleState(samples=70), {7: "g"}, weights, moments)
    assert read_manifest(manifest.model_dump_json()) == manifest
    assert (manifest.round, manifest.lineage, manifest.groups) == (7, "x", {7: "g"})
    assert manifest.schedule == ScheduleState(samples=70)
    got, got_moments = state(seed=1)
    load_weights(tmp_path / "s" / "weights", got)
    load_moments(tmp_path / "s" / "moments", got_moments)
    pairs = list(zip(got, weights, strict=True))
    pairs += [(mine[n], theirs[n]) for mine, theirs in zip(got_moments, moments, strict=True) for n in theirs]
    for mine, theirs in pairs:
        assert float((mine - theirs).norm() / theirs.norm()) < 5e-4


def test_it_takes_six_bytes_a_value(tmp_path: Path) -> None:
    weights, moments = state()
    manifest = write_snapshot(tmp_path / "s", 1, "", ScheduleState(), {}, weights, moments)
    assert sum(manifest.sizes.values()) < 6.1 * sum(w.numel() for w in weights)


def test_its_pieces_make_up_its_files(tmp_path: Path) -> None:
    manifest = write_snapshot(tmp_path / "s", 1, "", ScheduleState(), {}, *state())
    for name, digests in manifest.pieces.items():
        pieces = [read_piece(tmp_path / "s", name, index) for index in range(len(digests))]
        assert b"".join(pieces) == (tmp_path / "s" / name).read_bytes()
        assert all(len(piece) == PIECE for piece in pieces[:-1])


def test_a_state_of_other_shapes_is_refused(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "s", 1, "", ScheduleState(), {}, *state())
    weights, moments = state(values=600_000)
    with pytest.raises(DigestError, match="another model"):
        load_weights(tmp_path / "s" / "weights", weights)
    with pytest.raises(DigestError, match="another optimizer"):
        load_moments(tmp_path / "s" / "moments", moments)
    (tmp_path / "s" / "weights").write_bytes(b"no safetensors")
    with pytest.raises(DigestError, match="damaged"):
        load_weights(tmp_path / "s" / "weights", weights)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights, moments = state()
    weights[1][2] = float("nan")
    write_snapshot(tmp_path / "s", 1, "", ScheduleState(), {}, weights, moments)
    with pytest.raises(DigestError):
        load_weights(tmp_path / "s" / "weights", state()[0])


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"lineage": "x" * 65},
        {"sizes": {"weights": 1}},
        {"sizes": {"weights": 10**15, "moments": 1}},
        {"pieces": {"weights": [], "moments": []}},
        {"other": 1},
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    manifest = write_snapshot(tmp_path / "s", 1, "", ScheduleState(), {}, *state())
    with pytest.raises(DigestError):
        read_manifest(json.dumps({**manifest.model_dump(), **change}))
    with pytest.raises(DigestError):
        read_manifest(b"{")
