"""Training examples: masked tokens and sentence order (Lan et al. 2020, arXiv 1909.11942, sections 3.1 and 4.6).

text → pages of documents → sentences → ids, each word tokenized once → pairs of segments → windows of pairs, masked at
once and ordered by length → batches. From the ids on everything is in flat arrays, one example after the other. A
stream knows its place in all of this as a few numbers, and goes on from there.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from kantha.corpus.encode import SentenceEncoder, ranges
from kantha.corpus.filters import DocumentFilter
from kantha.corpus.masking import Masker
from kantha.corpus.normalize import normalize, split_sentences
from kantha.corpus.sources import Place, Walk, is_heldout, mix, name_of, open_source, read_documents
from kantha.corpus.tokenizer import CLS_ID, PAD_ID, SEP_ID, UNK_ID
from kantha.errors import CorpusError
from kantha.spec import Masking, RunSpec, Source

_FEWEST_TOKENS = 8  # of both segments together; less text teaches neither masked tokens nor sentence order
_PAGE = 256  # documents that are tokenized together, and whose examples are shuffled together
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
class _Rows:
    """N examples, `[CLS] A [SEP] B [SEP]`, one after the other in flat arrays: T tokens in all."""

    ids: np.ndarray  # [T] as the model sees them; the labels until they are masked
    labels: np.ndarray  # [T] as the text has them
    masked: np.ndarray  # [T] bool
    ends: np.ndarray  # [N] where each example ends
    first: np.ndarray  # [N] tokens of its `[CLS] A [SEP]`
    swapped: np.ndarray  # [N] bool

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: slice) -> "_Rows":
        start, stop, _ = rows.indices(len(self))
        begin = self.ends[start - 1] if start else 0
        here, there = slice(begin, self.ends[stop - 1] if stop else 0), slice(start, stop)
        return _Rows(
            self.ids[here],
            self.labels[here],
            self.masked[here],
            self.ends[there] - begin,
            self.first[there],
            self.swapped[there],
        )

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def ordered(self, order: np.ndarray) -> "_Rows":
        lengths = self.lengths[order]
        tokens = ranges(self.ends[order] - lengths, lengths)
        return _Rows(
            self.ids[tokens],
            self.labels[tokens],
            self.masked[tokens],
            np.cumsum(lengths),
            self.first[order],
            self.swapped[order],
        )


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
        self._window, taken, places = _read_state(state, len(spec.data.sources))
        self._sources = [
            _SourcePairs(spec, source, encoder, [*self._seeds, index], self.counts, place)
            for index, (source, place) in enumerate(zip(spec.data.sources, places, strict=True))
        ]
        self._before: dict[str, Any] = {}  # the state before the window
        self._rows = self._next_window() if taken else None
        self._taken = taken  # rows of the window

    def next_batch(self, size: int) -> Batch:
        """Return the next `size` examples, padded to the longest of them.

        Raises `CorpusError` if a source cannot be read or has no usable document. After an error the stream is over.
        """
        parts: list[_Rows] = []
        while size:
            if self._rows is None:
                self._rows = self._next_window()
            part = self._rows[self._taken : self._taken + size]
            parts.append(part)
            size -= len(part)
            self._taken += len(part)
            if self._taken == len(self._rows):
                self._rows, self._taken = None, 0
        return _collate(_joined(parts), self._spec)

    def state(self) -> dict[str, Any]:
        """Where the next example comes from, as JSON has it. What filters of duplicates have seen is not in it."""
        return self._state() if self._rows is None else {**self._before, "taken": self._taken}

    def _state(self) -> dict[str, Any]:
        return {"window": self._window, "taken": 0, "sources": [source.place for source in self._sources]}

    def _next_window(self) -> _Rows:
        self._before = self._state()
        chance = np.random.default_rng([*self._seeds, len(self._sources), self._window])
        counts = chance.multinomial(_WINDOW, self._weights / self._weights.sum())
        parts = chain.from_iterable(source.take(count) for source, count in zip(self._sources, counts, strict=True))
        self._window += 1
        return _masked(_by_length(_joined(list(parts)), chance), self._masker, chance)


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
        self._pairs: _Rows  # of the page, shuffled; there as soon as the texts are

    @property
    def place(self) -> list[int]:
        return [*astuple(self._begin), self._page, self._taken]

    def take(self, count: int) -> list[_Rows]:
        """So many pairs, in parts."""
        parts: list[_Rows] = []
        if self._texts is None and count:
            self._texts = self._walk.block()
            self._pairs = self._read_page()
        epoch = self._begin.epoch
        while count:
            if self._taken == len(self._pairs):
                self._turn_page()
                if not self._texts or self._begin.epoch > epoch + 1:
                    raise CorpusError(
                        f"{self._name}: no document gives an example of {_FEWEST_TOKENS} tokens or more; add text, "
                        "or take the source out of the run spec"
                    )
            else:
                part = self._pairs[self._taken : self._taken + count]
                parts.append(part)
                self._taken += len(part)
                count -= len(part)
                epoch = self._begin.epoch
        return parts

    def _turn_page(self) -> None:
        assert self._texts is not None
        self._page, self._taken = self._page + 1, 0
        if self._page * _PAGE >= len(self._texts):
            self._page, self._begin = 0, self._walk.place
            self._texts = self._walk.block()
        self._pairs = self._read_page()

    def _read_page(self) -> _Rows:
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
        return pairs.ordered(chance.permutation(len(pairs)))


def _pairs(
    documents: Sequence[str], spec: RunSpec, encoder: SentenceEncoder, chance: np.random.Generator, counts: Counts
) -> _Rows:
    """The documents cut into pairs of segments, in the order of the text, as examples of which nothing is masked yet.

    The border between the segments of a pair is one of its sentence borders by chance, or the middle where there is
    none.
    """
    split = [split_sentences(document, spec.language) for document in documents]
    sentences = list(chain.from_iterable(split))
    ids, lengths = encoder.encode(sentences)
    edges = np.append(0, np.cumsum(lengths))  # where sentences begin and end
    last = np.cumsum([len(some) for some in split], dtype=np.int64)  # of a document's edges
    first = np.append(0, last)[:-1]
    room = spec.data.sequence_length - 3  # [CLS] and twice [SEP]
    size = edges[last] - edges[first]
    # where a pair starts and ends; from which edge on, and before which, the border is
    whole = np.stack([edges[first], edges[last], first + 1, last], 1)[(size >= _FEWEST_TOKENS) & (size <= room)]
    positions = edges.tolist()
    long = [cut for i in np.flatnonzero(size > room) for cut in _cut(positions, int(first[i]), int(last[i]), room)]
    cuts = np.concatenate([whole, np.array(long, np.int64).reshape(-1, 4)])
    start, end, low, high = cuts[np.argsort(cuts[:, 0])].T
    where, order = chance.random((2, len(cuts)))
    any_edge = np.minimum(low + (where * (high - low)).astype(np.int64), len(edges) - 1)
    border = np.where(low < high, edges[any_edge], (start + end) // 2)

    counts.sentences += len(sentences)
    counts.words += sum(sentence.count(" ") + 1 for sentence in sentences)
    counts.tokens += len(ids)
    counts.unknown += int((ids == UNK_ID).sum())
    counts.short += len(ids) - int((end - start).sum())
    return _with_special_tokens(ids, start, border, end, order < spec.objective.swapped_share)


def _cut(edges: list[int], first: int, last: int, room: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut the text between two edges into pairs, one after the other, each as long as the room allows.

    A pair ends with a sentence unless half the room would stay empty. Yields where it starts and ends, from which edge
    on, and before which, the border between its segments may be.
    """
    start, stop = edges[first], edges[last]
    while stop - start >= _FEWEST_TOKENS:
        limit = min(start + room, stop)
        low = bisect_right(edges, start, first, last + 1)
        high = bisect_right(edges, limit, low, last + 1)
        end = edges[high - 1] if high - low > 1 and edges[high - 1] - start > room // 2 else limit
        yield start, end, low, bisect_left(edges, end, low, high)
        start = end


