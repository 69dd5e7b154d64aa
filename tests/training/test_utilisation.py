from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kantha.corpus import Batch
from kantha.model import build_model, pretraining_losses
from kantha.spec import PRESETS, RunSpec
from kantha.training import full_batch, peak_flops, training_flops
from kantha.training import utilisation as module


def counted(spec: RunSpec, batch: Batch) -> int:
    """Operations as PyTorch counts them while it computes."""
    model = build_model(spec)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of the others it knows no backward
        pretraining_losses(model, batch).total.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"layers": 5, "layer_groups": 5}, {"intermediate_size": 48}])
def test_a_step_takes_as_many_operations_as_pytorch_counts(tiny_spec: RunSpec, changes: dict[str, int]) -> None:
    spec = tiny_spec.model_copy(update={"model": tiny_spec.model.model_copy(update=changes)})
    batch = full_batch(spec, 3)
    batch.attention_mask.fill_(1)  # PyTorch counts padding, too
    assert training_flops(spec, batch) == pytest.approx(counted(spec, batch), rel=0.01)


def test_the_demo_s_model_as_well() -> None:
    spec = PRESETS["demo"]
    batch = full_batch(spec, 2)
    batch.attention_mask.fill_(1)
    assert training_flops(spec, batch) == pytest.approx(counted(spec, batch), rel=0.01)


def test_padding_is_no_work(tiny_spec: RunSpec) -> None:
    batch = full_batch(tiny_spec, 4)
    padded = Batch(
        *(torch.nn.functional.pad(t, (0, 8)) for t in (batch.input_ids, batch.attention_mask, batch.token_type_ids)),
        batch.masked_positions,  # not where they were, but as many
        batch.masked_labels,
        batch.swapped,
    )
    assert training_flops(tiny_spec, padded) == training_flops(tiny_spec, batch)


def test_a_device_whose_peak_is_not_known_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    names = {"Tesla T4": 65e12, "NVIDIA GeForce RTX 4070 Laptop GPU": None, "NVIDIA GeForce RTX 4070": 58.3e12}
    for name, peak in names.items():  # of GPUs that this machine may not have
        monkeypatch.setattr(module.torch, "cuda", SimpleNamespace(get_device_name=lambda _, name=name: name))
        assert peak_flops(torch.device("cuda")) == peak
