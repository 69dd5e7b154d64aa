"""Labelled data: texts with a topic, sentences with entities; from local files or the Hugging Face hub."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from kantha.corpus import is_heldout, normalize
from kantha.errors import CorpusError

_DEV_SHARE = 0.1  # of the training data, where there is no dev data
_TAG = re.compile(r"O|[BI]-\S+")


class Text(NamedTuple):
    """A text, normalised, and its topic."""

    text: str
    topic: str


class Sentence(NamedTuple):
    """Words, normalised one by one, and their IOB2 tags: `O`, `B-PER`, `I-PER`, …"""

    words: tuple[str, ...]
    tags: tuple[str, ...]


T = TypeVar("T")  # Text or Sentence


@dataclass(frozen=True)
class Splits(Generic[T]):
    """A data set to learn from, to choose by, and to measure on."""

    name: str
    train: list[T]
    dev: list[T]
    test: list[T]
    notes: list[str]
    """What a reader of the figures has to know, a sentence each."""


class _Hub(NamedTuple):
    dataset: str
    config: str
    content: str  # the column of the text, or of the words
    label: str  # the column of the topic, or of the tags


_TOPICS = {
    "sib200": _Hub("Davlan/sib200", "ben_Beng", "text", "category"),
    "indicglue": _Hub("ai4bharat/indic_glue", "sna.bn", "text", "label"),
}
_ENTITIES = {"wikiann": _Hub("unimelb-nlp/wikiann", "bn", "tokens", "ner_tags")}


def load_topics(data: str, language: str) -> Splits[Text]:
    """Texts by topic: `sib200`, `indicglue` (both Bengali, from the hub), or two or three .jsonl files.

    Files are given as `TRAIN,TEST` or `TRAIN,DEV,TEST`; a record has the fields `text` and `label`. Without dev data
    a tenth of the training texts, chosen by their hashes, is kept for it. Test texts that are also learned from or
    chosen by are dropped. Raises `CorpusError`.
    """

    def from_file(path: Path) -> list[Text]:
        return [Text(normalize(text, language), topic) for text, topic in _jsonl(path)]

    def from_record(record: Any, hub: _Hub, name_of: Callable[[Any], str]) -> Text:
        return Text(normalize(record[hub.content], language), name_of(record[hub.label]))

    return _load(data, _TOPICS, ".jsonl", from_file, from_record, lambda example: example.text)


def load_entities(data: str, language: str) -> Splits[Sentence]:
    """Sentences with entities: `wikiann` (Bengali, from the hub), or two or three .conll files.

    Files are given as in `load_topics`; a line has a word and, as its last column, an IOB2 tag, and an empty line ends
    a sentence. A tag that is none of IOB2 counts as `O`, and a note says so. Raises `CorpusError`.
    """
    odd: Counter[str] = Counter()

    def sentence(words: list[str], tags: list[str]) -> Sentence:
        odd.update(tag for tag in tags if not _TAG.fullmatch(tag))
        return Sentence(
            # what is nothing but invisible characters stays what it was: every word has its tag
            tuple(" ".join(normalize(word, language).split()) or word for word in words),
            tuple(tag if _TAG.fullmatch(tag) else "O" for tag in tags),
        )

    def from_file(path: Path) -> list[Sentence]:
        return [sentence(words, tags) for words, tags in _conll(path)]

    def from_record(record: Any, hub: _Hub, name_of: Callable[[Any], str]) -> Sentence:
        return sentence(record[hub.content], [name_of(tag) for tag in record[hub.label]])

    splits = _load(data, _ENTITIES, ".conll", from_file, from_record, lambda example: " ".join(example.words))
    for tag, count in odd.most_common():
        splits.notes.append(f"{count:,} words have the tag {tag}, which begins with neither B- nor I-: taken as O")
    return splits


def _load(
    data: str,
    known: dict[str, _Hub],
    suffix: str,
    from_file: Callable[[Path], list[T]],
    from_record: Callable[[Any, _Hub, Callable[[Any], str]], T],
    key_of: Callable[[T], str],
) -> Splits[T]:
    if data in known:
        hub = known[data]
        parts = [_from_hub(hub, split, from_record) for split in ("train", "validation", "test")]
        name, where = data, f"dataset {hub.dataset}"
    else:
        paths = [Path(path) for path in data.split(",")]
        if not 2 <= len(paths) <= 3 or any(path.suffix != suffix for path in paths):
            raise CorpusError(
                f"{data}: is neither {' nor '.join(known)} nor two or three {suffix} files; "
                f"give them as TRAIN{suffix},TEST{suffix} or TRAIN{suffix},DEV{suffix},TEST{suffix}"
            )
        parts = [from_file(path) for path in paths]
        for path, part in zip(paths, parts, strict=True):
            if not part:
                raise CorpusError(f"{path}: holds no example; give a file that does")
        name, where = paths[-1].name, str(paths[0])
    train, *between, test = parts
    notes = []
    if between:
        dev = between[0]
    else:
        dev = [example for example in train if is_heldout(key_of(example), _DEV_SHARE)]
        train = [example for example in train if not is_heldout(key_of(example), _DEV_SHARE)]
        notes.append(f"no dev data: {len(dev):,} of the training examples, chosen by their hashes, take its place")
    if not train or not dev:
        raise CorpusError(f"{where}: too few examples to keep a tenth of them as dev data; name a file of dev data")
    seen = {key_of(example) for example in (*train, *dev)}
    fresh = [example for example in test if key_of(example) not in seen]
    if not fresh:
        raise CorpusError(f"{where}: every test example is also in the training or dev data; give other test data")
    if len(fresh) < len(test):
        notes.append(f"dropped {len(test) - len(fresh):,} test examples that are also in the training or dev data")
    return Splits(name, train, dev, fresh, notes)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a file, each with its place for messages."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); check the name") from None
    for number, line in enumerate(content.splitlines(), 1):
        place = f"{path}: line {number}"
        try:
            yield place, line.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise CorpusError(f"{place}: is not UTF-8; convert the file with `iconv -t UTF-8`") from None


def _jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for place, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise CorpusError(f"{place}: is not valid JSON; a .jsonl file has one JSON object a line") from None
        text, label = (record.get("text"), record.get("label")) if isinstance(record, dict) else (None, None)
        if not (isinstance(text, str) and text.strip() and isinstance(label, str) and label.strip()):
            raise CorpusError(f'{place}: has no text in its fields "text" and "label"; every record needs both')
        yield text, label


def _conll(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    words: list[str] = []
    tags: list[str] = []
    for place, line in _lines(path):
        if line.strip():
            columns = line.split("\t") if "\t" in line else line.split()
            if len(columns) < 2 or not columns[0].strip() or not columns[-1].strip():
                raise CorpusError(f"{place}: has no word and tag; a line is WORD<TAB>TAG, or empty between sentences")
            words.append(columns[0].strip())
            tags.append(columns[-1].strip())
        elif words:
            yield words, tags
            words, tags = [], []
    if words:
        yield words, tags


def _from_hub(hub: _Hub, split: str, from_record: Callable[[Any, _Hub, Callable[[Any], str]], T]) -> list[T]:
    import datasets  # slow to import, and files do without
    from huggingface_hub.errors import HTTPError  # of whichever HTTP client the hub's library is built on

    try:
        table = datasets.load_dataset(hub.dataset, hub.config, split=split)
        feature = table.features[hub.label]
        feature = getattr(feature, "feature", feature)  # of one tag, where the column is a list of them
        name_of = getattr(feature, "int2str", str)
        return [from_record(record, hub, name_of) for record in table]
    except (datasets.exceptions.DatasetsError, ValueError, KeyError, RuntimeError, OSError, HTTPError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CorpusError(
            f"dataset {hub.dataset}: {reason.rstrip('.')}. Check the connection to huggingface.co, or give files"
        ) from None
