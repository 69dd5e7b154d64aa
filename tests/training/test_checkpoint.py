import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kantha.digests import digest_of
from kantha.errors import DigestError, NewerRunError, RunDirectoryError, StorageError
from kantha.spec import RunSpec, ScheduleState
from kantha.training import Manifest, Replica
from kantha.training.checkpoint import (
    FORMAT,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    checkpoint_folder,
    drop_old_checkpoints,
    list_checkpoints,
    read_manifest,
)

LINEAGE = "0123456789abcdef"
EXTRA = {"run.yaml": b"name: x\n", "tokenizer.json": b"{}"}


def step(replica: Replica, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for parameter in replica.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=chance)
    replica.optimizer.step()


def tensors(replica: Replica) -> list[torch.Tensor]:
    state = replica.optimizer.state
    moments = [state[p][name] for p in replica.parameters for name in ("exp_avg", "exp_avg_sq")]
    return [*(p.detach() for p in replica.parameters), *moments]


def same(first: Replica, second: Replica) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


@pytest.fixture
def replica(tiny_spec: RunSpec) -> Replica:
    """A replica that has trained for two rounds."""
    replica = Replica(tiny_spec)
    step(replica, 1)
    step(replica, 2)
    return replica


@pytest.fixture
def saved(replica: Replica, tmp_path: Path) -> Path:
    folder = checkpoint_folder(tmp_path / "checkpoints", 2)
    replica.save(folder, 2, LINEAGE, EXTRA)
    return folder


def change_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> None:
    manifest = change(read_manifest(folder))
    (folder / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")


def test_a_checkpoint_gives_back_every_bit(replica: Replica, saved: Path, tiny_spec: RunSpec) -> None:
    other = Replica(tiny_spec.model_copy())
    assert not same(replica, other)
    other.load(saved)
    assert same(replica, other)
    assert (other.round, other.lineage) == (2, LINEAGE)
    assert all(moment.any() for moment in tensors(other)[len(other.parameters) :])
    step(replica, 3)
    step(other, 3)
    assert same(replica, other)  # nothing that the next step needs was left out


def test_a_checkpoint_has_what_it_takes_to_go_on_from_it_alone(saved: Path, tiny_spec: RunSpec) -> None:
    manifest = read_manifest(saved)
    assert (manifest.round, manifest.lineage, manifest.fingerprint) == (2, LINEAGE, tiny_spec.fingerprint)
    assert manifest.files.keys() == {MODEL_FILE, OPTIMIZER_FILE, *EXTRA}
    assert {path.name for path in saved.iterdir()} == {MANIFEST, *manifest.files}
    assert all(digest.matches(saved / name) for name, digest in manifest.files.items())
    assert {name: (saved / name).read_bytes() for name in EXTRA} == EXTRA


def cut(content: bytes) -> bytes:
    return content[:-1]


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE, *EXTRA])
def test_a_damaged_file_is_told_by_its_path(
    saved: Path, tiny_spec: RunSpec, name: str, damage: Callable[[bytes], bytes]
) -> None:
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    fresh = Replica(tiny_spec)
    with pytest.raises(DigestError) as caught:
        fresh.load(saved)
    assert str(caught.value).startswith(f"{saved / name}: ")
    assert caught.value.exit_code == 23
    assert same(fresh, Replica(tiny_spec))  # nothing of it was taken over


def test_a_missing_file_is_told_by_its_path(saved: Path, tiny_spec: RunSpec) -> None:
    (saved / OPTIMIZER_FILE).unlink()
    with pytest.raises(DigestError, match=OPTIMIZER_FILE):
        Replica(tiny_spec).load(saved)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lambda content: b"", lambda content: b"[]"])
def test_a_damaged_manifest_is_told_by_its_folder(
    saved: Path, tiny_spec: RunSpec, damage: Callable[[bytes], bytes]
) -> None:
    (saved / MANIFEST).write_bytes(damage((saved / MANIFEST).read_bytes()))
    with pytest.raises((DigestError, RunDirectoryError)) as caught:
        Replica(tiny_spec).load(saved)
    assert str(saved) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_of_another_run_is_refused(saved: Path, tiny_spec: RunSpec) -> None:
    with pytest.raises(RunDirectoryError, match="another run spec"):
        Replica(tiny_spec.model_copy(update={"seed": 8})).load(saved)


