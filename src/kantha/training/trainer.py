"""Computes gradients of one batch after another on this machine's device."""

import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import psutil
import torch

from kantha.corpus import MASK_ID, SPECIAL_TOKENS, Batch
from kantha.errors import DeviceMemoryError
from kantha.model import build_model, pretraining_losses
from kantha.spec import RunSpec
from kantha.training.utilisation import training_flops

_log = logging.getLogger(__name__)
_LARGEST = 512  # examples computed at once
_CPU_TOKENS = 512  # computed at once on a CPU
_GAIN = 1.05  # a larger batch, or a compiled model, is worth it if it is that much faster
_LONG = 1.0  # seconds of a batch from which on a larger one only makes others wait
_LOOK = 0.2  # seconds in which steps of one size are timed; the fastest is the least disturbed
_OWN_SHARE = 0.9  # of the memory that is free when training begins; the rest stays for the person at the screen
# relative, compiled against eager; of the demo on a CPU: losses 1e-5 apart, gradients 1e-3 in fp16, 8e-3 in bf16
_LOSS_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Gradients:
    """The mean gradient over `samples` samples, and the mean losses in nats."""

    tensors: list[torch.Tensor]  # on the trainer's device, in the order of the model's parameters
    samples: int
    mlm_loss: float
    sop_loss: float
    tokens: int  # of the samples; padding is none
    flops: float  # what it took, see `training_flops`


@dataclass(frozen=True)
class _Step:
    """Of one part of a batch, or of a whole one: gradients, scaled for fp16, and losses."""

    tensors: tuple[torch.Tensor, ...]
    mlm: float
    sop: float


def choose_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """A name for people, at most 60 characters: the GPU's, or the CPU's and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)[:60]
    return f"{platform.machine()} CPU, {psutil.cpu_count(logical=False) or psutil.cpu_count()} cores"


def choose_dtype(device: torch.device) -> torch.dtype:
    """What matrices are multiplied in: bf16 on a GPU that is built for it, fp16 on others (a T4), fp32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    # is_bf16_supported() is also true where bf16 is emulated; Ampere (8.0) is the first that computes in it
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def full_batch(spec: RunSpec, size: int) -> Batch:
    """The batch of `size` examples that needs most memory: of random tokens, full length, the spec's share masked."""
    length = spec.data.sequence_length
    chance = torch.Generator().manual_seed(size)
    tokens = torch.randint(len(SPECIAL_TOKENS), spec.tokenizer.vocab_size, (size, length), generator=chance)
    count = max(1, int(spec.objective.masked_share * size * length))
    masked = torch.randperm(size * length, generator=chance)[:count].sort().values
    inputs = tokens.flatten().clone()
    inputs[masked] = MASK_ID
    inside = torch.ones(size, length, dtype=torch.int64)
    inside[:, -1] = 0  # without any padding the attention needs no mask, and less memory
    return Batch(
        input_ids=inputs.view(size, length),
        attention_mask=inside,
        token_type_ids=torch.zeros(size, length, dtype=torch.int64),
        masked_positions=masked,
        masked_labels=tokens.flatten()[masked],
        swapped=torch.randint(0, 2, (size,), generator=chance),
    )


def sizes_that_fit(measure: Callable[[int], float], most: int = _LARGEST) -> Iterator[tuple[int, float]]:
    """Sizes of a batch, doubled from 1 to `most`, and what `measure` gives for each, until it raises
    `torch.OutOfMemoryError`."""
    size = 1
    while size <= most:
        try:
            measured = measure(size)
        except torch.OutOfMemoryError:
            return
        yield size, measured
        size *= 2


