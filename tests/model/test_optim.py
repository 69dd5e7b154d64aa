from typing import Any

import pytest
import torch

from kantha.corpus import Batch
from kantha.model import build_model, build_optimizer, parameter_groups, pretraining_losses
from kantha.spec import OptimizerSpec, RunSpec


def with_optimizer(spec: RunSpec, **values: Any) -> RunSpec:
    return spec.model_copy(update={"optimizer": OptimizerSpec(**values)})


def test_all_but_biases_and_layer_norms_decay(tiny_spec: RunSpec) -> None:
    spec = with_optimizer(tiny_spec, weight_decay=0.25)
    model = build_model(spec)
    decaying, others = parameter_groups(model, spec)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    grouped = [id(p) for group in (decaying, others) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decays = {id(p) for p in decaying["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decays) == (
            "bias" not in name and "LayerNorm" not in name.replace("layer_norm", "LayerNorm")
        ), name


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_allocating_state_changes_no_parameter_and_no_gradient(tiny_spec: RunSpec, name: str) -> None:
    tiny_spec = with_optimizer(tiny_spec, name=name, learning_rate=1e-2)
    model = build_model(tiny_spec)
    first, second, *_ = model.parameters()
    first.grad = torch.full_like(first, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(parameter_groups(model, tiny_spec), tiny_spec)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert torch.equal(first.grad, torch.full_like(first, 0.5))
    assert second.grad is None
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    for parameter in model.parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][moment]
            assert state.shape == parameter.shape
            assert not state.any()


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_is_that_of_the_paper(tiny_spec: RunSpec, max_grad_norm: float) -> None:
    """Algorithm 2 of You et al. 2020, without the correction of the moments' bias, after clipping the gradient."""
    spec = with_optimizer(
        tiny_spec, learning_rate=0.1, beta1=0.8, beta2=0.9, weight_decay=0.3, max_grad_norm=max_grad_norm
    )
    values = spec.optimizer
    chance = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(
        10 * torch.randn(4, 3, generator=chance)
    )  # its norm is above the library's own clamp
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": values.weight_decay}], spec)
    expected = parameter.detach().clone()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for _ in range(3):
        gradient = torch.randn(4, 3, generator=chance)
        parameter.grad = gradient.clone()
        optimizer.step()
        if max_grad_norm:
            gradient *= min(1.0, max_grad_norm / gradient.norm().item())
        mean = values.beta1 * mean + (1 - values.beta1) * gradient
        square = values.beta2 * square + (1 - values.beta2) * gradient**2
        update = mean / (square.sqrt() + values.epsilon) + values.weight_decay * expected
        expected -= values.learning_rate * expected.norm() / update.norm() * update
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_weight_norm_is_clamped_where_the_spec_says(tiny_spec: RunSpec) -> None:
    steps = []
    for clamp in (1.0, 2.0):
        spec = with_optimizer(tiny_spec, weight_decay=0.0, weight_norm_clamp=clamp)
        parameter = torch.nn.Parameter(torch.full((4, 3), 5.0))
        optimizer = build_optimizer([{"params": [parameter]}], spec)
        parameter.grad = torch.ones(4, 3)
        optimizer.step()
        steps.append(5.0 - parameter.detach())
    torch.testing.assert_close(steps[1], 2 * steps[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_adamw_is_that_of_the_paper_and_clips_the_gradient(tiny_spec: RunSpec, max_grad_norm: float) -> None:
    """Algorithm 2 of Loshchilov and Hutter 2019."""
    spec = with_optimizer(tiny_spec, name="adamw", learning_rate=0.1, beta1=0.8, beta2=0.9, max_grad_norm=max_grad_norm)
    values, chance = spec.optimizer, torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3, generator=chance))
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.3}], spec)
    expected = parameter.detach().clone()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 4):
        gradient = torch.randn(4, 3, generator=chance)
        parameter.grad = gradient.clone()
        optimizer.step()
        if max_grad_norm:
            gradient *= min(1.0, max_grad_norm / gradient.norm().item())
        mean = values.beta1 * mean + (1 - values.beta1) * gradient
        square = values.beta2 * square + (1 - values.beta2) * gradient**2
        update = (mean / (1 - values.beta1**step)) / ((square / (1 - values.beta2**step)).sqrt() + values.epsilon)
        expected -= values.learning_rate * (update + 0.3 * expected)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_some_steps_on_a_batch_lower_its_loss(tiny_spec: RunSpec, tiny_batches: list[Batch], name: str) -> None:
    tiny_spec = with_optimizer(tiny_spec, name=name, learning_rate=1e-2, beta2=0.98)
    model = build_model(tiny_spec)
    optimizer = build_optimizer(parameter_groups(model, tiny_spec), tiny_spec)
    losses = []
    for _ in range(100):
        loss = pretraining_losses(model, tiny_batches[0]).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
