from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from labelled_data import sentences, texts, write_entities, write_topics

from kantha.errors import CorpusError
from kantha.evaluation.labelled import Sentence, Text, load_entities, load_topics


def files(*paths: Path) -> str:
    return ",".join(map(str, paths))


def test_topics_of_files_are_read_in_one_spelling(tmp_path: Path) -> None:
    train, dev, test = (tmp_path / f"{name}.jsonl" for name in ("train", "dev", "test"))
    train.write_text('{"text": "  লাল\\u200b কাঁথা ।", "label": "things"}\n\n', encoding="utf-8-sig")
    write_topics(dev, texts(3, 2))
    write_topics(test, texts(4, 3))
    splits = load_topics(files(train, dev, test), "bn")
    assert splits.train == [Text("লাল কাঁথা।", "things")]
    assert splits.dev == texts(3, 2)
    assert splits.test == texts(4, 3)
    assert splits.notes == []
    assert splits.name == "test.jsonl"


def test_entities_of_files(tmp_path: Path) -> None:
    train, test = tmp_path / "train.conll", tmp_path / "test.conll"
    write_entities(train, sentences(40, 1))
    test.write_text("\n\nলাল\tO\r\nঢাকা\tx\tB-LOC\r\n\r\nরহিম B-PER\n", encoding="utf-8")
    splits = load_entities(files(train, test), "bn")
    assert sorted([*splits.train, *splits.dev]) == sorted(sentences(40, 1))
    assert splits.test == [Sentence(("লাল", "ঢাকা"), ("O", "B-LOC")), Sentence(("রহিম",), ("B-PER",))]


def test_without_dev_data_the_same_tenth_of_the_training_data_takes_its_place(tmp_path: Path) -> None:
    train, test = write_topics(tmp_path / "a.jsonl", texts(300, 1)), write_topics(tmp_path / "b.jsonl", texts(9, 2))
    splits, again = (load_topics(files(train, test), "bn") for _ in range(2))
    assert splits == again
    assert 10 < len(splits.dev) < 60
    assert len(splits.train) + len(splits.dev) == 300
    assert not {*splits.train} & {*splits.dev}
    assert splits.notes == [
        f"no dev data: {len(splits.dev)} of the training examples, chosen by their hashes, take its place"
    ]


def test_what_was_learned_from_is_not_tested(tmp_path: Path) -> None:
    train, dev, test = sentences(20, 1), sentences(20, 2), sentences(20, 3)
    paths = [tmp_path / f"{name}.conll" for name in ("train", "dev", "test")]
    for path, part in zip(paths, (train, dev, [train[3], *test, dev[5], dev[5]]), strict=True):
        write_entities(path, part)
    splits = load_entities(files(*paths), "bn")
    assert splits.test == test
    assert splits.notes == ["dropped 3 test examples that are also in the training or dev data"]


def test_tags_that_are_no_iob_are_taken_as_outside_and_counted(tmp_path: Path) -> None:
    train = write_entities(tmp_path / "train.conll", sentences(40, 1))
    test = tmp_path / "test.conll"
    test.write_text("আজ\tTIM\nরহিম\tB-PER\nসকালে\tTIM\n", encoding="utf-8")
    splits = load_entities(files(train, test), "bn")
    assert splits.test[0].tags == ("O", "B-PER", "O")
    assert splits.notes[-1] == "2 words have the tag TIM, which begins with neither B- nor I-: taken as O"


