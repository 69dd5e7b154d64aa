"""The local half of the work: batches in, gradients out, and what is kept on disk. Knows no network."""

from kantha.training.checkpoint import Manifest, Replica
from kantha.training.trainer import Gradients, Trainer, choose_device, describe_device

__all__ = ["Gradients", "Manifest", "Replica", "Trainer", "choose_device", "describe_device"]
