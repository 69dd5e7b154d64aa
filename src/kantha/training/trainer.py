"""Computes gradients of one batch after another on this machine's device."""

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil
import torch

from kantha.corpus import Batch
from kantha.model import build_model, pretraining_losses
from kantha.spec import RunSpec


@dataclass(frozen=True)
class Gradients:
    """The mean gradient over `samples` samples, and the mean losses in nats."""

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

    def compute(self, batches: Iterable[Batch]) -> Gradients | None:
        """Gradients of some batches together, valid until the next call; None where they are not finite.

        Raises `ValueError` where there is no batch.
        """
        self._unscaler.zero_grad(set_to_none=True)
        samples, mlm_loss_sum, sop_loss_sum = 0, 0.0, 0.0
        for batch in batches:
            with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
                losses = pretraining_losses(self._model, batch.to(self.device))
            self._scaler.scale(losses.total * batch.size).backward()
            samples += batch.size
            mlm_loss_sum += losses.mlm.item() * batch.size
            sop_loss_sum += losses.sop.item() * batch.size
        if samples == 0:
            raise ValueError("no batch to compute gradients of")
        self._scaler.unscale_(self._unscaler)
        tensors = [torch.zeros_like(p) if p.grad is None else p.grad.div_(samples) for p in self._parameters]
        finite = bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())
        if self._scaler.is_enabled():
            self._scaler.step(self._unscaler)  # lr 0: only records whether the scale was too high
            self._scaler.update()
        if not finite:
            return None
        return Gradients(tensors, samples, mlm_loss_sum / samples, sop_loss_sum / samples)
