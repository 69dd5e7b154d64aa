"""Measures on documents that no volunteer trains on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AlbertForPreTraining, pipeline
from transformers.utils import logging as transformers_logging

from kantha.corpus import Batch
from kantha.model import pretraining_losses


@torch.no_grad()
def heldout_loss(model: AlbertForPreTraining, batches: Sequence[Batch]) -> float:
    """Mean loss of guessing the masked tokens, nats per token, over all batches."""
    model.eval()
    total = tokens = 0.0
    for batch in batches:
        count = len(batch.masked_labels)
        total += pretraining_losses(model, batch).mlm.item() * count
        tokens += count
    return total / tokens


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
