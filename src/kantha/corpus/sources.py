"""Where text comes from: the sources of a run spec, in shards that every peer walks through in an order of its own."""

import hashlib
import importlib.util
import json
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kantha.corpus.normalize import normalize
from kantha.errors import CorpusError, MissingPackageError
from kantha.spec import FileSource, HuggingFaceSource, ShobdoSource, Source

_T = TypeVar("_T")
_ENTRIES = 64  # of the dictionary in a shard
_BYTES = 2**16  # of a file in a shard
_FIRST_BLOCK = 256  # texts; the first blocks are small, so that training begins before the whole buffer is downloaded


@dataclass(frozen=True)
class Shards:
    """A source in pieces that can be read in any order; together they are the source, once."""

    count: int
    read: Callable[[int], Iterator[str]]  # raw texts of a shard, in the source's own order


@dataclass(frozen=True)
class Place:
    """Where a walk is: so many texts of a shard are read, in the order of an epoch."""

    epoch: int = 0
    shard: int = 0
    texts: int = 0
    block: int = 0  # blocks made since the beginning


class Walk:
    """One peer's way through a source without end: epoch after epoch, the shards each time in another order.

    The order follows from `seeds` alone. Memory holds one block of at most `buffer` texts, whatever the source's size.
    """

    def __init__(self, shards: Shards, seeds: Sequence[int], buffer: int, place: Place = Place()) -> None:
        self._shards, self._seeds, self._buffer = shards, list(seeds), buffer
        self._at = self.place = place
        self._texts = self._read()

    def block(self) -> list[str]:
        """The next texts of an epoch, shuffled; `place` is where the next block begins then. [] if there is no text."""
        number = self.place.block
        size = min(self._buffer, _FIRST_BLOCK << min(number, 32))
        texts: list[str] = []
        for text in self._texts:
            if text is not None:
                texts.append(text)
            if len(texts) == size or (text is None and texts):
                break
        self.place = replace(self._at, block=number + 1)
        order = np.random.default_rng([*self._seeds, 1, number]).permutation(len(texts))
        return [texts[index] for index in order]

    def _read(self) -> Iterator[str | None]:
        """The texts, and None at the end of an epoch. Ends after an epoch without any."""
        epoch, first, skip = self._at.epoch, self._at.shard, self._at.texts
        found = first > 0 or skip > 0
        while True:
            order = np.random.default_rng([*self._seeds, 0, epoch]).permutation(self._shards.count)
            for position in range(first, self._shards.count):
                for number, text in enumerate(self._shards.read(int(order[position])), 1):
                    if number > skip:
                        found = True
                        self._at = Place(epoch, position, number)
                        yield text
                skip = 0
            if not found:
                return
            epoch, first, found = epoch + 1, 0, False
            self._at = Place(epoch)
            yield None


def open_source(source: Source) -> Shards:
    """Raises `CorpusError` for text that is missing or unreadable, `MissingPackageError` if the source needs a package
    that is not installed. Reading a shard raises `CorpusError` for text that is unreadable or malformed."""
    match source:
        case ShobdoSource():
            return _shobdo_shards()
        case FileSource():
            return _file_shards(source)
        case HuggingFaceSource():
            return _huggingface_shards(source)


def read_documents(source: Source, language: str, seed: int | None = None, buffer: int = 10_000) -> Iterator[str]:
    """Yield the documents of a source once, normalised, sentences as they come; empty documents are left out.

    Without `seed` they come in the source's own order, with it shuffled: the shards, and within `buffer` documents.

    Raises what `open_source` does, when the first documents are asked for.
    """
    shards = open_source(source)
    for text in _once(shards, seed, buffer):
        if document := normalize(text, language):
            yield document


def _once(shards: Shards, seed: int | None, buffer: int) -> Iterator[str]:
    if seed is None:
        for index in range(shards.count):
            yield from shards.read(index)
        return
    chance = np.random.default_rng(seed)
    texts = chain.from_iterable(shards.read(int(index)) for index in chance.permutation(shards.count))
    while block := list(islice(texts, buffer)):
        for index in chance.permutation(len(block)):
            yield block[index]


def name_of(source: Source) -> str:
    """How messages call a source."""
    match source:
        case ShobdoSource():
            return "dictionary shobdo"
        case FileSource():
            return source.path
        case HuggingFaceSource():
            return f"dataset {source.name}"


def is_heldout(document: str, share: float) -> bool:
    """Whether a normalised document is kept for measuring: the `share` of all texts with the lowest BLAKE2b hashes.

    The answer depends on the text alone, so that it is the same for every peer and every order of the documents.
    """
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def mix(parts: Iterable[Iterator[_T]], weights: Sequence[float], seed: int) -> Iterator[_T]:
    """Draw from iterators in proportion to their weights; an exhausted one drops out, until none is left."""
    chance = random.Random(seed)
    live = list(zip(parts, weights, strict=True))
    while live:
        [choice] = chance.choices(live, [weight for _, weight in live])
        try:
            item = next(choice[0])
        except StopIteration:
            live.remove(choice)
        else:
            yield item


