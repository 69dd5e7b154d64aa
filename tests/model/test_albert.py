import pytest
import torch

from kantha.corpus import Batch
from kantha.model import build_model, pretraining_losses
from kantha.spec import ModelSpec, RunSpec


def with_model(spec: RunSpec, **changes: object) -> RunSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update=changes)})


def labels_of(batch: Batch) -> torch.Tensor:
    """Labels as `AlbertForPreTraining` wants them: [B, L], -100 where nothing is to be guessed."""
    labels = torch.full(batch.input_ids.shape, -100)
    labels.view(-1)[batch.masked_positions] = batch.masked_labels
    return labels


def test_our_losses_are_those_of_transformers(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    model = build_model(tiny_spec).eval()
    for batch in tiny_batches:
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "token_type_ids": batch.token_type_ids,
        }
        theirs = model(**inputs, labels=labels_of(batch), sentence_order_label=batch.swapped)
        order = torch.nn.functional.cross_entropy(theirs.sop_logits, batch.swapped)
        ours = pretraining_losses(model, batch)
        assert ours.total.item() == pytest.approx(theirs.loss.item(), abs=1e-5)
        assert ours.sop.item() == pytest.approx(order.item(), abs=1e-5)
        assert ours.mlm.item() == pytest.approx(theirs.loss.item() - order.item(), abs=1e-5)


def test_padding_changes_no_loss(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    model = build_model(tiny_spec).eval()
    batch = tiny_batches[0]
    width = batch.input_ids.shape[1]
    ids, attention, segments = (
        torch.nn.functional.pad(t[:, : width - 4], (0, 4))
        for t in (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    )
    inside = batch.masked_positions % width < width - 4
    padded = Batch(ids, attention, segments, batch.masked_positions[inside], batch.masked_labels[inside], batch.swapped)
    rows, columns = padded.masked_positions // width, padded.masked_positions % width
    cut = Batch(
        ids[:, : width - 4],
        attention[:, : width - 4],
        segments[:, : width - 4],
        rows * (width - 4) + columns,
        padded.masked_labels,
        batch.swapped,
    )
    assert pretraining_losses(model, padded).total.item() == pytest.approx(
        pretraining_losses(model, cut).total.item(), abs=1e-5
    )


def test_the_seed_decides_the_weights_and_nothing_else_is_drawn(tiny_spec: RunSpec) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_model(tiny_spec).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = build_model(tiny_spec).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build_model(tiny_spec.model_copy(update={"seed": 8})).state_dict()
    assert not torch.equal(
        first["albert.embeddings.word_embeddings.weight"], other["albert.embeddings.word_embeddings.weight"]
    )


def test_without_dropout_training_draws_nothing(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    model = build_model(tiny_spec).train()
    first, again = (pretraining_losses(model, tiny_batches[0]) for _ in range(2))
    assert first.mlm.item() == again.mlm.item()
    assert first.sop.item() == again.sop.item()


def test_dropout_of_the_spec_is_applied(tiny_spec: RunSpec, tiny_batches: list[Batch]) -> None:
    torch.manual_seed(0)
    model = build_model(with_model(tiny_spec, dropout=0.5)).train()
    first, again = (pretraining_losses(model, tiny_batches[0]) for _ in range(2))
    assert first.mlm.item() != again.mlm.item()
    assert first.sop.item() != again.sop.item()


def test_layers_share_their_weights_within_a_group(tiny_spec: RunSpec) -> None:
    def weights(**shape: int) -> int:
        return sum(p.numel() for p in build_model(with_model(tiny_spec, **shape)).parameters())

    assert weights(layers=4) == weights(layers=2)
    assert weights(layers=4, layer_groups=2) > weights(layers=4)


def test_the_network_has_the_shape_of_the_spec(tiny_spec: RunSpec) -> None:
    shape = ModelSpec(
        embedding_size=24,
        hidden_size=40,
        intermediate_size=56,
        layers=3,
        layer_groups=3,
        attention_heads=5,
        max_positions=48,
        activation="relu",
    )
    model = build_model(tiny_spec.model_copy(update={"model": shape}))
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sizes["albert.embeddings.word_embeddings.weight"] == (200, 24)
    assert sizes["albert.embeddings.position_embeddings.weight"] == (48, 24)
    assert sizes["albert.encoder.embedding_hidden_mapping_in.weight"] == (40, 24)
    assert {size for name, size in sizes.items() if name.endswith("ffn.weight")} == {(56, 40)}
    assert sum(name.endswith("ffn.weight") for name in sizes) == 3
    assert model.config.num_hidden_layers == 3
    assert model.config.num_attention_heads == 5
    assert model.config.hidden_act == "relu"
