"""The replica of the swarm's state, and checkpoints of it: safetensors and JSON, written whole or not at all.

A checkpoint is a folder:

    checkpoint.json         format, round, fingerprint, digest and size of every other file
    model.safetensors       the parameters, by their names in the model
    optimizer.safetensors   the optimizer's tensors, as <parameter>.<name>
    run.yaml tokenizer.json what is needed besides to resume the run, or to export a model, from this folder alone
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kantha.digests import FileDigest, check_file, digest_of
from kantha.errors import DigestError, NewerRunError, RunDirectoryError, StorageError
from kantha.model import build_model, build_optimizer, parameter_groups, set_steps
from kantha.spec import RunSpec, Schedule, ScheduleState

FORMAT = 2  # 1 had no place in the schedule
MANIFEST = "checkpoint.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SPEC_FILE = "run.yaml"
TOKENIZER_FILE = "tokenizer.json"
CHECKPOINT_FILES = frozenset({MODEL_FILE, OPTIMIZER_FILE, SPEC_FILE, TOKENIZER_FILE})  # all that a manifest may name
_KEPT = 3  # newest checkpoints that are not deleted
_BEGINNING = ScheduleState()
_MOMENTS = ("exp_avg", "exp_avg_sq")  # the rest is made anew, or follows from the round


class Manifest(BaseModel):
    """checkpoint.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    round: int = Field(ge=0)
    lineage: str = Field("", description="Digest of all results that led to this round; replicas of one run share it.")
    schedule: ScheduleState
    fingerprint: str
    files: dict[str, FileDigest]

    @field_validator("files")
    @classmethod
    def _known_files(cls, files: dict[str, FileDigest]) -> dict[str, FileDigest]:
        # the names become paths, and a manifest may come from a stranger
        if unknown := files.keys() - CHECKPOINT_FILES:
            raise ValueError(f"{min(unknown)!r} is no file of a checkpoint")
        if missing := {MODEL_FILE, OPTIMIZER_FILE} - files.keys():
            raise ValueError(f"{min(missing)} is missing")
        return files


class Replica:
    """The swarm's state as one peer holds it: model, optimizer and schedule, on the CPU in fp32."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.model = build_model(spec)
        self.optimizer = build_optimizer(parameter_groups(self.model, spec), spec)
        self.schedule = Schedule(spec)
        self.round = 0
        self.lineage = ""
        self.schedule_state = _BEGINNING

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.model.parameters())

    def is_finite(self) -> bool:
        """Whether every weight is a number; a model that diverged must not replace one that did not."""
        return all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{moment}": self.optimizer.state[parameter][moment]
            for name, parameter in self.model.named_parameters()
            for moment in _MOMENTS
        }

    def save(
        self,
        folder: Path,
        round_number: int,
        lineage: str = "",
        extra_files: Mapping[str, bytes] | None = None,
        *,
        schedule: ScheduleState = _BEGINNING,
    ) -> None:
        """Write a checkpoint to `folder`, which appears only when it is whole. Raises `StorageError`."""
        partial, replaced = (folder.with_name(f".{what}-{folder.name}") for what in ("partial", "replaced"))
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
                lineage=lineage,
                schedule=schedule,
                fingerprint=self.spec.fingerprint,
                files={file.name: digest_of(file) for file in sorted(partial.iterdir())},
            )
            (partial / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
            for file in (*partial.iterdir(), partial):
                _flush(file)
            if folder.exists():  # the same round again: the old one goes only when the new one is in its place
                shutil.rmtree(replaced, ignore_errors=True)
                folder.rename(replaced)
            partial.rename(folder)
            _flush(folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            if replaced.exists() and not folder.exists():
                with contextlib.suppress(OSError):
                    replaced.rename(folder)
            shutil.rmtree(partial, ignore_errors=True)
            raise StorageError(
                f"{folder}: the checkpoint of round {round_number} could not be written ({error}); "
                "earlier checkpoints are untouched: free some space on that disk"
            ) from None

    def load(self, folder: Path) -> None:
        """Take over a checkpoint. Raises `DigestError` where a file is not what its manifest says, `NewerRunError`
        where a newer Kantha wrote it, and `RunDirectoryError` where it is another run's."""
        manifest = read_manifest(folder)
        if manifest.fingerprint != self.spec.fingerprint:
            raise RunDirectoryError(f"{folder}: this checkpoint belongs to another run spec")
        for name, digest in manifest.files.items():
            check_file(folder / name, digest)
        with torch.no_grad():
            _copy_into(dict(self.model.named_parameters()), folder / MODEL_FILE)
            _copy_into(self._optimizer_tensors(), folder / OPTIMIZER_FILE)
        set_steps(self.optimizer, manifest.round)
        self.round, self.lineage, self.schedule_state = manifest.round, manifest.lineage, manifest.schedule


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Copy the parameters of a checkpoint into the model, and nothing else of it.

    Raises `DigestError` where a file is not what its manifest says, or is not there.
    """
    path = folder / MODEL_FILE
    check_file(path, read_manifest(folder).files[MODEL_FILE])
    with torch.no_grad():
        _copy_into(dict(model.named_parameters()), path)


def read_manifest(folder: Path) -> Manifest:
    """Raises `DigestError` where there is none that can be read, `NewerRunError` where its format is a newer one, and
    `RunDirectoryError` where it is an older one."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
            raise NewerRunError(
                f"{folder}: written by a newer Kantha (format {content['format']}, this one reads {FORMAT}); "
                "update with `pip install --upgrade kantha`"
            )
        if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] < FORMAT:
            raise RunDirectoryError(
                f"{folder}: written by an older Kantha (format {content['format']}, this one reads {FORMAT}); "
                "`kantha export` its model with that version"
            )
        return Manifest.model_validate(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise DigestError(f"{folder}: not a whole checkpoint ({reason}); delete that folder") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("round-*") if (path / MANIFEST).is_file()), reverse=True)


def checkpoint_folder(folder: Path, round_number: int) -> Path:
    return folder / f"round-{round_number:09d}"


def drop_old_checkpoints(folder: Path) -> None:
    """All but the newest, and the newest from before annealing, from which a run can go on. Raises `StorageError`."""
    checkpoints = list_checkpoints(folder)
    kept = {*checkpoints[:_KEPT], *islice(filter(_is_from_before_annealing, checkpoints), 1)}
    try:
        for path in set(checkpoints) - kept:
            shutil.rmtree(path)
    except OSError as error:
        raise StorageError(f"{path}: an old checkpoint cannot be deleted ({error.strerror}); delete it") from None


def _is_from_before_annealing(checkpoint: Path) -> bool:
    try:
        return read_manifest(checkpoint).schedule.annealed is None
    except DigestError:
        return False


def _copy_into(targets: dict[str, Any], path: Path) -> None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DigestError(f"{path}: not a safetensors file ({error}); get it again") from None
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
