"""Training examples: masked tokens and sentence order (Lan et al. 2020, arXiv 1909.11942, sections 3.1 and 4.6)."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import accumulate, chain, islice

import numpy as np
import torch
from tokenizers import Tokenizer

from kantha.corpus.normalize import split_sentences
from kantha.corpus.sources import is_heldout, mix, name_of, read_documents
from kantha.corpus.tokenizer import CLS_ID, MASK_ID, PAD_ID, SEP_ID, SPECIAL_TOKENS
from kantha.errors import CorpusError
from kantha.spec import RunSpec, Source

_FEWEST_TOKENS = 8  # of both segments together; less text teaches neither masked tokens nor sentence order
_DOCUMENTS_AT_ONCE = 32  # tokenized together, which is faster, and their examples shuffled together
_LENGTH_STEP = 8  # batches are padded to a multiple of it, which matrix units like


@dataclass(frozen=True)
class Batch:
    """B examples of at most L tokens, with M masked tokens in all; every tensor is int64."""

    input_ids: torch.Tensor
    """[B, L] token ids, `[CLS] A [SEP] B [SEP]` with some tokens masked, then padding."""
    attention_mask: torch.Tensor
    """[B, L] 1 for a token, 0 for padding."""
    token_type_ids: torch.Tensor
    """[B, L] 0 for `[CLS] A [SEP]` and padding, 1 for `B [SEP]`."""
    masked_positions: torch.Tensor
    """[M] where the masked tokens are in the flattened input_ids, 0 to B*L - 1, ascending."""
    masked_labels: torch.Tensor
    """[M] the tokens that were there."""
    swapped: torch.Tensor
    """[B] 1 if B came before A in the text, else 0."""

    @property
    def size(self) -> int:
        """How many examples there are."""
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class _Pair:
    first: list[int]
    second: list[int]
    swapped: bool


class ExampleStream:
    """The training examples of one peer, without end: epoch after epoch, each in another order.

    Held-out documents never appear. Sources are mixed by their weights, counted in examples. The order depends on the
    spec's seed and on `peer_seed` (an integer, not negative), not on the sizes of the batches.
    """

    def __init__(self, spec: RunSpec, tokenizer: Tokenizer, peer_seed: int) -> None:
        order, self._chance = np.random.default_rng([spec.seed, peer_seed]).spawn(2)
        sources = spec.data.sources
        self._pairs = mix(
            [_endless_pairs(spec, source, tokenizer, chance) for source, chance in _with_chance(sources, order)],
            [source.weight for source in sources],
            int(order.integers(2**63)),
        )
        self._spec = spec
        self._pieces = tokenizer.get_vocab_size()

    def next_batch(self, size: int) -> Batch:
        """Return the next `size` examples, padded to the longest of them.

        Raises `CorpusError` if a source cannot be read or has no usable document, `MissingPackageError` if it needs a
        package that is not installed. After an error the stream is over; a new one starts afresh.
        """
        return _collate(list(islice(self._pairs, size)), self._spec, self._pieces, self._chance)


def heldout_batches(spec: RunSpec, tokenizer: Tokenizer, examples: int, batch_size: int) -> list[Batch]:
    """Return up to `examples` examples of held-out documents, `batch_size` in a batch, the same on every machine.

    They are drawn from the whole of a local source; of a streamed one as much is read as it takes to find them.
    Raises `CorpusError` if there is none, and what `read_documents` raises.
    """
    chance = np.random.default_rng(spec.seed)
    sources = spec.data.sources
    parts = [
        _pairs(_heldout_documents(spec, source), spec, tokenizer, part)
        for source, part in _with_chance(sources, chance)
    ]
    pairs = list(islice(mix(parts, [source.weight for source in sources], spec.seed), examples))
    if not pairs:
        raise CorpusError(
            f"no held-out document gives an example of {_FEWEST_TOKENS} tokens or more; add text to `data.sources` "
            "or raise `data.heldout_share` in the run spec"
        )
    pieces = tokenizer.get_vocab_size()
    return [_collate(pairs[i : i + batch_size], spec, pieces, chance) for i in range(0, len(pairs), batch_size)]


def heldout_sentences(spec: RunSpec, count: int) -> list[str]:
    """Return up to `count` held-out sentences that read well, at most one a document, the same on every machine.

    They are whole (they end with a terminator), have 25 to 90 characters and at least four words.
    """
    sources = spec.data.sources
    parts = [_heldout_documents(spec, source) for source in sources]
    sentences: list[str] = []
    for document in mix(parts, [source.weight for source in sources], spec.seed):
        if len(sentences) == count:
            break
        readable = [s for s in split_sentences(document, spec.language) if _reads_well(s) and s not in sentences]
        sentences += readable[-1:]  # a dictionary has its example sentences last
    return sentences


def _reads_well(sentence: str) -> bool:
    return 25 <= len(sentence) <= 90 and len(sentence.split()) >= 4 and sentence.endswith((".", "।", "?", "!"))


def _with_chance(
    sources: tuple[Source, ...], chance: np.random.Generator
) -> Iterator[tuple[Source, np.random.Generator]]:
    return zip(sources, chance.spawn(len(sources)), strict=True)


def _heldout_documents(spec: RunSpec, source: Source) -> Iterator[str]:
    for document in read_documents(source, spec.language, spec.seed):
        if is_heldout(document, spec.data.heldout_share):
            yield document


def _endless_pairs(spec: RunSpec, source: Source, tokenizer: Tokenizer, chance: np.random.Generator) -> Iterator[_Pair]:
    while True:
        documents = read_documents(source, spec.language, int(chance.integers(2**63)), spec.data.shuffle_buffer)
        training = (document for document in documents if not is_heldout(document, spec.data.heldout_share))
        usable = False
        for pair in _pairs(training, spec, tokenizer, chance):
            usable = True
            yield pair
        if not usable:
            raise CorpusError(
                f"{name_of(source)}: no document gives an example of {_FEWEST_TOKENS} tokens or more; add text, "
                "or take the source out of the run spec"
            )


def _pairs(
    documents: Iterator[str], spec: RunSpec, tokenizer: Tokenizer, chance: np.random.Generator
) -> Iterator[_Pair]:
    while some := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        split = [split_sentences(document, spec.language) for document in some]
        encoded = iter(tokenizer.encode_batch_fast(list(chain.from_iterable(split)), add_special_tokens=False))
        pairs: list[_Pair] = []
        for sentences in split:
            pairs += _cut([next(encoded).ids for _ in sentences], spec, chance)
        for index in chance.permutation(len(pairs)):  # or the examples of a long document would share a batch
            yield pairs[index]


def _cut(sentences: list[list[int]], spec: RunSpec, chance: np.random.Generator) -> Iterator[_Pair]:
    """Cut the token ids of a document's sentences into pairs, one after the other, each as long as the room allows.

    A pair ends with a sentence unless half the room would stay empty; the border between its segments is one of its
    sentence borders by chance, or the middle where there is none.
    """
    room = spec.data.sequence_length - 3  # [CLS] and twice [SEP]
    tokens = list(chain.from_iterable(sentences))
    borders = list(accumulate(map(len, sentences)))
    start = 0
    while len(tokens) - start >= _FEWEST_TOKENS:
        limit = min(start + room, len(tokens))
        inside = borders[bisect_right(borders, start) : bisect_right(borders, limit)]
        end = inside[-1] if len(inside) > 1 and inside[-1] - start > room // 2 else limit
        candidates = [border for border in inside if border < end]
        border = candidates[chance.integers(len(candidates))] if candidates else (start + end) // 2
        first, second = tokens[start:border], tokens[border:end]
        swapped = bool(chance.random() < spec.objective.swapped_share)
        yield _Pair(second, first, True) if swapped else _Pair(first, second, False)
        start = end


def _collate(pairs: list[_Pair], spec: RunSpec, pieces: int, chance: np.random.Generator) -> Batch:
    rows = [[CLS_ID, *pair.first, SEP_ID, *pair.second, SEP_ID] for pair in pairs]
    longest = max(map(len, rows))
    width = min(spec.data.sequence_length, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
    ids = np.full((len(rows), width), PAD_ID, np.int64)
    attention, segments = np.zeros_like(ids), np.zeros_like(ids)
    for i, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        ids[i, : len(row)] = row
        attention[i, : len(row)] = 1
        segments[i, len(pair.first) + 2 : len(row)] = 1
    masked = _choose_masked(ids, spec.objective.masked_share, chance)
    labels = ids[masked]
    kind = chance.random(len(labels))
    replacement = np.where(kind < 0.9, chance.integers(len(SPECIAL_TOKENS), pieces, len(labels)), labels)
    ids[masked] = np.where(kind < 0.8, MASK_ID, replacement)
    arrays = (
        ids,
        attention,
        segments,
        np.flatnonzero(masked),
        labels,
        np.array([pair.swapped for pair in pairs], np.int64),
    )
    return Batch(*map(torch.from_numpy, arrays))


def _choose_masked(ids: np.ndarray, share: float, chance: np.random.Generator) -> np.ndarray:
    """[B, L] bool: in each row `share` of the tokens that are not special, on average, and at least one."""
    ordinary = ids >= len(SPECIAL_TOKENS)
    wanted = np.maximum(1, np.floor(share * ordinary.sum(axis=1) + chance.random(len(ids))).astype(np.int64))
    scores = np.where(ordinary, chance.random(ids.shape), 2.0)
    last = np.sort(scores, axis=1)[np.arange(len(ids)), wanted - 1]
    return ordinary & (scores <= last[:, None])
