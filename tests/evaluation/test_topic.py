import sys
from dataclasses import replace

import pytest

from kantha.errors import CorpusError, MissingPackageError, RunDirectoryError
from kantha.evaluation.finetune import Settings
from kantha.evaluation.labelled import Splits, Text
from kantha.evaluation.results import Score, by_method
from kantha.evaluation.topic import evaluate_topic

SETTINGS = Settings(seeds=2, epochs=10, batch=8, learning_rate=1e-3)


def silent(*_: object) -> None: ...


def test_every_method_is_measured_on_the_same_texts(model_folder: str, topics: Splits[Text]) -> None:
    lines: list[str] = []
    shares: list[float] = []
    scores = list(evaluate_topic(model_folder, topics, SETTINGS, lines.append, lambda _, share: shares.append(share)))
    frequent, linear, tuned, again = scores
    river = sum(text.topic == "river" for text in topics.test) / len(topics.test)
    assert frequent.metrics["accuracy"] == river
    assert frequent.metrics["macro F1"] < river
    assert linear.metrics["accuracy"] > 0.9 > frequent.metrics["accuracy"]
    assert tuned.metrics["accuracy"] > 0.9
    assert [score.seed for score in scores] == [None, None, 0, 1]
    assert tuned.method == again.method
    assert [line.split(":")[0] for line in lines] == ["topic, seed 0", "topic, seed 1"]
    assert all(0 <= share <= 1 for share in shares)


def test_a_topic_that_is_only_in_the_test_data_is_simply_not_found(model_folder: str, topics: Splits[Text]) -> None:
    test = [*topics.test[:9], Text("ইলিশ মাছ", "unheard of")]
    scores = list(evaluate_topic(model_folder, replace(topics, test=test), Settings(1, 1), silent, silent))
    assert all(score.metrics["accuracy"] <= 0.9 for score in scores)


def test_texts_that_are_too_long_are_cut_and_counted(model_folder: str, topics: Splits[Text]) -> None:
    lines: list[str] = []
    test = [Text(" ".join([topics.test[0].text] * 20), "river"), *topics.test]
    assert list(evaluate_topic(model_folder, replace(topics, test=test), Settings(1, 1), lines.append, silent))
    assert lines[0] == "topic: 1 texts are longer than the 40 tokens that the model reads, and were cut"


def test_a_single_topic_cannot_be_learned(model_folder: str, topics: Splits[Text]) -> None:
    train = [text for text in topics.train if text.topic == "food"]
    with pytest.raises(CorpusError, match="all training texts have the topic 'food'"):
        list(evaluate_topic(model_folder, replace(topics, train=train), SETTINGS, silent, silent))


def test_what_is_not_installed_is_named(
    model_folder: str, topics: Splits[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingPackageError, match="pip install scikit-learn"):
        next(evaluate_topic(model_folder, topics, SETTINGS, silent, silent))


def test_a_model_that_is_none(topics: Splits[Text], tmp_path: object) -> None:
    with pytest.raises(RunDirectoryError, match="transformers cannot load it"):
        next(evaluate_topic(str(tmp_path), topics, SETTINGS, silent, silent))


def test_mean_and_deviation_are_over_seeds() -> None:
    table = by_method([Score("a", {"x": 0.5}), Score("b", {"x": 0.2}, 0), Score("b", {"x": 0.4}, 1)])
    assert table["a"]["x"].mean == 0.5
    assert table["a"]["x"].deviation is None
    assert table["b"]["x"].mean == pytest.approx(0.3)
    assert table["b"]["x"].deviation == pytest.approx(0.2 / 2**0.5)
