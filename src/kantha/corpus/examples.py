"""Training examples: masked tokens and sentence order (Lan et al. 2020, arXiv 1909.11942, sections 3.1 and 4.6).

text → documents → sentences → ids, each word tokenized once → pairs of segments → windows of pairs, masked at once and
ordered by length → batches. A stream knows its place in all of this as a few numbers, and goes on from there.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from kantha.corpus.encode import SentenceEncoder
from kantha.corpus.filters import DocumentFilter
from kantha.corpus.masking import Masker
from kantha.corpus.normalize import normalize, split_sentences
from kantha.corpus.sources import Place, Walk, is_heldout, mix, name_of, open_source, read_documents
from kantha.corpus.tokenizer import CLS_ID, PAD_ID, SEP_ID, UNK_ID
from kantha.errors import CorpusError
from kantha.spec import Masking, RunSpec, Source

_FEWEST_TOKENS = 8  # of both segments together; less text teaches neither masked tokens nor sentence order
_PAGE = 128  # documents that are tokenized together, and whose examples are shuffled together
_WINDOW = 512  # examples that are ordered by length together
_BUCKET = 32  # examples of like length that stay together; a smaller batch has less padding, a larger one more
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

    def split(self, most: int) -> list["Batch"]:
        """The same examples in the same order, in batches of at most `most`, padded as they were."""
        if self.size <= most:
            return [self]
        width = self.input_ids.shape[1]
        parts = []
        for start in range(0, self.size, most):
            rows = slice(start, start + most)
            begin, end = torch.searchsorted(
                self.masked_positions, torch.tensor([start * width, (start + most) * width])
            ).tolist()
            parts.append(
                Batch(
                    self.input_ids[rows],
                    self.attention_mask[rows],
                    self.token_type_ids[rows],
                    self.masked_positions[begin:end] - start * width,
                    self.masked_labels[begin:end],
                    self.swapped[rows],
                )
            )
        return parts


@dataclass(frozen=True)
class _Pair:
    first: np.ndarray
    second: np.ndarray
    swapped: bool


@dataclass(frozen=True)
class _Row:
    """One finished example of n tokens."""

    ids: np.ndarray  # [n] as the model sees them
    labels: np.ndarray  # [n] as they were
    masked: np.ndarray  # [n] bool
    first: int  # tokens of `[CLS] A [SEP]`
    swapped: bool


@dataclass
class Counts:
    """What a stream has made of its text so far."""

    documents: int = 0  # read; empty ones excepted
    heldout: int = 0  # of them
    dropped: Counter[str] = field(default_factory=Counter)  # of them, by the rule that drops them
    sentences: int = 0  # of the documents that train
    words: int = 0
    tokens: int = 0
    unknown: int = 0  # tokens
    short: int = 0  # tokens in rests of documents that are too short for an example


class ExampleStream:
    """The training examples of one peer, without end: epoch after epoch, each in another order.

    Held-out documents never appear. Sources are mixed by their weights, counted in examples. The order depends on the
    spec's seed and on `peer_seed` (an integer, not negative), not on the sizes of the batches: of a corpus of N
    examples two peers have about n²/N of their first n in common. A stream goes on where another was, by its `state`.

    Raises `CorpusError` if a source cannot be read, `MissingPackageError` if it needs a package that is not installed.
    """

    def __init__(self, spec: RunSpec, tokenizer: Tokenizer, peer_seed: int, state: object = None) -> None:
        """
        :param state: of a stream of the same spec and peer; None: from the beginning
        :raises ValueError: if `state` is none of a stream
        """
        self.counts = Counts()
        self._spec, self._seeds = spec, [spec.seed, peer_seed]
        encoder = SentenceEncoder(tokenizer)
        self._masker = Masker(tokenizer, spec.objective.masked_share, spec.objective.masking)
        self._weights = np.array([source.weight for source in spec.data.sources])
        self._rows: deque[_Row] = deque()
        self._windows: deque[tuple[dict[str, Any], int]] = deque()  # that rows are of: state before it, rows in it
        self._window, skip, places = _read_state(state, len(spec.data.sources))
        self._sources = [
            _SourcePairs(spec, source, encoder, [*self._seeds, index], self.counts, place)
            for index, (source, place) in enumerate(zip(spec.data.sources, places, strict=True))
        ]
        if skip:
            self._add_window()
            self._drop(skip)

    def next_batch(self, size: int) -> Batch:
        """Return the next `size` examples, padded to the longest of them.

        Raises `CorpusError` if a source cannot be read or has no usable document. After an error the stream is over.
        """
        while len(self._rows) < size:
            self._add_window()
        return _collate(self._drop(size), self._spec)

    def state(self) -> dict[str, Any]:
        """Where the next example comes from, as JSON has it. What filters of duplicates have seen is not in it."""
        if not self._windows:
            return self._state()
        state, rows = self._windows[0]
        later = sum(count for _, count in list(self._windows)[1:])
        return {**state, "taken": rows - (len(self._rows) - later)}

    def _state(self) -> dict[str, Any]:
        return {"window": self._window, "taken": 0, "sources": [source.place for source in self._sources]}

    def _add_window(self) -> None:
        state = self._state()
        chance = np.random.default_rng([*self._seeds, len(self._sources), self._window])
        counts = chance.multinomial(_WINDOW, self._weights / self._weights.sum())
        pairs = [pair for source, count in zip(self._sources, counts, strict=True) for pair in source.take(count)]
        self._rows += _by_length(_finish(pairs, self._masker, chance), chance)
        self._windows.append((state, len(pairs)))
        self._window += 1

    def _drop(self, count: int) -> list[_Row]:
        rows = [self._rows.popleft() for _ in range(count)]
        while self._windows and len(self._rows) <= sum(rows for _, rows in self._windows) - self._windows[0][1]:
            self._windows.popleft()
        return rows


def _read_state(state: object, sources: int) -> tuple[int, int, list[list[int]]]:
    if state is None:
        return 0, 0, [[0] * _SourcePairs.NUMBERS] * sources
    try:
        if not isinstance(state, Mapping):
            raise TypeError(type(state).__name__)
        window, taken, places = state["window"], state["taken"], state["sources"]
        numbers = [window, taken, *chain.from_iterable(places)]
        if len(places) != sources or len(numbers) != 2 + sources * _SourcePairs.NUMBERS or taken >= _WINDOW:
            raise ValueError("another number of sources")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("not all numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no state of a stream of examples: {error!r}") from None
    return window, taken, places


class _SourcePairs:
    """The pairs of one source, page after page, without end."""

    NUMBERS = 6  # of a place: where its block of texts begins (`Place`), page in the block, pairs taken of the page

    def __init__(
        self,
        spec: RunSpec,
        source: Source,
        encoder: SentenceEncoder,
        seeds: Sequence[int],
        counts: Counts,
        place: Sequence[int],
    ) -> None:
        self._spec, self._encoder, self._seeds, self._counts = spec, encoder, seeds, counts
        self._name = name_of(source)
        self._filter = DocumentFilter(spec.data.filters, spec.language)
        *begin, self._page, self._taken = place
        self._begin = Place(*begin)
        self._walk = Walk(open_source(source), seeds, spec.data.shuffle_buffer, self._begin)
        self._texts: list[str] | None = None
        self._pairs: list[_Pair] = []

    @property
    def place(self) -> list[int]:
        return [*astuple(self._begin), self._page, self._taken]

    def take(self, count: int) -> list[_Pair]:
        pairs: list[_Pair] = []
        if self._texts is None and count:
            self._texts = self._walk.block()
            self._pairs = self._read_page()
        epoch = self._begin.epoch
        while len(pairs) < count:
            if self._taken == len(self._pairs):
                self._turn_page()
                if not self._texts or self._begin.epoch > epoch + 1:
                    raise CorpusError(
                        f"{self._name}: no document gives an example of {_FEWEST_TOKENS} tokens or more; add text, "
                        "or take the source out of the run spec"
                    )
            else:
                some = self._pairs[self._taken : self._taken + count - len(pairs)]
                self._taken += len(some)
                pairs += some
                epoch = self._begin.epoch
        return pairs

    def _turn_page(self) -> None:
        assert self._texts is not None
        self._page, self._taken = self._page + 1, 0
        if self._page * _PAGE >= len(self._texts):
            self._page, self._begin = 0, self._walk.place
            self._texts = self._walk.block()
        self._pairs = self._read_page()

    def _read_page(self) -> list[_Pair]:
        assert self._texts is not None
        chance = np.random.default_rng([*self._seeds, 2, self._begin.block, self._page])
        documents = []
        for text in self._texts[self._page * _PAGE : (self._page + 1) * _PAGE]:
            if document := normalize(text, self._spec.language):
                self._counts.documents += 1
                if is_heldout(document, self._spec.data.heldout_share):
                    self._counts.heldout += 1
                elif reason := self._filter.objection(document):
                    self._counts.dropped[reason] += 1
                else:
                    documents.append(document)
        pairs = _pairs(documents, self._spec, self._encoder, chance, self._counts)
        return [pairs[index] for index in chance.permutation(len(pairs))]


def _pairs(
    documents: Sequence[str], spec: RunSpec, encoder: SentenceEncoder, chance: np.random.Generator, counts: Counts
) -> list[_Pair]:
    split = [split_sentences(document, spec.language) for document in documents]
    sentences = list(chain.from_iterable(split))
    ids, lengths = encoder.encode(sentences)
    borders = np.cumsum(lengths).tolist()
    pairs: list[_Pair] = []
    begin = sentence = 0
    for some in split:
        until = sentence + len(some)
        end = borders[until - 1] if some else begin
        pairs += _cut(ids, begin, end, borders[sentence:until], spec, chance, counts)
        begin, sentence = end, until
    counts.sentences += len(sentences)
    counts.words += sum(len(document.split()) for document in documents)
    counts.tokens += len(ids)
    counts.unknown += int((ids == UNK_ID).sum())
    return pairs


def _cut(
    ids: np.ndarray,
    start: int,
    stop: int,
    borders: list[int],
    spec: RunSpec,
    chance: np.random.Generator,
    counts: Counts,
) -> Iterator[_Pair]:
    """Cut the token ids from `start` to `stop`, a document's, into pairs, one after the other, each as long as the room
    allows.

    A pair ends with a sentence unless half the room would stay empty; the border between its segments is one of its
    sentence borders by chance, or the middle where there is none.
    """
    room = spec.data.sequence_length - 3  # [CLS] and twice [SEP]
    while stop - start >= _FEWEST_TOKENS:
        limit = min(start + room, stop)
        inside = borders[bisect_right(borders, start) : bisect_right(borders, limit)]
        end = inside[-1] if len(inside) > 1 and inside[-1] - start > room // 2 else limit
        candidates = [border for border in inside if border < end]
        border = candidates[int(chance.random() * len(candidates))] if candidates else (start + end) // 2
        first, second = ids[start:border], ids[border:end]
        swapped = chance.random() < spec.objective.swapped_share
        yield _Pair(second, first, True) if swapped else _Pair(first, second, False)
        start = end
    counts.short += stop - start


_CLS, _SEP = np.array([CLS_ID], np.int32), np.array([SEP_ID], np.int32)


def _finish(pairs: Sequence[_Pair], masker: Masker, chance: np.random.Generator) -> list[_Row]:
    """Masked and replaced, all at once."""
    labels = np.concatenate(list(chain.from_iterable((_CLS, pair.first, _SEP, pair.second, _SEP) for pair in pairs)))
    lengths = [len(pair.first) + len(pair.second) + 3 for pair in pairs]
    masked = masker.choose(labels, np.repeat(np.arange(len(pairs)), lengths), chance)
    ids = masker.replace(labels, masked, chance)
    rows = []
    for pair, length, end in zip(pairs, lengths, accumulate(lengths), strict=True):
        here = slice(end - length, end)
        rows.append(_Row(ids[here], labels[here], masked[here], len(pair.first) + 2, pair.swapped))
    return rows


def _by_length(rows: list[_Row], chance: np.random.Generator) -> Iterator[_Row]:
    """Buckets of rows of like length, in any order."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    for bucket in chance.permutation(-(-len(rows) // _BUCKET)):
        yield from rows[bucket * _BUCKET : (bucket + 1) * _BUCKET]