def _with_special_tokens(
    ids: np.ndarray, start: np.ndarray, border: np.ndarray, end: np.ndarray, swapped: np.ndarray
) -> _Rows:
    """Pairs of segments, from `start` to `border` and from there to `end`, as examples."""
    begins, sizes = np.stack([start, border], 1), np.stack([border - start, end - border], 1)
    begins[swapped], sizes[swapped] = begins[swapped, ::-1], sizes[swapped, ::-1]
    first, second = sizes.T
    ends = np.cumsum(first + second + 3)
    labels = np.full(ends[-1] if len(ends) else 0, SEP_ID, np.int32)
    labels[ends - second - first - 3] = CLS_ID
    places = np.stack([ends - second - first - 2, ends - second - 1], 1)
    labels[ranges(places.ravel(), sizes.ravel())] = ids[ranges(begins.ravel(), sizes.ravel())]
    return _Rows(labels, labels, np.zeros(len(labels), bool), ends, first + 2, swapped)


def _joined(parts: Sequence[_Rows]) -> _Rows:
    if len(parts) == 1:
        return parts[0]
    before = accumulate((len(part.ids) for part in parts), initial=0)
    return _Rows(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.masked for part in parts]),
        np.concatenate([part.ends + tokens for part, tokens in zip(parts, before, strict=False)]),
        np.concatenate([part.first for part in parts]),
        np.concatenate([part.swapped for part in parts]),
    )


