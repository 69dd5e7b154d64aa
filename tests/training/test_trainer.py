import pytest
import torch
from tokenizers import Tokenizer

from kantha.corpus import Batch, ExampleStream
from kantha.model import build_model
from kantha.spec import RunSpec
from kantha.training import Trainer, choose_device, describe_device

CPU = torch.device("cpu")


def plain_gradients(spec: RunSpec, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients as `transformers` and autograd alone give them, with logits for every token."""
    model = build_model(spec)
    labels = torch.full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.masked_positions] = batch.masked_labels
    loss = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        labels=labels,
        sentence_order_label=batch.swapped,
    ).loss
    loss.backward()
    return loss.item(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def test_gradients_are_those_of_plain_autograd(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    trainer = Trainer(tiny_spec, CPU)
    for batch in tiny_batches:  # one after the other: nothing of a batch may be left in the next
        gradients = trainer.compute([batch])
        loss, expected = plain_gradients(tiny_spec, batch)
        assert gradients is not None
        assert gradients.samples == 4
        assert gradients.mlm_loss + gradients.sop_loss == pytest.approx(loss, abs=1e-5)
        assert gradients.mlm_loss > 3.0 > gradients.sop_loss  # near log 200 and log 2
        assert any(tensor.any() for tensor in expected)
        for mine, plain in zip(gradients.tensors, expected, strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


def test_some_batches_together_count_as_one_large_batch(
    tiny_spec: RunSpec, tiny_tokenizer: Tokenizer, tiny_batches: list[Batch]
) -> None:
    small = ExampleStream(tiny_spec, tiny_tokenizer, peer_seed=3).next_batch(1)
    trainer = Trainer(tiny_spec, CPU)
    gradients = trainer.compute(iter([tiny_batches[0], small]))
    assert gradients is not None
    assert gradients.samples == 5
    losses, plain = zip(*(plain_gradients(tiny_spec, batch) for batch in (tiny_batches[0], small)), strict=True)
    assert gradients.mlm_loss + gradients.sop_loss == pytest.approx((4 * losses[0] + losses[1]) / 5, abs=1e-5)
    for mine, first, second in zip(gradients.tensors, *plain, strict=True):
        torch.testing.assert_close(mine, (4 * first + second) / 5, rtol=1e-4, atol=1e-6)


def test_no_batch_has_no_gradient(tiny_spec: RunSpec) -> None:
    with pytest.raises(ValueError, match="no batch"):
        Trainer(tiny_spec, CPU).compute([])


def test_the_swarms_parameters_are_taken_over(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    other_spec = tiny_spec.model_copy(update={"seed": 99})
    expected = Trainer(other_spec, CPU).compute([tiny_batches[0]])
    trainer = Trainer(tiny_spec, CPU)
    swarm = list(build_model(other_spec).parameters())
    trainer.load(swarm)
    gradients = trainer.compute([tiny_batches[0]])
    assert gradients is not None
    assert expected is not None
    assert gradients.mlm_loss == expected.mlm_loss
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients.tensors, expected.tensors, strict=True))


def test_gradients_that_are_not_finite_are_not_handed_out(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    trainer = Trainer(tiny_spec, CPU)
    good = [p.detach().clone() for p in build_model(tiny_spec).parameters()]
    for poison in (float("nan"), float("inf")):
        bad = [p.clone() for p in good]
        bad[0][:] = poison  # the embeddings of all tokens
        trainer.load(bad)
        assert trainer.compute([tiny_batches[0]]) is None
    trainer.load(good)
    assert trainer.compute([tiny_batches[0]]) is not None


def test_this_machines_device_fits_into_a_report() -> None:
    device = choose_device()
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert 0 < len(describe_device(CPU)) <= 60
    assert "cores" in describe_device(CPU)
