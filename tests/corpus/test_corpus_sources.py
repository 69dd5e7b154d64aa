import importlib.util
import json
import sqlite3
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path

import datasets
import pytest

from kantha.corpus import is_heldout, normalize, read_documents
from kantha.corpus.sources import mix
from kantha.errors import CorpusError, MissingPackageError
from kantha.spec import FileSource, HuggingFaceSource, ShobdoSource

LINES = ["ভোরে পাখি ডাকে।", "নৌকা ঘাটে বাঁধা।", "দুপুরে রোদ চড়া।", "সন্ধ্যায় হাট ভাঙে।", "রাতে জোনাকি জ্বলে।"]
DOCUMENTS = [normalize(line, "bn") for line in LINES]


def write(path: Path, content: str | bytes) -> FileSource:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return FileSource(kind="file", path=str(path))


def read_error(source: FileSource | HuggingFaceSource) -> str:
    with pytest.raises(CorpusError) as caught:
        list(read_documents(source, "bn"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_text_file_is_a_document_a_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "\ufeff" + "\r\n\n \n".join(LINES))
    assert list(read_documents(source, "bn")) == DOCUMENTS


def test_jsonl_file_is_a_document_a_record(tmp_path: Path) -> None:
    records = [{"id": i, "body": line} for i, line in enumerate(LINES)] + [{"body": ""}, {"body": None}]
    write(tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, records)))
    source = FileSource(kind="file", path=str(tmp_path / "a.jsonl"), text_field="body")
    assert list(read_documents(source, "bn")) == DOCUMENTS


def test_a_seed_shuffles_the_whole_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "\n".join(f"নথি {i}" for i in range(300)))
    in_order = list(read_documents(source, "bn"))
    first, again, other = (list(read_documents(source, "bn", seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != in_order
    assert sorted(first) == sorted(other) == sorted(in_order)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("bad.txt", "ভালো\nভালো\n".encode() + b"\xff\xfe\n", ["bad.txt", "line 3", "byte 26", "not UTF-8", "iconv"]),
        ("bad.jsonl", '{"text": "ক"}\n{"text": \n', ["bad.jsonl", "line 2", "not valid JSON"]),
        ("bad.jsonl", '["ক"]\n', ["bad.jsonl", "line 1", "not a JSON object"]),
        ("bad.jsonl", '{"text": "ক"}\n{"body": "খ"}\n', ["bad.jsonl", "line 2", "'text'", "'body'", "text_field"]),
        ("bad.jsonl", '{"text": 5}\n', ["bad.jsonl", "line 1", "'text'", "text_field"]),
        ("bad.csv", "ক\n", ["bad.csv", ".txt", ".jsonl"]),
        ("missing/a.txt", None, ["missing/a.txt", "No such file", "`path`"]),
    ],
)
def test_a_bad_file_is_told_in_one_line(
    tmp_path: Path, name: str, content: str | bytes | None, parts: list[str]
) -> None:
    if content is not None:
        write(tmp_path / name, content)
    message = read_error(FileSource(kind="file", path=str(tmp_path / name)))
    for part in parts:
        assert part in message


def test_shobdo_entries_are_definitions_then_examples() -> None:
    if importlib.util.find_spec("shobdo") is None:
        pytest.skip("the dictionary shobdo is not installed")
    documents = list(read_documents(ShobdoSource(kind="shobdo"), "bn"))
    assert len(documents) > 40_000
    assert sum("\n" in document for document in documents) > len(documents) / 2
    assert documents == [normalize(document, "bn") for document in documents]


def test_missing_shobdo_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install shobdo"):
        next(read_documents(ShobdoSource(kind="shobdo"), "bn"))


def test_shobdo_is_read_as_its_database_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = str(tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=origin))
    source = ShobdoSource(kind="shobdo")
    (tmp_path / "data").mkdir()
    with pytest.raises(CorpusError, match=r"dictionary\.db.*force-reinstall"):
        next(read_documents(source, "bn"))
    with sqlite3.connect(tmp_path / "data" / "dictionary.db") as database:
        database.execute("CREATE TABLE words (id INTEGER PRIMARY KEY, meanings TEXT, examples TEXT)")
        rows = [(json.dumps(LINES[:2]), json.dumps(LINES[2:3])), ("[]", "[]"), (json.dumps(LINES[3:4]), "[]")]
        database.executemany("INSERT INTO words (meanings, examples) VALUES (?, ?)", rows)
    database.close()
    assert list(read_documents(source, "bn")) == ["\n".join(DOCUMENTS[:3]), DOCUMENTS[3]]


@pytest.fixture
def local_dataset(tmp_path: Path) -> HuggingFaceSource:
    """A dataset in a local folder takes the same way through `datasets` as one on the hub."""
    records = [{"id": i, "text": line} for i, line in enumerate([*LINES, None])]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return HuggingFaceSource(kind="huggingface", name=str(tmp_path))


def test_huggingface_dataset_is_streamed(local_dataset: HuggingFaceSource) -> None:
    assert list(read_documents(local_dataset, "bn")) == DOCUMENTS
    shuffled = list(read_documents(local_dataset, "bn", seed=3, buffer=10))
    assert shuffled != DOCUMENTS
    assert sorted(shuffled) == sorted(DOCUMENTS)


@pytest.mark.parametrize(
    ("change", "part"), [({"text_field": "body"}, "'body'"), ({"split": "dev"}, "split"), ({"config": "bn"}, "config")]
)
def test_a_wrong_dataset_field_is_told_in_one_line(
    local_dataset: HuggingFaceSource, change: dict[str, str], part: str
) -> None:
    message = read_error(local_dataset.model_copy(update=change))
    assert local_dataset.name in message
    assert part in message
    assert "run spec" in message


def test_an_unreachable_hub_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = read_error(HuggingFaceSource(kind="huggingface", name="kantha/no-such-dataset"))
    assert "kantha/no-such-dataset" in message
    assert "connection" in message


def test_an_unknown_dataset_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'kantha/x' doesn't exist on the Hub.\nSee more")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    message = read_error(HuggingFaceSource(kind="huggingface", name="kantha/x"))
    assert "doesn't exist" in message
    assert "`name`" in message


def test_heldout_depends_on_the_text_alone() -> None:
    texts = [f"নথি {i}" for i in range(5_000)]
    held = {text for text in texts if is_heldout(text, 0.1)}
    assert 400 < len(held) < 600
    assert {text for text in texts if is_heldout(text, 0.05)} < held
    assert [i for i in range(60) if is_heldout(f"নথি {i}", 0.1)] == [9, 24, 31, 41, 57]  # on every machine


def test_mix_follows_the_weights_and_loses_nothing() -> None:
    endless = mix([iter(lambda: "a", None), iter(lambda: "b", None)], [3, 1], seed=0)
    drawn = list(islice(endless, 4_000))
    assert 2_850 < drawn.count("a") < 3_150
    assert sorted(mix([iter(range(5)), iter(range(5, 50))], [10, 1], seed=0)) == list(range(50))
