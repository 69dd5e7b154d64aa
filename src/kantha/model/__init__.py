"""The network and its optimizer, built from the run spec: ALBERT of `transformers`, LAMB of `pytorch-optimizer`."""

from kantha.model.albert import Logits, Losses, build_model, pretraining_logits, pretraining_losses
from kantha.model.optim import build_optimizer, build_schedule, parameter_groups

__all__ = [
    "Logits",
    "Losses",
    "build_model",
    "build_optimizer",
    "build_schedule",
    "parameter_groups",
    "pretraining_logits",
    "pretraining_losses",
]
