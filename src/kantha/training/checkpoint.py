"""The replica of the swarm's state, and checkpoints of it: safetensors and JSON, written whole or not at all.

A checkpoint is a folder:

    checkpoint.json         format, round, fingerprint, digest and size of every other file
    model.safetensors       the parameters, by their names in the model
    optimizer.safetensors   the optimizer's tensors, as <parameter>.<name>
    run.yaml tokenizer.json what is needed besides to resume the run, or to export a model, from this folder alone
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kantha.digests import FileDigest, check_file, digest_of
from kantha.errors import DigestError, RunDirectoryError, StorageError
from kantha.model import build_model, build_optimizer, build_schedule, parameter_groups
from kantha.spec import RunSpec

FORMAT = 1
MANIFEST = "checkpoint.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_KEPT = 3  # newest checkpoints that are not deleted
_MOMENTS = ("exp_avg", "exp_avg_sq")  # the rest of LAMB's state is diagnostics, made anew in every step


class Manifest(BaseModel):
    """checkpoint.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    round: int = Field(ge=0)
    fingerprint: str
    files: dict[str, FileDigest]


class Replica:
    """The swarm's state as one peer holds it: model, optimizer and schedule, on the CPU in fp32."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.model = build_model(spec)
        self.optimizer = build_optimizer(parameter_groups(self.model, spec), spec)
        self.schedule = build_schedule(self.optimizer, spec)
        self.round = 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{moment}": self.optimizer.state[parameter][moment]
            for name, parameter in self.model.named_parameters()
            for moment in _MOMENTS
        }

    def save(self, folder: Path, round_number: int, extra_files: Mapping[str, bytes] | None = None) -> None:
        """Write a checkpoint to `folder`, which appears only when it is whole. Raises `StorageError`."""
        partial = folder.with_name(f".partial-{folder.name}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({n: p.detach() for n, p in self.model.named_parameters()}, partial / MODEL_FILE)
            save_file(self._optimizer_tensors(), partial / OPTIMIZER_FILE)
            for name, content in (extra_files or {}).items():
                (partial / name).write_bytes(content)
            manifest = Manifest(
                format=FORMAT,
                round=round_number,
                fingerprint=self.spec.fingerprint,
                files={file.name: digest_of(file) for file in sorted(partial.iterdir())},
            )
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            for file in (*partial.iterdir(), partial):
                _flush(file)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            _flush(folder.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise StorageError(
                f"{folder}: the checkpoint of round {round_number} could not be written ({error}); "
                "earlier checkpoints are untouched: free some space on that disk"
            ) from None

    def load(self, folder: Path) -> None:
        """Take over a checkpoint. Raises `DigestError` where a file is not what its manifest says."""
        manifest = read_manifest(folder)
        if manifest.fingerprint != self.spec.fingerprint:
            raise RunDirectoryError(f"{folder}: this checkpoint belongs to another run spec")
        for name, digest in manifest.files.items():
            check_file(folder / name, digest)
        with torch.no_grad():
            _copy_into(dict(self.model.named_parameters()), folder / MODEL_FILE)
            _copy_into(self._optimizer_tensors(), folder / OPTIMIZER_FILE)
        for group in self.optimizer.param_groups:
            group["step"] = manifest.round
        self.round = manifest.round


def read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DigestError(f"{folder}: not a whole checkpoint ({reason}); delete that folder") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("round-*") if (path / MANIFEST).is_file()), reverse=True)


def checkpoint_folder(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:09d}"


def drop_old_checkpoints(folder: Path) -> None:
    for path in list_checkpoints(folder)[_KEPT:]:
        shutil.rmtree(path)


def _copy_into(targets: dict[str, Any], path: Path) -> None:
    tensors = load_file(path)
    if tensors.keys() != targets.keys() or any(tensors[n].shape != t.shape for n, t in targets.items()):
        raise DigestError(f"{path}: holds other tensors than this run's model; get it again")
    for name, target in targets.items():
        target.copy_(tensors[name])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