@pytest.mark.parametrize(
    ("load", "suffix", "content", "place", "advice"),
    [
        (load_topics, ".jsonl", b'{"text": "a", "label": "b"}\n{"text": "a"', "line 2", "not valid JSON"),
        (load_topics, ".jsonl", b'{"text": "a"}', "line 1", '"label"'),
        (load_topics, ".jsonl", b'{"text": "a", "label": 3}', "line 1", '"label"'),
        (load_topics, ".jsonl", b"[1]", "line 1", '"label"'),
        (load_topics, ".jsonl", b'\n{"text": "\xff"}', "line 2", "iconv"),
        (load_topics, ".jsonl", b"\n", "", "holds no example"),
        (load_topics, ".jsonl", None, "", "cannot be read"),
        (load_entities, ".conll", "ঢাকা\tB-LOC\nরহিম\n".encode(), "line 2", "WORD<TAB>TAG"),
        (load_entities, ".conll", "ঢাকা\t\n".encode(), "line 1", "WORD<TAB>TAG"),
        (load_entities, ".conll", b"\xe0\xa6", "line 1", "iconv"),
    ],
)
def test_an_unusable_file_is_named_with_its_line(
    load: Callable[[str, str], object], suffix: str, content: bytes | None, place: str, advice: str, tmp_path: Path
) -> None:
    bad, good = tmp_path / f"bad{suffix}", tmp_path / f"good{suffix}"
    if content is not None:
        bad.write_bytes(content)
    (write_topics if suffix == ".jsonl" else write_entities)(good, (texts if suffix == ".jsonl" else sentences)(30, 1))
    with pytest.raises(CorpusError) as raised:
        load(files(good, bad), "bn")
    for part in (str(bad), place, advice):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data", ["train.jsonl", "a.jsonl,b.jsonl,c.jsonl,d.jsonl", "a.conll,b.conll", "sib2000", ""])
def test_data_that_are_neither_known_nor_files(data: str) -> None:
    with pytest.raises(CorpusError, match=r"is neither sib200 nor indicglue nor two or three \.jsonl files"):
        load_topics(data, "bn")


def test_test_data_that_were_all_learned_from(tmp_path: Path) -> None:
    path = write_topics(tmp_path / "a.jsonl", texts(100, 1))
    with pytest.raises(CorpusError, match="every test example"):
        load_topics(files(path, path), "bn")


def test_too_few_for_dev_data(tmp_path: Path) -> None:
    path = write_topics(tmp_path / "a.jsonl", texts(1, 1))
    with pytest.raises(CorpusError, match="name a file of dev data"):
        load_topics(files(path, path), "bn")


# ---- from the hub, which is made up here: no test asks it for anything


def hub(tables: dict[tuple[str, str], datasets.Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, split: str) -> datasets.Dataset:
        return tables[name, config].select(range({"train": 0, "validation": 1, "test": 2}[split], 3, 3))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_topics_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    named = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["state", "sports"]))
    tables = {
        ("Davlan/sib200", "ben_Beng"): datasets.Dataset.from_dict(
            {"index_id": [0, 1, 2], "category": ["a", "b", "a"], "text": ["ক", "খ", "গ"]}
        ),
        ("ai4bharat/indic_glue", "sna.bn"): datasets.Dataset.from_dict(
            {"text": ["ক", "খ", "গ"], "label": [0, 1, 1]}, features=named
        ),
    }
    hub(tables, monkeypatch)
    splits = load_topics("sib200", "bn")
    assert (splits.name, splits.notes) == ("sib200", [])
    assert (splits.train, splits.dev, splits.test) == ([Text("ক", "a")], [Text("খ", "b")], [Text("গ", "a")])
    assert load_topics("indicglue", "bn").test == [Text("গ", "sports")]


def test_entities_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    tag = datasets.ClassLabel(names=["O", "B-PER", "I-PER"])
    words = datasets.Sequence(datasets.Value("string"))
    table = datasets.Dataset.from_dict(
        {"tokens": [["ক", "খ"], ["গ"], ["ঘ"]], "ner_tags": [[1, 2], [0], [1]]},
        features=datasets.Features(tokens=words, ner_tags=datasets.Sequence(tag)),
    )
    hub({("unimelb-nlp/wikiann", "bn"): table}, monkeypatch)
    splits = load_entities("wikiann", "bn")
    assert splits.train == [Sentence(("ক", "খ"), ("B-PER", "I-PER"))]
    assert splits.test == [Sentence(("ঘ",), ("B-PER",))]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(CorpusError, match=r"^dataset Davlan/sib200: Couldn't reach it. Check the connection"):
        load_topics("sib200", "bn")