def _masked(rows: _Rows, masker: Masker, chance: np.random.Generator) -> _Rows:
    masked = masker.choose(rows.labels, np.repeat(np.arange(len(rows)), rows.lengths), chance)
    return replace(rows, ids=masker.replace(rows.labels, masked, chance), masked=masked)


def _by_length(rows: _Rows, chance: np.random.Generator) -> _Rows:
    """Buckets of rows of like length, in any order."""
    order = np.argsort(rows.lengths, kind="stable")
    buckets = chance.permutation(-(-len(rows) // _BUCKET))
    return rows.ordered(np.concatenate([order[bucket * _BUCKET : (bucket + 1) * _BUCKET] for bucket in buckets]))


def _collate(rows: _Rows, spec: RunSpec) -> Batch:
    lengths = rows.lengths
    width = min(spec.data.sequence_length, -(-int(lengths.max()) // _LENGTH_STEP) * _LENGTH_STEP)
    column = np.arange(width)
    inside = column < lengths[:, None]
    ids = np.full(inside.shape, PAD_ID, np.int64)
    ids[inside] = rows.ids
    arrays = (
        ids,
        inside.astype(np.int64),
        (inside & (column >= rows.first[:, None])).astype(np.int64),
        np.flatnonzero(inside)[rows.masked],
        rows.labels[rows.masked].astype(np.int64),
        rows.swapped.astype(np.int64),
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
    rows = list(islice(mix(parts, [source.weight for source in sources], spec.seed), examples))
    if not rows:
        raise CorpusError(
            f"no held-out document gives an example of {_FEWEST_TOKENS} tokens or more; add text to `data.sources` "
            "or raise `data.heldout_share` in the run spec"
        )
    masker = Masker(tokenizer, spec.objective.masked_share, masking or spec.objective.masking)
    pairs = _joined(rows)
    finished = _masked(pairs.ordered(np.argsort(pairs.lengths, kind="stable")), masker, chance)
    return [_collate(finished[i : i + batch_size], spec) for i in range(0, len(finished), batch_size)]


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
) -> Iterator[_Rows]:
    documents = heldout_documents(spec, source)
    while some := list(islice(documents, _PAGE)):
        pairs = _pairs(some, spec, encoder, chance, Counts())
        yield from (pairs[i : i + 1] for i in range(len(pairs)))
