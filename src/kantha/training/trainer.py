"""Computes gradients of one batch after another on this machine's device."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from kantha.corpus import Batch
from kantha.model import build_model, pretraining_losses
from kantha.spec import RunSpec


@dataclass(frozen=True)
class Gradients:
    """What one batch gave: the mean gradient over `samples`, and the mean losses in nats."""

    tensors: list[torch.Tensor]  # on the trainer's device, in the order of the model's parameters
    samples: int
    mlm_loss: float
    sop_loss: float


def choose_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """A name for people, at most 60 characters: the GPU's, or the CPU's and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)[:60]
    return f"{platform.machine()} CPU, {psutil.cpu_count(logical=False) or psutil.cpu_count()} cores"


class Trainer:
    """The model on this machine's device.

    On a GPU it computes in bf16 where the device is built for it and in fp16 with loss scaling elsewhere (a T4); on a
    CPU in fp32. Parameters and gradients are fp32 everywhere.
    """

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self.device = device
        self._model = build_model(spec).to(device).train()
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._dtype: torch.dtype | None = None
        if device.type == "cuda":
            # is_bf16_supported() is also true where bf16 is emulated; Ampere (8.0) is the first that computes in it
            self._dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype is torch.float16)
        self._unscaler = torch.optim.SGD(self._parameters, lr=0.0)  # GradScaler works through an optimizer; never steps

    def load(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take over the parameters of the swarm's replica, given in the order of the model's parameters."""
        with torch.no_grad():
            for mine, theirs in zip(self._parameters, parameters, strict=True):
                mine.copy_(theirs, non_blocking=True)

    def compute(self, batch: Batch) -> Gradients | None:
        """Gradients of one batch, valid until the next call; None where they are not finite and must not be used."""
        batch = batch.to(self.device)
        self._unscaler.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            losses = pretraining_losses(self._model, batch)
        self._scaler.scale(losses.total).backward()
        self._scaler.unscale_(self._unscaler)
        tensors = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        finite = bool(torch.stack([t.isfinite().all() for t in tensors]).all())
        if self._scaler.is_enabled():
            self._scaler.step(self._unscaler)  # lr 0: only records whether the scale was too high
            self._scaler.update()
        if not finite:
            return None
        return Gradients(tensors, batch.size, losses.mlm.item(), losses.sop.item())