def _shobdo_shards() -> Shards:
    package = importlib.util.find_spec("shobdo")  # importing it would load the whole dictionary
    if package is None or package.origin is None:
        raise MissingPackageError("the dictionary `shobdo` is not installed; run: pip install shobdo")
    path = Path(package.origin).parent / "data" / "dictionary.db"

    def query(statement: str, *values: int) -> list[tuple[Any, ...]]:
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise CorpusError(
                f"{path}: cannot be read ({error}); run: pip install --force-reinstall --no-deps shobdo"
            ) from None

    def read(index: int) -> Iterator[str]:
        rows = query(
            "SELECT meanings, examples FROM words WHERE id > ? AND id <= ? ORDER BY id",
            index * _ENTRIES,
            (index + 1) * _ENTRIES,
        )
        lists = iter(json.loads(f"[{','.join(chain.from_iterable(rows))}]"))
        for meanings, examples in zip(lists, lists, strict=True):
            yield "\n".join(meanings + examples)

    [(last,)] = query("SELECT max(id) FROM words")
    return Shards(-(-last // _ENTRIES), read)


def _file_shards(source: FileSource) -> Shards:
    """Shards are ranges of bytes, so that a file of any size is opened at once; a line belongs to where it begins."""
    path = Path(source.path)
    if path.suffix not in (".txt", ".jsonl"):
        raise CorpusError(
            f"{path}: unknown kind of file; name a .txt (a document a line) or a .jsonl (a record a document)"
        )

    def read(index: int) -> Iterator[str]:
        position, end = index * _BYTES, (index + 1) * _BYTES
        try:
            with path.open("rb") as file:
                if position > 0:
                    file.seek(position - 1)
                    position += len(file.readline()) - 1
                while position < end and (line := file.readline()):
                    yield _line_text(source, line, position)
                    position += len(line)
        except OSError as error:
            raise _unreadable(path, error) from None

    try:
        size = path.stat().st_size
        path.open("rb").close()
    except OSError as error:
        raise _unreadable(path, error) from None
    return Shards(-(-size // _BYTES), read)


def _unreadable(path: Path, error: OSError) -> CorpusError:
    return CorpusError(f"{path}: cannot be read ({error.strerror}); check `path` in the run spec")


def _line_text(source: FileSource, line: bytes, position: int) -> str:
    path = Path(source.path)

    def place() -> str:
        with path.open("rb") as file:
            before = sum(file.read(min(_BYTES, position - at)).count(b"\n") for at in range(0, position, _BYTES))
        return f"{path}: line {before + 1}"

    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{place()}: byte {position + error.start} of the file is not UTF-8; convert the file with `iconv -t UTF-8`"
        ) from None
    if path.suffix != ".jsonl" or not text.strip():
        return text
    return _json_text(text, source.text_field, place)


def _json_text(line: str, field: str, place: Callable[[], str]) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{place()}: not valid JSON ({error.msg}, column {error.colno}); a .jsonl file has one JSON object a line"
        ) from None
    if not isinstance(record, dict):
        raise CorpusError(f"{place()}: not a JSON object; a .jsonl file has one JSON object a line")
    return _text_of(record, field, place)


def _text_of(record: Mapping[str, Any], field: str, place: Callable[[], str]) -> str:
    text = record.get(field, record)
    if text is None:  # datasets have null where a text is missing
        return ""
    if not isinstance(text, str):
        names = ", ".join(map(repr, record))
        raise CorpusError(f"{place()}: no text in field {field!r} (fields: {names}); set `text_field` in the run spec")
    return text


def _huggingface_shards(source: HuggingFaceSource) -> Shards:
    import datasets  # slow to import, and a run on local text does without

    place = name_of(source)
    with _hub_errors(place):
        dataset = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=True
        ).reshard()  # a Parquet file into its row groups: or all peers would begin with the same few files

    def read(index: int) -> Iterator[str]:
        with _hub_errors(place):
            for record in dataset.shard(dataset.num_shards, index):
                yield _text_of(record, source.text_field, lambda: place)

    return Shards(dataset.num_shards, read)


@contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    import datasets
    from huggingface_hub.errors import HTTPError  # of whichever HTTP client the hub's library is built on

    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise CorpusError(
            f"{place}: {_one_line(error)} Check `name`, `config` and `revision` in the run spec; "
            "for a private or gated dataset run `hf auth login`"
        ) from None
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        raise CorpusError(
            f"{place}: {_one_line(error)} Check `config`, `split` and `revision` in the run spec"
        ) from None
    except (OSError, HTTPError) as error:
        raise CorpusError(
            f"{place}: {_one_line(error)} Check the name in the run spec and the connection to huggingface.co, "
            "then try again"
        ) from None


def _one_line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return first.rstrip(".") + "."
