"""Measures on documents that no volunteer trains on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AlbertForPreTraining, pipeline
from transformers.utils import logging as transformers_logging

from kantha.corpus import MASK_ID, SPECIAL_TOKENS, Batch
from kantha.model import pretraining_logits
from kantha.spec import BLANK

_WORD_MARK = "▁"  # before a piece that begins a word


@dataclass(frozen=True)
class HeldoutScores:
    """How a model does on held-out examples: losses in nats, accuracies as shares from 0 to 1."""

    mlm_loss: float  # per masked token
    mlm_accuracy: float
    sop_loss: float  # per pair of segments
    sop_accuracy: float
    masked: int  # tokens
    pairs: int


@torch.inference_mode()
def measure_heldout(model: AlbertForPreTraining, batches: Sequence[Batch]) -> HeldoutScores:
    """Both tasks over all batches: means over all masked tokens, and over all pairs of segments."""
    model.eval()
    mlm_loss = sop_loss = 0.0
    right_tokens = right_orders = masked = pairs = 0
    for batch in batches:
        logits = pretraining_logits(model, batch)
        mlm_loss += F.cross_entropy(logits.mlm, batch.masked_labels, reduction="sum").item()
        sop_loss += F.cross_entropy(logits.sop, batch.swapped, reduction="sum").item()
        right_tokens += int((logits.mlm.argmax(-1) == batch.masked_labels).sum())
        right_orders += int((logits.sop.argmax(-1) == batch.swapped).sum())
        masked += len(batch.masked_labels)
        pairs += batch.size
    return HeldoutScores(
        mlm_loss=mlm_loss / masked,
        mlm_accuracy=right_tokens / masked,
        sop_loss=sop_loss / pairs,
        sop_accuracy=right_orders / pairs,
        masked=masked,
        pairs=pairs,
    )


def heldout_loss(model: AlbertForPreTraining, batches: Sequence[Batch]) -> float:
    """Mean loss of guessing the masked tokens, nats per token, over all batches."""
    return measure_heldout(model, batches).mlm_loss


@dataclass(frozen=True)
class FilledMask:
    sentence: str  # with one word replaced by [MASK]
    word: str  # the word that stood there
    guesses: list[str]  # best first


def fill_masks(model_folder: Path, sentences: Sequence[str], guesses: int = 3) -> list[FilledMask]:
    """Mask the middle word of each sentence and let the exported model guess, by plain `transformers`."""
    with quiet_transformers():
        fill = pipeline("fill-mask", model=str(model_folder), top_k=guesses)
        filled = []
        for sentence in sentences:
            words = sentence.split()
            middle = len(words) // 2
            word, words[middle] = words[middle], fill.tokenizer.mask_token
            masked = " ".join(words)
            filled.append(FilledMask(masked, word, [guess["token_str"].strip() for guess in fill(masked)]))
        return filled


def word_pieces(tokenizer: Tokenizer) -> dict[int, str]:
    """The words that are one piece of the tokenizer, by its id: what can stand in a blank by itself."""
    return {
        number: piece.removeprefix(_WORD_MARK)
        for piece, number in tokenizer.get_vocab().items()
        # of a letter alone one cannot tell whether it is a word
        if piece.startswith(_WORD_MARK) and len(piece) > 2 and any(map(str.isalpha, piece))
    }


@torch.inference_mode()
def fill_blanks(
    model: AlbertForPreTraining, tokenizer: Tokenizer, sentences: Sequence[str], guesses: int = 3
) -> list[list[tuple[str, float]]]:
    """What the model puts into the one blank of each sentence: words, likeliest first, with their probabilities.

    Only words of one piece are candidates (`word_pieces`); the probabilities are those among all pieces.

    :param sentences: each with a `BLANK`
    """
    model.eval()
    words = word_pieces(tokenizer)
    candidates = torch.tensor(sorted(words))
    filled: list[list[tuple[str, float]]] = []
    for sentence in sentences:
        ids = tokenizer.encode(sentence.replace(BLANK, SPECIAL_TOKENS[MASK_ID])).ids
        ids = ids[: model.config.max_position_embeddings]
        if MASK_ID not in ids or not len(candidates):
            filled.append([])
            continue
        hidden_LH = model.albert(input_ids=torch.tensor([ids])).last_hidden_state[0]
        logits_V = model.predictions(hidden_LH[ids.index(MASK_ID)]).float()
        best = logits_V.softmax(-1)[candidates].topk(min(guesses, len(candidates)))
        filled.append(
            [
                (words[int(candidates[index])], probability)
                for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        )
    return filled


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no remark that fill-mask leaves the sentence order head unused."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(verbosity)
