"""The optimizers: LAMB (You et al. 2020, arXiv 1904.00962) and AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

from typing import Any

import torch
from pytorch_optimizer import Lamb

from kantha.spec import OptimizerSpec, RunSpec


def parameter_groups(model: torch.nn.Module, spec: RunSpec) -> list[dict[str, Any]]:
    """Two groups: matrices with weight decay; biases and LayerNorm, all of one dimension, without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": spec.optimizer.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(groups: list[dict[str, Any]], spec: RunSpec) -> torch.optim.Optimizer:
    """The spec's optimizer over `groups`, its state allocated and zero: ready for a peer's state to be loaded.

    Its rate is set before every step, see `kantha.spec.Schedule`.
    """
    optimizer = _lamb(groups, spec.optimizer) if spec.optimizer.name == "lamb" else _adamw(groups, spec.optimizer)
    _allocate_state(optimizer)
    return optimizer


def _lamb(groups: list[dict[str, Any]], values: OptimizerSpec) -> torch.optim.Optimizer:
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
    return optimizer


def _adamw(groups: list[dict[str, Any]], values: OptimizerSpec) -> torch.optim.Optimizer:
    betas = (values.beta1, values.beta2)
    optimizer = torch.optim.AdamW(groups, lr=values.learning_rate, betas=betas, eps=values.epsilon, fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, values.max_grad_norm)

    if values.max_grad_norm:
        optimizer.register_step_pre_hook(clip)
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
        group["lr"] = rate
        for p, gradient in zip(group["params"], previous, strict=True):
            p.grad = gradient
    set_steps(optimizer, 0)


def set_steps(optimizer: torch.optim.Optimizer, number: int) -> None:
    """How many steps were made: AdamW corrects the bias of its moments by it, LAMB has no use for it."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "step" in optimizer.state[p]:
                optimizer.state[p]["step"].fill_(number)
