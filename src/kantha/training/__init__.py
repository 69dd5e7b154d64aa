"""The local half of the work: batches in, gradients out, and what is kept on disk. Knows no network."""

from kantha.training.checkpoint import Manifest, Replica
from kantha.training.trainer import (
    Gradients,
    Trainer,
    choose_device,
    choose_dtype,
    describe_device,
    full_batch,
    sizes_that_fit,
)
from kantha.training.utilisation import peak_flops, training_flops

__all__ = [
    "Gradients",
    "Manifest",
    "Replica",
    "Trainer",
    "choose_device",
    "choose_dtype",
    "describe_device",
    "full_batch",
    "peak_flops",
    "sizes_that_fit",
    "training_flops",
]
