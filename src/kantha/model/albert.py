"""ALBERT (Lan et al. 2020, arXiv 1909.11942) for masked tokens and sentence order.

Shapes: B sequences of L tokens, M masked tokens in the whole batch, H hidden width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertForPreTraining
from transformers.activations import NewGELUActivation

from kantha.corpus import CLS_ID, PAD_ID, SEP_ID, Batch
from kantha.spec import RunSpec


@dataclass(frozen=True)
class Losses:
    """Mean losses of one batch, in nats: `mlm` per masked token, `sop` per sequence; scalars with gradient."""

    mlm: torch.Tensor
    sop: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.mlm + self.sop


def build_model(spec: RunSpec) -> AlbertForPreTraining:
    """The spec's network on the CPU in fp32, its weights drawn from the spec's seed."""
    shape = spec.model
    config = AlbertConfig(
        vocab_size=spec.tokenizer.vocab_size,
        embedding_size=shape.embedding_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_hidden_groups=shape.layer_groups,
        num_attention_heads=shape.attention_heads,
        max_position_embeddings=shape.max_positions,
        hidden_act=shape.activation,
        hidden_dropout_prob=shape.dropout,
        attention_probs_dropout_prob=shape.dropout,
        classifier_dropout_prob=0.1,  # of later fine-tuning; the sentence order head drops nothing, see below
        type_vocab_size=2,
        pad_token_id=PAD_ID,
        bos_token_id=CLS_ID,
        eos_token_id=SEP_ID,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = AlbertForPreTraining(config)
    model.sop_classifier.dropout.p = shape.dropout
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # the same function in eight operations instead of one
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


@dataclass(frozen=True)
class Logits:
    """What the model thinks of one batch: `mlm` [M, V] of the tokens that are masked, `sop` [B, 2] of the order."""

    mlm: torch.Tensor
    sop: torch.Tensor


def pretraining_logits(model: AlbertForPreTraining, batch: Batch) -> Logits:
    """Both heads on a batch, in fp32; the vocabulary head is applied to the masked tokens only.

    `AlbertForPreTraining` itself would make logits [B, L, V]; these are [M, V], about 7 times less memory and work.
    """
    body = model.albert(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
    )
    hidden_BLH = body.last_hidden_state
    masked_MH = hidden_BLH.flatten(0, 1)[batch.masked_positions]
    return Logits(model.predictions(masked_MH).float(), model.sop_classifier(body.pooler_output).float())


def pretraining_losses(model: AlbertForPreTraining, batch: Batch) -> Losses:
    """Both losses of a batch, from `pretraining_logits`."""
    logits = pretraining_logits(model, batch)
    # the mean, and 0 where nothing is masked, which happens in small batches of short text
    mlm = F.cross_entropy(logits.mlm, batch.masked_labels, reduction="sum") / max(1, len(batch.masked_labels))
    return Losses(mlm, F.cross_entropy(logits.sop, batch.swapped))
