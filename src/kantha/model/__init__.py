"""The network and its optimizer, from the run spec: ALBERT of `transformers`, LAMB of `pytorch-optimizer`, AdamW."""

from kantha.model.albert import Logits, Losses, build_model, pretraining_logits, pretraining_losses
from kantha.model.optim import build_optimizer, parameter_groups, set_steps

__all__ = [
    "Logits",
    "Losses",
    "build_model",
    "build_optimizer",
    "parameter_groups",
    "pretraining_logits",
    "pretraining_losses",
    "set_steps",
]
