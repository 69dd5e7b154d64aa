"""The compact state that a newcomer loads: 6 bytes a value instead of 12.

Weights are fp16: half of a unit in the last place is 2⁻¹², which a replica carries with it and the check for drift
allows. Moments are fp16 too, divided by the largest of each 256 values, the second ones as their roots. In 8 bits the
first moments would be enough to part replicas: at the demo's learning rate of 5e-2 a newcomer was 1.6e-3 away after 50
rounds (benchmarks/equivalence.py).

A snapshot is a folder with two safetensors files, `weights` and `moments`, and a manifest with the digest of each piece
of them, so that pieces can be had from several peers at once, and one that was interrupted goes on where it was.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kantha.errors import DigestError
from kantha.spec import ScheduleState

PIECE = 2**20  # bytes
FILES = ("weights", "moments")
MANIFEST = "manifest.json"
_MOST_PIECES = 20_000
_BLOCK = 256  # values of a moment that share a scale


class SnapshotManifest(BaseModel):
    """What a snapshot is, and how to know that a piece of it is good."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    round: int = Field(ge=0)
    lineage: str = Field(max_length=64)
    schedule: ScheduleState
    groups: dict[int, str]  # the group whose result each of the last rounds was
    sizes: dict[str, int]
    pieces: dict[str, list[str]] = Field(description="SHA-256 of every piece, by file.")

    def check(self) -> None:
        """Raises `DigestError` where it cannot be a snapshot's."""
        good = (
            self.sizes.keys() == self.pieces.keys() == set(FILES)
            and all(len(self.pieces[name]) == -(-self.sizes[name] // PIECE) for name in FILES)
            and sum(map(len, self.pieces.values())) <= _MOST_PIECES
        )
        if not good:
            raise DigestError("a peer offers a damaged snapshot; another is asked")


def write_snapshot(
    folder: Path,
    round_number: int,
    lineage: str,
    schedule: ScheduleState,
    groups: Mapping[int, str],
    weights: Sequence[torch.Tensor],
    moments: Sequence[Mapping[str, torch.Tensor]],
) -> SnapshotManifest:
    """Write a replica's state to `folder`, which appears when it is whole.

    :param moments: for each of `weights`, the optimizer's tensors of its shape by name; `…_sq` are not negative
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    limit = torch.finfo(torch.float16).max
    save_file(
        {str(i): weight.detach().clamp(-limit, limit).to(torch.float16) for i, weight in enumerate(weights)},
        partial / "weights",
    )
    packed = {f"{i}.{name}": _pack(name, moment) for i, named in enumerate(moments) for name, moment in named.items()}
    save_file(packed, partial / "moments")
    contents = {name: (partial / name).read_bytes() for name in FILES}
    manifest = SnapshotManifest(
        round=round_number,
        lineage=lineage,
        schedule=schedule,
        groups=dict(groups),
        sizes={name: len(content) for name, content in contents.items()},
        pieces={
            name: [hashlib.sha256(content[at : at + PIECE]).hexdigest() for at in range(0, len(content), PIECE)]
            for name, content in contents.items()
        },
    )
    (partial / MANIFEST).write_text(manifest.model_dump_json())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return manifest


def read_manifest(content: bytes | str) -> SnapshotManifest:
    """Raises `DigestError` where it is none."""
    try:
        manifest = SnapshotManifest.model_validate_json(content)
    except ValidationError as error:
        raise DigestError(f"a peer offers a damaged snapshot ({error.errors()[0]['msg']}); another is asked") from None
    manifest.check()
    return manifest


def read_piece(folder: Path, name: str, index: int) -> bytes:
    with (folder / name).open("rb") as file:
        file.seek(index * PIECE)
        return file.read(PIECE)


def load_weights(path: Path, weights: Sequence[torch.Tensor]) -> None:
    """Copy the weights of a snapshot into these. Raises `DigestError` where they are not of these shapes."""
    tensors = _load(path)
    good = len(tensors) == len(weights) and all(
        (tensor := tensors.get(str(i))) is not None
        and tensor.shape == weight.shape
        and tensor.dtype == torch.float16
        and bool(tensor.isfinite().all())
        for i, weight in enumerate(weights)
    )
    if not good:
        raise DigestError("a peer sent the weights of another model; another is asked")
    with torch.no_grad():
        for i, weight in enumerate(weights):
            weight.copy_(tensors[str(i)])


def load_moments(path: Path, moments: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Copy the optimizer's tensors of a snapshot into these. Raises `DigestError`."""
    tensors = _load(path)
    if tensors.keys() != {f"{i}.{name}" for i, named in enumerate(moments) for name in named}:
        raise DigestError("a peer sent the state of another optimizer; another is asked")
    with torch.no_grad():
        for i, named in enumerate(moments):
            for name, moment in named.items():
                moment.copy_(_unpack(name, tensors[f"{i}.{name}"], moment.shape))


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DigestError(f"a peer sent a damaged snapshot ({error}); another is asked") from None


def _pack(name: str, moment: torch.Tensor) -> torch.Tensor:
    """fp16 after division by the largest of each 256: fp32 scales, then the values, as bytes."""
    flat = moment.detach().reshape(-1)
    flat = flat.clamp_min(0).sqrt() if name.endswith("_sq") else flat
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    values = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.float16)
    return torch.cat([scales.view(-1).view(torch.uint8), values.view(-1)[: flat.numel()].view(torch.uint8)])


def _unpack(name: str, packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    count = -(-shape.numel() // _BLOCK)
    if packed.dtype != torch.uint8 or packed.numel() != 4 * count + 2 * shape.numel():
        raise DigestError("a peer sent the state of another optimizer; another is asked")
    scales = packed[: 4 * count].clone().view(torch.float32).unsqueeze(1)
    values = packed[4 * count :].clone().view(torch.float16).float()
    blocks = torch.nn.functional.pad(values, (0, -shape.numel() % _BLOCK)).view(-1, _BLOCK) * scales
    moment = blocks.view(-1)[: shape.numel()].reshape(shape)
    if not bool(moment.isfinite().all()):
        raise DigestError("a peer sent a state that is not finite; another is asked")
    return moment.square() if name.endswith("_sq") else moment
