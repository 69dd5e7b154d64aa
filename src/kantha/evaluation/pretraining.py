"""How well the model does what it was pretrained for, on text that it has not seen: masked tokens, sentence order."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AlbertForPreTraining

from kantha.corpus import SPECIAL_TOKENS, Batch, heldout_batches
from kantha.errors import RunDirectoryError
from kantha.evaluation.finetune import load_config, load_model, load_tokenizer_for
from kantha.evaluation.results import Score
from kantha.model import Logits, pretraining_logits
from kantha.spec import DataSpec, FileSource, Masking, ModelSpec, RunSpec
from kantha.training import choose_device

_EXAMPLES, _BATCH = 1000, 32


def text_spec(text: Path, model: str, run: RunSpec | None) -> RunSpec:
    """A spec by which all of a .txt or .jsonl file is held out; the rest is the run's, or fits the model.

    Raises `RunDirectoryError` where there is no such model.
    """
    if run is None:
        _, positions = load_tokenizer_for(model)
        data = DataSpec(sources=(FileSource(kind="file", path=str(text)),), sequence_length=positions)
        run = RunSpec(name="evaluation", model=ModelSpec(max_positions=positions), data=data)
    else:
        data = run.data.model_copy(update={"sources": (FileSource(kind="file", path=str(text)),)})
    # a run that trains may not hold out all of its text, but this one does not train
    return run.model_copy(update={"data": data.model_copy(update={"heldout_share": 1.0})})


class PretrainingTest:
    """An ALBERT on up to 1000 held-out examples of a spec; `mlm` and `sop` measure it."""

    def __init__(self, model: str, spec: RunSpec) -> None:
        """`model` is a model folder or hub name.

        Raises `RunDirectoryError` where there is no such model, it is no ALBERT, or its special tokens are not those
        that examples are made with; `CorpusError` where no text is held out, and what `read_documents` raises.
        """
        config = load_config(model)
        tokenizer, _ = load_tokenizer_for(model)
        first = tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS))))
        if config.model_type != "albert" or first != list(SPECIAL_TOKENS):
            raise RunDirectoryError(
                f"{model}: mlm and sop are for an ALBERT whose first tokens are {' '.join(SPECIAL_TOKENS)}; "
                "topic and ner take other models"
            )
        if "AlbertForPreTraining" not in (config.architectures or ()):  # what is missing would be drawn by chance
            raise RunDirectoryError(f"{model}: is not an AlbertForPreTraining, with both heads; topic and ner take it")
        pieces = tokenizer.backend_tokenizer
        pieces.no_truncation()  # examples are cut from whole documents
        pieces.no_padding()
        self._batches = _heldout_by_masking(spec, pieces)
        self._network = load_model(AlbertForPreTraining, model, seed=0).to(choose_device()).eval()

    @property
    def masked(self) -> int:
        """How many tokens are masked."""
        return len(_values(self._any_batches, "masked_labels"))

    @property
    def pairs(self) -> int:
        """How many pairs of segments there are, the wrong way round or not."""
        return len(_values(self._any_batches, "swapped"))

    def mlm(self, on_progress: Callable[[str, float], None]) -> Iterator[Score]:
        """Yield `loss`, in nats a masked token, and `accuracy` for every kind of masking, then a baseline."""
        for masking, batches in self._batches.items():
            loss, right, masked = 0.0, 0, 0
            for logits, batch in self._read(batches, f"mlm: {masking}", on_progress):
                loss += F.cross_entropy(logits.mlm, batch.masked_labels, reduction="sum").item()
                right += int((logits.mlm.argmax(-1) == batch.masked_labels).sum())
                masked += len(batch.masked_labels)
            yield Score(masking, {"loss": loss / masked, "accuracy": right / masked})
        labels = _values(self._any_batches, "masked_labels")
        yield Score("always the most frequent token", {"accuracy": _largest_share(labels)})

    def sop(self, on_progress: Callable[[str, float], None]) -> Iterator[Score]:
        """Yield the `accuracy` of telling whether two segments are in their order, then a baseline."""
        right = 0
        for logits, batch in self._read(self._any_batches, "sop", on_progress):
            right += int((logits.sop.argmax(-1) == batch.swapped).sum())
        yield Score("as pretrained", {"accuracy": right / self.pairs})
        orders = _values(self._any_batches, "swapped")
        yield Score("always the more frequent order", {"accuracy": _largest_share(orders)})

    @property
    def _any_batches(self) -> list[Batch]:
        return next(iter(self._batches.values()))

    @torch.no_grad()
    def _read(
        self, batches: Sequence[Batch], what: str, on_progress: Callable[[str, float], None]
    ) -> Iterator[tuple[Logits, Batch]]:
        for done, batch in enumerate(batches, 1):
            here = batch.to(self._network.device)
            yield pretraining_logits(self._network, here), here
            on_progress(what, done / len(batches))


def _heldout_by_masking(spec: RunSpec, tokenizer: Tokenizer) -> dict[str, list[Batch]]:
    kinds: dict[str, Masking] = {
        "single tokens masked": "token",
        "whole words masked": "word",
        "runs of one to three words masked": "ngram",
    }
    return {name: heldout_batches(spec, tokenizer, _EXAMPLES, _BATCH, kind) for name, kind in kinds.items()}


def _values(batches: Sequence[Batch], field: str) -> list[int]:
    return [value for batch in batches for value in getattr(batch, field).tolist()]


def _largest_share(values: Sequence[int]) -> float:
    return max(Counter(values).values()) / len(values)