def test_a_checkpoint_of_a_newer_format_is_refused(saved: Path, tiny_spec: RunSpec) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format": FORMAT + 1, "invented": "later"}))
    with pytest.raises(NewerRunError, match=r"newer Kantha .*pip install --upgrade kantha"):
        Replica(tiny_spec).load(saved)


def test_a_checkpoint_of_an_older_format_is_told(saved: Path, tiny_spec: RunSpec) -> None:
    manifest = json.loads((saved / MANIFEST).read_text())
    del manifest["schedule"]
    (saved / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(RunDirectoryError, match=r"older Kantha .*kantha export"):
        Replica(tiny_spec).load(saved)


@pytest.mark.parametrize("name", ["../escaped", "/etc/passwd", "extra.bin"])
def test_a_manifest_names_no_other_files(saved: Path, tiny_spec: RunSpec, name: str) -> None:
    digest = digest_of(saved / MODEL_FILE)
    change_manifest(saved, lambda m: m.model_copy(update={"files": {**m.files, name: digest}}))
    with pytest.raises(DigestError, match=f"{name}' is no file of a checkpoint"):
        Replica(tiny_spec).load(saved)


def swap_model(saved: Path, content: Callable[[Path], object]) -> None:
    """Another model file, and a manifest that vouches for it."""
    content(saved / MODEL_FILE)
    digest = digest_of(saved / MODEL_FILE)
    change_manifest(saved, lambda m: m.model_copy(update={"files": {**m.files, MODEL_FILE: digest}}))


def narrow(path: Path) -> None:
    save_file({name: tensor[..., :1].contiguous() for name, tensor in load_file(path).items()}, path)


def without_bias(path: Path) -> None:
    save_file({name: tensor for name, tensor in load_file(path).items() if name != "predictions.bias"}, path)


@pytest.mark.parametrize("content", [narrow, without_bias])
def test_tensors_of_another_model_are_refused(saved: Path, tiny_spec: RunSpec, content: Callable[[Path], None]) -> None:
    swap_model(saved, content)
    fresh = Replica(tiny_spec)
    with pytest.raises(DigestError, match=MODEL_FILE):
        fresh.load(saved)
    assert same(fresh, Replica(tiny_spec))


def test_a_model_file_of_no_known_kind_is_refused(saved: Path, tiny_spec: RunSpec) -> None:
    swap_model(saved, lambda path: path.write_bytes(b"no tensors in here"))
    with pytest.raises(DigestError, match=MODEL_FILE):
        Replica(tiny_spec).load(saved)


def test_a_manifest_without_the_model_is_refused(saved: Path, tiny_spec: RunSpec) -> None:
    change_manifest(saved, lambda manifest: manifest.model_copy(update={"files": {}}))
    (saved / MODEL_FILE).unlink()
    with pytest.raises(DigestError, match=MODEL_FILE):
        Replica(tiny_spec).load(saved)


# ---- whole or not at all


def test_a_checkpoint_is_invisible_until_every_file_is_on_the_disk(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_folder(tmp_path, 3)
    flushed, flush = [], os.fsync

    def watch(descriptor: int) -> None:
        visible = bool(list_checkpoints(tmp_path))
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, visible))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    replica.save(folder, 3, LINEAGE, EXTRA)
    hidden = {name for name, visible in flushed if not visible}
    assert {MANIFEST, MODEL_FILE, OPTIMIZER_FILE, *EXTRA} <= hidden
    assert list_checkpoints(tmp_path) == [folder]


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_only_the_earlier_is_there(saved: Path, earlier: list[torch.Tensor], spec: RunSpec) -> None:
    assert list(saved.parent.iterdir()) == [saved]
    fresh = Replica(spec)
    fresh.load(saved)
    assert all(torch.equal(a, b) for a, b in zip(tensors(fresh), earlier, strict=True))


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_disk_that_gets_full_leaves_the_earlier_checkpoint(
    replica: Replica, saved: Path, tiny_spec: RunSpec, share: float
) -> None:
    """It gets full within the model file, or within the optimizer's, which is about twice as large."""
    earlier = [tensor.clone() for tensor in tensors(replica)]
    step(replica, 3)
    with small_disk(int(share * (saved / MODEL_FILE).stat().st_size)), pytest.raises(StorageError) as caught:
        replica.save(checkpoint_folder(saved.parent, 3), 3, LINEAGE, EXTRA)
    assert caught.value.exit_code == 16
    assert "round 3" in str(caught.value)
    assert_only_the_earlier_is_there(saved, earlier, tiny_spec)


