"""What travels in an all-reduce: parts of tensors, encoded, and checked on arrival.

The 8-bit code has one fp32 scale for every 256 values (blockwise absolute maximum: Dettmers et al. 2022, arXiv
2110.02861, section 2.1, without its non-linear map). hivemind's own has one for half a million: measured on the sparse
gradient of an embedding, it loses half of the norm, and this one 1 %.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

PART_VALUES = 2**17  # largest part
_BLOCK = 256  # values that share a scale in 8 bits
_SMALL = 2**12  # parts below this travel in fp32: biases and LayerNorms are few, and move a lot


class CodecError(Exception):
    """What was decoded is not what was encoded, or what arrived is no part."""


@dataclass(frozen=True)
class Part:
    """A slice of one tensor, as a range of the flat vector of all of them."""

    start: int
    stop: int
    codec: str  # none, fp16 or 8bit

    @property
    def values(self) -> int:
        return self.stop - self.start

    @property
    def bytes(self) -> int:
        """Length on the wire."""
        if self.codec == "8bit":
            return self.values + 4 * -(-self.values // _BLOCK)
        return self.values * (2 if self.codec == "fp16" else 4)


class Layout:
    """How tensors of these shapes are cut into parts; the same for all peers of a run."""

    def __init__(self, shapes: Sequence[torch.Size], codec: str) -> None:
        sizes = [shape.numel() for shape in shapes]
        self.parts: list[Part] = []
        start = 0
        for size in sizes:  # no part spans two tensors: their gradients may differ in scale by orders of magnitude
            for first in range(start, start + size, PART_VALUES):
                stop = min(first + PART_VALUES, start + size)
                self.parts.append(Part(first, stop, codec if stop - first >= _SMALL else "none"))
            start += size
        self.values = start
        self.digest = hashlib.sha256(repr((sizes, codec)).encode()).digest()

    def shares(self, count: int) -> list[range]:
        """Indices of parts for each of `count` reducers: about equally many bytes, in order."""
        total, done, cuts = sum(part.bytes for part in self.parts), 0, [0]
        for index, part in enumerate(self.parts):
            while len(cuts) < count and done + part.bytes / 2 >= total * len(cuts) / count:
                cuts.append(index)
            done += part.bytes
        cuts += [len(self.parts)] * (count + 1 - len(cuts))
        return [range(a, b) for a, b in pairwise(cuts)]


def encode(values: torch.Tensor, part: Part) -> tuple[bytes, torch.Tensor]:
    """`values` (1-D, fp32) on the wire, and what the others will read there.

    Raises `CodecError` where these are not the same values, within the code's precision.
    """
    if part.codec == "8bit":
        blocks = torch.nn.functional.pad(values, (0, -part.values % _BLOCK)).view(-1, _BLOCK)
        scales = blocks.abs().amax(dim=1, keepdim=True) / 127
        quantized = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        encoded = scales.numpy().tobytes() + quantized.view(-1)[: part.values].numpy().tobytes()
    elif part.codec == "fp16":
        limit = torch.finfo(torch.float16).max
        encoded = values.clamp(-limit, limit).to(torch.float16).numpy().tobytes()
    else:
        encoded = values.numpy().tobytes()
    decoded = decode(encoded, part)
    lost, norm = float((decoded - values).norm()), float(values.norm())
    # the second term is what fp16 rounds to zero; a norm that is not finite is no norm
    if not (math.isfinite(norm) and lost <= 0.1 * norm + 1e-6 * part.values**0.5):
        raise CodecError(f"encoding in {part.codec} lost {lost:g} of a norm of {norm:g}")
    return encoded, decoded


def decode(encoded: bytes, part: Part) -> torch.Tensor:
    """The values (1-D, fp32) of a part. Raises `CodecError` where the bytes are no such part, or not finite."""
    if len(encoded) != part.bytes:
        raise CodecError(f"a part of {len(encoded)} bytes where {part.bytes} are due")
    if part.codec == "8bit":
        count = -(-part.values // _BLOCK)
        scales = torch.from_numpy(np.frombuffer(encoded, np.float32, count).copy())
        quantized = torch.from_numpy(np.frombuffer(encoded, np.int8, offset=4 * count).copy()).to(torch.float32)
        padded = torch.nn.functional.pad(quantized, (0, -part.values % _BLOCK)).view(-1, _BLOCK)
        values = (padded * scales.unsqueeze(1)).view(-1)[: part.values]
    elif part.codec == "fp16":
        values = torch.from_numpy(np.frombuffer(encoded, np.float16).astype(np.float32))
    else:
        values = torch.from_numpy(np.frombuffer(encoded, np.float32).copy())
    if not bool(values.isfinite().all()):
        raise CodecError("a part that is not finite")
    return values


def digest_of(parts: Sequence[bytes], samples: Mapping[str, float], order: str) -> str:
    """Of an averaged result: equal bytes, samples by peer and order, equal digest."""
    digest = hashlib.sha256(json.dumps([sorted((p, float(n)) for p, n in samples.items()), order]).encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
