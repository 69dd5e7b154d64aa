"""LAMB (You et al. 2020, arXiv 1904.00962) and the learning rate by round."""

from typing import Any

import torch
from pytorch_optimizer import Lamb
from torch.optim.lr_scheduler import LambdaLR

from kantha.spec import RunSpec


def parameter_groups(model: torch.nn.Module, spec: RunSpec) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases and LayerNorm, all of one dimension, without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.optimizer.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(groups: list[dict[str, Any]], spec: RunSpec) -> torch.optim.Optimizer:
    """The spec's optimizer over `groups`, its state allocated and zero: ready for a peer's state to be loaded."""
    values = spec.optimizer
    optimizer = Lamb(
        groups,
        lr=values.learning_rate,
        betas=(values.beta1, values.beta2),
        eps=values.epsilon,
        adam_debias=True,  # despite its name: no bias correction, as the paper has none; it would undo the warm-up
        weight_decouple=False,  # decay inside the trust ratio, as LAMB's Algorithm 2 has it
        pre_norm=values.max_grad_norm > 0,
        max_grad_norm=values.max_grad_norm,
    )
    optimizer.clamp = values.weight_norm_clamp
    _allocate_state(optimizer)
    return optimizer


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """One step with zero gradients at learning rate zero: makes all state tensors and changes no parameter."""
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = [[p.grad for p in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for group, rate, previous in zip(optimizer.param_groups, rates, gradients, strict=True):
        group["lr"], group["step"] = rate, 0
        for p, gradient in zip(group["params"], previous, strict=True):
            p.grad = gradient


def build_schedule(optimizer: torch.optim.Optimizer, spec: RunSpec) -> LambdaLR:
    """Linear warm-up to the peak, then linear decay to zero, by round: one `step()` a round."""
    warmup, total = spec.schedule.warmup_rounds, spec.schedule.total_rounds

    def factor(round_number: int) -> float:
        if round_number < warmup:
            return (round_number + 1) / (warmup + 1)
        return max(0.0, (total - round_number) / (total - warmup))

    schedule = LambdaLR(optimizer, factor)
    # a replica that is loaded made its steps elsewhere; PyTorch would warn of a schedule that runs ahead
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return schedule