@pytest.mark.parametrize("flushes_before", [0, 3])
@pytest.mark.parametrize("round_number", [2, 3])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_earlier_checkpoint(
    replica: Replica,
    saved: Path,
    tiny_spec: RunSpec,
    monkeypatch: pytest.MonkeyPatch,
    flushes_before: int,
    round_number: int,
) -> None:
    earlier = [tensor.clone() for tensor in tensors(replica)]
    step(replica, 3)
    flush, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > flushes_before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        replica.save(checkpoint_folder(saved.parent, round_number), round_number, LINEAGE, EXTRA)
    assert_only_the_earlier_is_there(saved, earlier, tiny_spec)


def test_what_a_killed_program_left_behind_does_no_harm(replica: Replica, saved: Path, tiny_spec: RunSpec) -> None:
    partial = saved.parent / ".partial-round-000000003"
    partial.mkdir()
    (partial / MODEL_FILE).write_bytes(b"half of")
    (partial / "what.else").touch()
    (saved.parent / "round-000000004").mkdir()  # a folder without a manifest is no checkpoint either
    assert list_checkpoints(saved.parent) == [saved]
    replica.save(checkpoint_folder(saved.parent, 3), 3)
    newest = list_checkpoints(saved.parent)[0]
    assert {path.name for path in newest.iterdir()} == {MANIFEST, MODEL_FILE, OPTIMIZER_FILE}
    Replica(tiny_spec).load(newest)
    assert not partial.exists()


def test_saving_a_round_again_replaces_it(replica: Replica, saved: Path, tiny_spec: RunSpec) -> None:
    step(replica, 3)
    replica.save(saved, 2)
    other = Replica(tiny_spec)
    other.load(saved)
    assert same(replica, other)
    assert list(saved.parent.iterdir()) == [saved]


def test_a_round_that_cannot_be_replaced_stays(
    replica: Replica, saved: Path, tiny_spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = [tensor.clone() for tensor in tensors(replica)]
    step(replica, 3)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.startswith(".partial"):
            assert [p for p in saved.parent.glob("*round-000000002/*") if p.name == MODEL_FILE and p.parent != path]
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError):
        replica.save(saved, 2, LINEAGE, EXTRA)
    assert_only_the_earlier_is_there(saved, earlier, tiny_spec)


def test_an_old_checkpoint_that_cannot_be_deleted_is_told(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        replica.save(checkpoint_folder(tmp_path, number), number)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match="round-000000000"):
        drop_old_checkpoints(tmp_path)


def test_the_three_newest_are_kept(replica: Replica, tmp_path: Path) -> None:
    for number in (5, 80, 0, 1000, 20):
        replica.save(checkpoint_folder(tmp_path, number), number)
    drop_old_checkpoints(tmp_path)
    assert [read_manifest(folder).round for folder in list_checkpoints(tmp_path)] == [1000, 80, 20]
    assert len(list(tmp_path.iterdir())) == 3
    drop_old_checkpoints(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 3


def test_the_newest_from_before_annealing_is_kept(replica: Replica, tmp_path: Path) -> None:
    stable = ScheduleState(samples=640)
    for number, state in enumerate([stable, stable, *([stable.obey(1, 100)] * 5)], 1):
        replica.save(checkpoint_folder(tmp_path, number), number, schedule=state)
        drop_old_checkpoints(tmp_path)
    assert [read_manifest(folder).round for folder in list_checkpoints(tmp_path)] == [7, 6, 5, 2]


def test_the_place_in_the_schedule_is_loaded(replica: Replica, tmp_path: Path, tiny_spec: RunSpec) -> None:
    state = ScheduleState(samples=640).obey(3, 100).advance(20)
    replica.save(tmp_path / "c", 7, LINEAGE, schedule=state)
    other = Replica(tiny_spec)
    other.load(tmp_path / "c")
    assert other.schedule_state == state


def test_adamw_goes_on_where_it_was(tmp_path: Path, tiny_spec: RunSpec) -> None:
    """Its correction of the moments depends on how many steps were made."""
    optimizer = tiny_spec.optimizer.model_copy(update={"name": "adamw"})
    spec = tiny_spec.model_copy(update={"optimizer": optimizer})
    replica, other = Replica(spec), Replica(spec)
    for seed in range(3):
        step(replica, seed)
    replica.save(tmp_path / "c", 3)
    other.load(tmp_path / "c")
    for each in (replica, other):
        step(each, 2)
    assert same(replica, other)