def _collate(rows: Sequence[_Row], spec: RunSpec) -> Batch:
    lengths = np.array([len(row.ids) for row in rows])
    width = min(spec.data.sequence_length, -(-int(lengths.max()) // _LENGTH_STEP) * _LENGTH_STEP)
    column = np.arange(width)
    inside = column < lengths[:, None]
    ids = np.full(inside.shape, PAD_ID, np.int64)
    ids[inside] = np.concatenate([row.ids for row in rows])
    masked = np.zeros_like(inside)
    masked[inside] = np.concatenate([row.masked for row in rows])
    second = inside & (column >= np.array([row.first for row in rows])[:, None])
    arrays = (
        ids,
        inside.astype(np.int64),
        second.astype(np.int64),
        np.flatnonzero(masked),
        np.concatenate([row.labels[row.masked] for row in rows]).astype(np.int64),
        np.array([row.swapped for row in rows], np.int64),
    )
    return Batch(*map(torch.from_numpy, arrays))


def heldout_batches(
    spec: RunSpec, tokenizer: Tokenizer, examples: int, batch_size: int, masking: Masking | None = None
) -> list[Batch]:
    """Return up to `examples` examples of held-out documents, `batch_size` in a batch, the same on every machine.

    They are drawn from the whole of a local source; of a streamed one as much is read as it takes to find them.
    Raises `CorpusError` if there is none, and what `read_documents` raises.

    :param masking: another kind than the run trains with
    """
    chance = np.random.default_rng(spec.seed)
    sources = spec.data.sources
    encoder = SentenceEncoder(tokenizer)
    parts = [
        _heldout_pairs(spec, source, encoder, part)
        for source, part in zip(sources, chance.spawn(len(sources)), strict=True)
    ]
    pairs = list(islice(mix(parts, [source.weight for source in sources], spec.seed), examples))
    if not pairs:
        raise CorpusError(
            f"no held-out document gives an example of {_FEWEST_TOKENS} tokens or more; add text to `data.sources` "
            "or raise `data.heldout_share` in the run spec"
        )
    masker = Masker(tokenizer, spec.objective.masked_share, masking or spec.objective.masking)
    rows = sorted(_finish(pairs, masker, chance), key=lambda row: len(row.ids))
    return [_collate(rows[i : i + batch_size], spec) for i in range(0, len(rows), batch_size)]


def heldout_sentences(spec: RunSpec, count: int) -> list[str]:
    """Return up to `count` held-out sentences that read well, at most one a document, the same on every machine.

    They are whole (they end with a terminator), have 25 to 90 characters and at least four words.
    """
    sources = spec.data.sources
    parts = [heldout_documents(spec, source) for source in sources]
    sentences: list[str] = []
    for document in mix(parts, [source.weight for source in sources], spec.seed):
        if len(sentences) == count:
            break
        readable = [s for s in split_sentences(document, spec.language) if _reads_well(s) and s not in sentences]
        sentences += readable[-1:]  # a dictionary has its example sentences last
    return sentences


def _reads_well(sentence: str) -> bool:
    return 25 <= len(sentence) <= 90 and len(sentence.split()) >= 4 and sentence.endswith((".", "।", "?", "!"))


def heldout_documents(spec: RunSpec, source: Source) -> Iterator[str]:
    """The normalised documents of a source that are kept for measuring. Raises what `read_documents` does."""
    drop = DocumentFilter(spec.data.filters, spec.language)
    for document in read_documents(source, spec.language, spec.seed, spec.data.shuffle_buffer):
        if is_heldout(document, spec.data.heldout_share) and not drop.objection(document):
            yield document


def _heldout_pairs(
    spec: RunSpec, source: Source, encoder: SentenceEncoder, chance: np.random.Generator
) -> Iterator[_Pair]:
    documents = heldout_documents(spec, source)
    while some := list(islice(documents, _PAGE)):
        yield from _pairs(some, spec, encoder, chance, Counts())
