"""Where text comes from: the sources of a run spec as normalised documents, some of them held out for measuring."""

import hashlib
import importlib.util
import json
import random
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kantha.corpus.normalize import normalize
from kantha.errors import CorpusError, MissingPackageError
from kantha.spec import FileSource, HuggingFaceSource, ShobdoSource, Source

_T = TypeVar("_T")


def read_documents(source: Source, language: str, seed: int | None = None, buffer: int = 1) -> Iterator[str]:
    """Yield the documents of a source once, normalised, sentences as they come; empty documents are left out.

    Without `seed` they come in the source's own order. With it they are shuffled: a dictionary or a file wholly, a
    streamed dataset by its shards and within `buffer` documents. The same seed gives the same order.

    Raises `CorpusError` for text that is missing, unreadable or malformed, `MissingPackageError` if the source needs a
    package that is not installed; both only when the first documents are asked for.
    """
    match source:
        case ShobdoSource():
            texts = _shobdo_texts(seed)
        case FileSource():
            texts = _file_texts(source, seed)
        case HuggingFaceSource():
            texts = _huggingface_texts(source, seed, buffer)
    for text in texts:
        if document := normalize(text, language):
            yield document


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


def _order(count: int, seed: int | None) -> Iterable[int]:
    return range(count) if seed is None else np.random.default_rng(seed).permutation(count)


def _shobdo_texts(seed: int | None) -> Iterator[str]:
    package = importlib.util.find_spec("shobdo")  # importing it would load the whole dictionary
    if package is None or package.origin is None:
        raise MissingPackageError("the dictionary `shobdo` is not installed; run: pip install shobdo")
    path = Path(package.origin).parent / "data" / "dictionary.db"
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        try:
            entries = connection.execute("SELECT meanings, examples FROM words ORDER BY id").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise CorpusError(
            f"{path}: cannot be read ({error}); run: pip install --force-reinstall --no-deps shobdo"
        ) from None
    for index in _order(len(entries), seed):
        meanings, examples = entries[index]
        yield "\n".join(json.loads(meanings) + json.loads(examples))


def _file_texts(source: FileSource, seed: int | None) -> Iterator[str]:
    path = Path(source.path)
    if path.suffix not in (".txt", ".jsonl"):
        raise CorpusError(
            f"{path}: unknown kind of file; name a .txt (a document a line) or a .jsonl (a record a document)"
        )
    try:
        with path.open("rb") as file:
            starts = np.fromiter(accumulate(map(len, file), initial=0), np.int64)[:-1]
            for index in _order(len(starts), seed):
                file.seek(starts[index])
                line = file.readline()
                try:
                    text = line.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{path}: line {index + 1}: byte {starts[index] + error.start} of the file is not UTF-8; "
                        "convert the file with `iconv -t UTF-8`"
                    ) from None
                if path.suffix == ".jsonl" and text.strip():
                    text = _json_text(text, source.text_field, f"{path}: line {index + 1}")
                yield text
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); check `path` in the run spec") from None


def _json_text(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}); a .jsonl file has one JSON object a line"
        ) from None
    if not isinstance(record, dict):
        raise CorpusError(f"{place}: not a JSON object; a .jsonl file has one JSON object a line")
    return _text_of(record, field, place)


def _text_of(record: Mapping[str, Any], field: str, place: str) -> str:
    text = record.get(field, record)
    if text is None:  # datasets have null where a text is missing
        return ""
    if not isinstance(text, str):
        names = ", ".join(map(repr, record))
        raise CorpusError(f"{place}: no text in field {field!r} (fields: {names}); set `text_field` in the run spec")
    return text


def _huggingface_texts(source: HuggingFaceSource, seed: int | None, buffer: int) -> Iterator[str]:
    import datasets  # slow to import, and a run on local text does without
    from huggingface_hub.errors import HTTPError  # of whichever HTTP client the hub's library is built on

    place = name_of(source)
    try:
        dataset = datasets.load_dataset(
            source.name, source.config, split=source.split, revision=source.revision, streaming=True
        )
        if seed is not None:
            dataset = dataset.shuffle(seed=seed, buffer_size=buffer)
        for record in dataset:
            yield _text_of(record, source.text_field, place)
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
