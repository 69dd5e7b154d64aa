"""`kantha evaluate` as a person uses it, on the run, the checkpoint and the model folder of a tiny model."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from labelled_data import sentences, texts, write_entities, write_topics

from kantha.cli import evaluate as command
from kantha.coordinator.rundir import RunDirectory
from kantha.evaluation.results import Score
from kantha.publishing import export_model, load_scores
from kantha.training.checkpoint import list_checkpoints

Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def evaluate(kantha: Evaluate) -> Evaluate:
    """Runs `kantha evaluate`; returns exit code, stdout, stderr."""
    return partial(kantha, "evaluate")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The tasks `topic` and `ner`, each with files of its own."""
    folder = tmp_path_factory.mktemp("labelled")
    topics = [write_topics(folder / f"{i}.jsonl", texts(40, i)) for i in range(3)]
    entities = [write_entities(folder / f"{i}.conll", sentences(60, i)) for i in range(2)]
    return f"topic={','.join(map(str, topics))}", f"ner={','.join(map(str, entities))}"


def test_all_tasks_of_a_run(evaluate: Evaluate, tiny_run: RunDirectory, data: tuple[str, str], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--seeds", 2, "--epochs", 2, "--json", report)
    code, out, error = evaluate(tiny_run.path, "mlm", "sop", *data, *options)
    assert (code, error) == (0, "")
    for part in (
        "mlm on held-out documents of the run: ",
        "single tokens masked",
        "whole words masked",
        "runs of one to three words masked",
        "always the more frequent order",
        "topic on 2.jsonl: 40 train, 40 dev, ",
        "character TF-IDF + logistic regression",
        "ner on 1.conll: ",
        "  CRF  ",
        "fine-tuned, 2 seeds",
        " ± ",
        "ner: no dev data: ",
    ):
        assert part in out
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["model"] == str(tiny_run.path)
    assert written["settings"]["seeds"] == 2
    tasks = dict.fromkeys(score["task"].split()[0] for score in written["scores"])
    assert list(tasks) == list(written["notes"]) == ["mlm", "sop", "topic", "ner"]
    tuned = written["scores"][-1]["metrics"]["entity F1"]
    assert written["scores"][-1]["method"] == "fine-tuned"
    assert len(tuned["values"]) == tuned["n"] == 2
    assert tuned["mean"] == pytest.approx(sum(tuned["values"]) / 2)
    assert any("no dev data" in note for note in written["notes"]["ner"])
    assert len(load_scores(report)) == len(written["scores"])  # for the card of `kantha publish`
    assert tiny_run.path.is_dir()


def test_text_of_ones_own_for_a_run_a_checkpoint_and_a_model(
    evaluate: Evaluate, tiny_run: RunDirectory, tmp_path: Path
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("\n".join(f"{text.text}। {text.text}।" for text in texts(50, 1)), encoding="utf-8")
    export_model(tiny_run.path, tmp_path / "model")
    [checkpoint, *_] = list_checkpoints(tiny_run.path / "checkpoints")
    of_run, of_checkpoint, of_model = (
        evaluate(model, "--text", text) for model in (tiny_run.path, checkpoint, tmp_path / "model")
    )
    assert of_run[0] == of_model[0] == 0
    assert of_run == of_checkpoint
    for part in ("mlm on own.txt: ", "sop on own.txt: "):
        assert part in of_run[1]
        assert part in of_model[1]  # the figures differ: without the run's spec other tokens are masked


def test_a_model_folder_has_no_text_of_its_own(evaluate: Evaluate, tiny_run: RunDirectory, tmp_path: Path) -> None:
    export_model(tiny_run.path, tmp_path / "model")
    code, out, error = evaluate(tmp_path / "model")
    assert (code, out) == (2, "")
    assert "--text" in error


@pytest.mark.parametrize("task", ["dance", "mlm=x", "nerd", "=x"])
def test_an_unknown_task(evaluate: Evaluate, tiny_run: RunDirectory, task: str) -> None:
    code, _, error = evaluate(tiny_run.path, task)
    assert code == 2
    assert "none of: mlm, sop, topic" in " ".join(error.replace("│", " ").split())


def test_bad_data_end_it_before_anything_is_measured(
    evaluate: Evaluate, tiny_run: RunDirectory, data: tuple[str, str], tmp_path: Path
) -> None:
    code, out, error = evaluate(tiny_run.path, "mlm", data[0], "ner=a.conll,b.conll")
    assert (code, out) == (13, "")
    assert error == "kantha: a.conll: cannot be read (No such file or directory); check the name\n"


def test_what_is_no_model(evaluate: Evaluate, data: tuple[str, str], tmp_path: Path) -> None:
    code, out, error = evaluate(tmp_path, *data)
    assert (code, out) == (11, "")
    assert len(error.splitlines()) == 1
    assert str(tmp_path) in error


def test_without_the_optional_packages(
    evaluate: Evaluate, tiny_run: RunDirectory, data: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn_crfsuite", None)
    code, out, error = evaluate(tiny_run.path, *data)
    assert (code, out) == (14, "")
    assert "pip install scikit-learn seqeval sklearn-crfsuite" in error


def test_a_report_that_cannot_be_written_is_found_out_at_once(
    evaluate: Evaluate, tiny_run: RunDirectory, tmp_path: Path
) -> None:
    code, out, error = evaluate(tiny_run.path, "--json", tmp_path)
    assert (code, out) == (16, "")
    assert str(tmp_path) in error


def test_ctrl_c_shows_what_is_known_by_then(
    evaluate: Evaluate,
    tiny_run: RunDirectory,
    data: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> Iterator[Score]:
        yield Score("fine-tuned", {"accuracy": 0.5}, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "evaluate_topic", interrupted)
    report = tmp_path / "report.json"
    code, out, error = evaluate(tiny_run.path, *data, "--json", report)
    assert (code, error) == (130, "kantha: stopped\n")
    assert "50.0 %" in out
    assert "ner on 1.conll" not in out
    assert json.loads(report.read_text(encoding="utf-8"))["scores"][-1]["method"] == "fine-tuned"