class Trainer:
    """The model on this machine's device.

    On a GPU it computes in bf16 where the device is built for it and in fp16 with loss scaling elsewhere (a T4); on a
    CPU in fp32. Parameters and gradients are fp32 everywhere. Of a GPU's memory it takes at most 90 % of what is free.

    A batch for which memory does not suffice is computed in halves, to the same gradients; later ones are no larger
    than what did fit (`micro_batch`). Raises `DeviceMemoryError` where not even one example fits.
    """

    def __init__(self, spec: RunSpec, device: torch.device) -> None:
        self.device = device
        self.micro_batch = _LARGEST
        """How many examples are computed at once, at most."""
        self._spec = spec
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            torch.cuda.set_per_process_memory_fraction(_OWN_SHARE * free / total)
        try:
            self._model = build_model(spec).to(device).train()
        except torch.OutOfMemoryError:
            raise self._too_small() from None
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._dtype = choose_dtype(device)
        self._compiled = False
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype is torch.float16)
        self._unscaler = torch.optim.SGD(self._parameters, lr=0.0)  # GradScaler works through an optimizer; never steps

    def load(self, parameters: Sequence[torch.Tensor]) -> None:
        """Take over the parameters of the swarm's replica, given in the order of the model's parameters."""
        with torch.no_grad():
            for mine, theirs in zip(self._parameters, parameters, strict=True):
                mine.copy_(theirs, non_blocking=True)

    def prepare(self, micro_batch: int | None, say: Callable[[str], None]) -> None:
        """Settle how many examples are computed at once and, on a GPU, find out whether a compiled model is faster.

        A CPU takes as many as make 512 tokens, which needs no finding out: on one core of an AMD EPYC the demo's model
        made 36, 93, 113, 123, 124, 112, 113 examples a second of 64 tokens with 1, 2, 4, 8, 16, 32, 64 at once;
        albert-base 1.3, 1.9, 1.9, 2.1 of 64 tokens, and 0.28, 0.26, 0.24, 0.25 of 512, with 1, 2, 4, 8 at once.

        :param micro_batch: examples to compute at once; None: by the device
        :param say: is told what takes long, and what was found, a line each
        """
        if micro_batch is not None:
            self.micro_batch = micro_batch
        elif self.device.type == "cuda":
            say("finding out how many examples this GPU computes at once …")
            self.find_micro_batch()
            say(f"computes {self.micro_batch} examples at once")
        else:
            self.micro_batch = max(1, _CPU_TOKENS // self._spec.data.sequence_length)
        if self.device.type == "cuda" and self._spec.model.dropout == 0:
            say("compiling the model for this GPU; it may take some minutes …")
            self.compile()
            say("the compiled model is faster" if self._compiled else "goes on without compiling; the log says why")

    def find_micro_batch(self) -> None:
        """Set `micro_batch` to the size that fits into memory and computes most examples a second.

        A larger one than needed would cost memory and delay handing over: sizes double until a batch takes more than a
        second, or two in a row are not 5 % faster.
        """
        best, speed, slower = 0, 0.0, 0
        for size, seconds in sizes_that_fit(self._seconds):
            if size / seconds > _GAIN * speed:
                best, speed, slower = size, size / seconds, 0
            else:
                slower += 1
            if seconds > _LONG or slower == 2:
                break
        self._free()
        if not best:
            raise self._too_small()
        self.micro_batch = best

    def compile(self) -> None:
        """Compile the layer that all of ALBERT shares, and use it if it gives the same and is 5 % faster here.

        One small graph, applied `layers` times; the lengths of batches are variables in it. Whatever fails, here or
        later, is logged, and the model is used as it is. Not for models with dropout, which never give the same twice.
        On a CPU it does not pay: one core of an AMD EPYC compiles for 37 s to 41 s, and is then as fast as before (0.99
        times for the demo, 1.01 for 6 layers of 512).
        """
        batch = full_batch(self._spec, self.micro_batch)
        try:
            before, eager = self._seconds(self.micro_batch), self._step(batch, 1.0)
            for layer in self._layers():
                layer.forward = torch.compile(layer.forward, dynamic=True)
            self._compiled = True
            difference = self._difference(self._step(batch, 1.0), eager)
            del eager  # of the memory, training holds no more than two steps
            if difference:
                self._uncompile(f"the compiled model does not compute the same: {difference}")
            elif (after := self._seconds(self.micro_batch)) * _GAIN > before:
                self._uncompile(f"the compiled model is no faster: {after:.3f} s a batch, not compiled {before:.3f} s")
            else:
                _log.info("compiled: %.3f s a batch instead of %.3f s", after, before)
        except Exception as error:  # noqa: BLE001  compilers fail in many ways, and none of them needs to end the training
            self._uncompile(f"the model cannot be compiled here: {error!r}")
        self._free()

    def compute(self, batches: Iterable[Batch]) -> Gradients | None:
        """Gradients of some batches together, valid until the next call; None where they are not finite.

        They are the mean over examples of what `pretraining_losses` gives for the batch that an example came in,
        whatever parts a batch was computed in. Raises `ValueError` where there is no batch.
        """
        sums: list[torch.Tensor] = []
        samples, tokens, flops, mlm_loss_sum, sop_loss_sum = 0, 0, 0.0, 0.0, 0.0
        for batch in batches:
            waiting = batch.split(self.micro_batch)
            while waiting:
                part = waiting.pop(0)
                # a part has its share of the batch's masked tokens, which is not quite that of the examples
                share = len(part.masked_labels) / max(1, len(batch.masked_labels)) * batch.size / part.size
                step = self._attempt(part, share)
                if step is None:
                    waiting = [smaller for large in (part, *waiting) for smaller in large.split(self.micro_batch)]
                    continue
                if not sums:
                    sums = [tensor * part.size for tensor in step.tensors]
                else:
                    for total, tensor in zip(sums, step.tensors, strict=True):
                        total.add_(tensor, alpha=part.size)
                mlm_loss_sum += step.mlm * share * part.size
                sop_loss_sum += step.sop * part.size
            samples += batch.size
            tokens += int(batch.attention_mask.sum())
            flops += training_flops(self._spec, batch)
        if samples == 0:
            raise ValueError("no batch to compute gradients of")
        for parameter, total in zip(self._parameters, sums, strict=True):
            parameter.grad = total.div_(samples)
        self._scaler.unscale_(self._unscaler)
        finite = bool(torch.stack([tensor.isfinite().all() for tensor in sums]).all())
        if self._scaler.is_enabled():
            self._scaler.step(self._unscaler)  # lr 0: only records whether the scale was too high
            self._scaler.update()
        self._unscaler.zero_grad(set_to_none=True)
        if not finite:
            return None
        return Gradients(sums, samples, mlm_loss_sum / samples, sop_loss_sum / samples, tokens, flops)

    def _step(self, batch: Batch, mlm_weight: float) -> _Step:
        """The gradient of the losses' sum, the first weighted; all of it, or an error and nothing."""
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not torch.float32):
            losses = pretraining_losses(self._model, self._to_device(batch))
        loss = self._scaler.scale(losses.mlm * mlm_weight + losses.sop)
        # not backward(): where memory runs out halfway, that would leave some parameters with the batch's gradient
        tensors = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        return _Step(tensors, losses.mlm.item(), losses.sop.item())

    def _to_device(self, batch: Batch) -> Batch:
        if self.device.type != "cuda":
            return batch
        tensors = (getattr(batch, field.name) for field in fields(batch))
        return Batch(*(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors))

    def _attempt(self, part: Batch, mlm_weight: float) -> _Step | None:
        """None where it is to be tried again, because memory did not suffice (`micro_batch` is smaller then) or the
        compiled model failed (it is not compiled then)."""
        try:
            return self._step(part, mlm_weight)
        except torch.OutOfMemoryError:
            if part.size == 1:
                raise self._too_small() from None
            self.micro_batch = (part.size + 1) // 2
            _log.warning("out of memory with %d examples at once, now %d", part.size, self.micro_batch)
        except Exception as error:
            if not self._compiled:
                raise
            self._uncompile(f"the compiled model failed: {error!r}")
        self._free()  # here, and not above: an exception holds on to what was computed
        return None

    def _seconds(self, size: int) -> float:
        """Of a step with a batch that needs most memory: the fastest of two (the first of all loads libraries), or of
        what 0.2 seconds allow."""
        batch = full_batch(self._spec, size)
        took: list[float] = []
        while len(took) < 2 or sum(took) < _LOOK:
            began = time.perf_counter()
            kept = self._step(batch, 1.0)  # noqa: F841  while the next one is computed, as the sums are
            took.append(time.perf_counter() - began)
        return min(took)

    def _difference(self, step: _Step, other: _Step) -> str:
        """By how much a step is off another one; nothing where that is within the rounding."""
        loss, expected = step.mlm + step.sop, other.mlm + other.sop
        if not abs(loss - expected) <= _LOSS_TOLERANCE[self._dtype] * expected:
            return f"loss {loss}, not {expected}"
        far, norm = (
            torch.stack([tensor.norm() for tensor in tensors]).norm()
            for tensors in ([a - b for a, b in zip(step.tensors, other.tensors, strict=True)], other.tensors)
        )
        # in fp16 the first gradients may be too large for their scale
        if norm.isfinite() and not far <= _GRADIENT_TOLERANCE[self._dtype] * norm:
            return f"gradients that are {float(far / norm):.2g} away"
        return ""

    def _layers(self) -> list[torch.nn.Module]:
        groups = self._model.albert.encoder.albert_layer_groups
        return [layer for group in groups for layer in group.albert_layers]

    def _uncompile(self, reason: str) -> None:
        _log.warning("%s; goes on without compiling", reason)
        for layer in self._layers():
            layer.__dict__.pop("forward", None)  # that of its class is the one that is not compiled
        self._compiled = False

    def _free(self) -> None:
        """Give back what the last step held, which is cut to its sizes."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_small(self) -> DeviceMemoryError:
        return DeviceMemoryError(
            f"{describe_device(self.device)}: not even one example of this run fits into its memory; close other "
            "programs that use it, or put CUDA_VISIBLE_DEVICES= before the command, which trains on the CPU"
        )
