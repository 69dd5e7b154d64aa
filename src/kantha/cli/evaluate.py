"""`kantha evaluate`: measures a model task by task; a table for each, with the baselines beside the model."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kantha import __version__
from kantha.errors import StorageError
from kantha.evaluation.finetune import Settings, load_tokenizer_for
from kantha.evaluation.labelled import Splits, load_entities, load_topics
from kantha.evaluation.ner import evaluate_ner
from kantha.evaluation.pretraining import PretrainingTest, text_spec
from kantha.evaluation.results import Score, Spread, by_method, import_extra
from kantha.evaluation.topic import evaluate_topic
from kantha.publishing import export_model, find_checkpoint
from kantha.spec import RunSpec, load_spec
from kantha.training.checkpoint import MANIFEST, SPEC_FILE

_LANGUAGE = "bn"  # of a model folder's labelled data; a run's spec says which is the run's
_PRETRAINING = ("mlm", "sop")
_LABELLED = {"topic": "sib200", "ner": "wikiann"}  # and the data of a task that names none

Say = Callable[[str], None]
OnProgress = Callable[[str, float], None]


@dataclass
class _Task:
    name: str
    data: str
    sizes: dict[str, int]
    measure: Callable[[], Iterable[Score]]
    notes: list[str] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name} on {self.data}: " + ", ".join(f"{count:,} {what}" for what, count in self.sizes.items())


def show_evaluation(
    model: str, tasks: Sequence[str], text: Path | None, settings: Settings, report: Path | None, console: Console
) -> None:
    """Measure a run, a checkpoint, a model folder or a hub name on tasks: `mlm`, `sop`, `topic=DATA`, `ner=DATA`.

    What is known when an error or Ctrl-C ends it is shown and written to `report` as well. Raises
    `RunDirectoryError` where there is no such model, `CorpusError` and `MissingPackageError` where data or packages
    are missing, `StorageError` where `report` cannot be written, `typer.BadParameter` for tasks that are none.
    """
    parsed = [_parse(task) for task in tasks]
    if report is not None:
        try:
            report.open("a").close()  # better found out now than when all is done
        except OSError as error:
            raise StorageError(f"{report}: cannot be written ({error.strerror}); choose another place") from None
    planned: list[_Task] = []
    try:
        with _model_folder(model) as (folder, run), _progress(console) as (say, on_progress):
            # model and data are read before anything is measured: a mistyped name shows at once, not after an hour
            load_tokenizer_for(folder)
            planned += _plan(parsed, folder, run, text, settings, say, on_progress)
            for task in planned:
                say(f"{task.name} on {task.data} …")
                for note in task.notes:
                    say(f"{task.name}: {note}")
                for score in task.measure():
                    task.scores.append(score)
    finally:
        measured = [task for task in planned if task.scores]
        for task in measured:
            console.print(f"\n{task.title}", markup=False, soft_wrap=True)
            console.print(_table(task))
        if report is not None and measured:
            _write(report, model, settings, measured)


def _parse(task: str) -> tuple[str, str]:
    name, _, data = task.partition("=")
    if name in _LABELLED:
        return name, data or _LABELLED[name]
    if task in _PRETRAINING:
        return task, ""
    raise typer.BadParameter(f"{task!r} is none of: mlm, sop, topic, topic=DATA, ner, ner=DATA", param_hint="TASK")


@contextmanager
def _model_folder(model: str) -> Iterator[tuple[str, RunSpec | None]]:
    """What `transformers` loads the model from, and its run spec where it is of a run; a run is exported for it."""
    path = Path(model)
    if not (path / MANIFEST).is_file() and not (path / "checkpoints").is_dir():
        yield model, None
        return
    checkpoint = find_checkpoint(path)
    with tempfile.TemporaryDirectory(prefix="kantha-") as temporary:
        folder = Path(temporary) / "model"
        export_model(checkpoint, folder)
        yield str(folder), load_spec(checkpoint / SPEC_FILE)


@contextmanager
def _progress(console: Console) -> Iterator[tuple[Say, OnProgress]]:
    """A function for lines, and one for the bar, which only a terminal has."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("reading model and data", total=1.0)
        yield (
            lambda line: console.print(line, markup=False, soft_wrap=True),
            lambda what, share: progress.update(bar, description=what, completed=share),
        )


def _plan(
    tasks: Sequence[tuple[str, str]],
    model: str,
    run: RunSpec | None,
    text: Path | None,
    settings: Settings,
    say: Say,
    on_progress: OnProgress,
) -> list[_Task]:
    language = run.language if run else _LANGUAGE
    planned = []
    pretraining: PretrainingTest | None = None
    for name, data in tasks:
        if name in _PRETRAINING:
            pretraining = pretraining or PretrainingTest(model, _heldout_spec(model, run, text))
            data = text.name if text else "held-out documents of the run"
            if name == "mlm":
                sizes, measure = {"masked tokens": pretraining.masked}, pretraining.mlm
            else:
                sizes, measure = {"pairs of segments": pretraining.pairs}, pretraining.sop
            planned.append(_Task(name, data, sizes, partial(measure, on_progress)))
        elif name == "topic":
            import_extra("sklearn")
            topics = load_topics(data, language)
            measure = partial(evaluate_topic, model, topics, settings, say, on_progress)
            planned.append(_Task(name, topics.name, _sizes(topics), measure, topics.notes))
        else:
            import_extra("seqeval")
            import_extra("sklearn_crfsuite")
            entities = load_entities(data, language)
            measure = partial(evaluate_ner, model, entities, settings, say, on_progress)
            planned.append(_Task(name, entities.name, _sizes(entities), measure, entities.notes))
    return planned


def _heldout_spec(model: str, run: RunSpec | None, text: Path | None) -> RunSpec:
    if text is not None:
        return text_spec(text, model, run)
    if run is None:
        raise typer.BadParameter(
            "mlm and sop need text that the model has not seen: give --text FILE, or a run instead of a model folder",
            param_hint="TASK",
        )
    return run


def _sizes(splits: Splits[Any]) -> dict[str, int]:
    return {part: len(getattr(splits, part)) for part in ("train", "dev", "test")}


def _table(task: _Task) -> Table:
    table = Table(box=None, padding=(0, 2))
    rows = by_method(task.scores)
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    table.add_column("method")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for method, row in rows.items():
        seeds = max(len(spread.values) for spread in row.values())
        name = f"{method}, {seeds} seeds" if seeds > 1 else method
        table.add_row(name, *(_cell(metric, row[metric]) if metric in row else "" for metric in metrics))
    return table


def _cell(metric: str, spread: Spread) -> str:
    values = [spread.mean] if spread.deviation is None else [spread.mean, spread.deviation]
    if metric == "loss":  # in nats; all others are shares
        return " ± ".join(f"{value:.3f}" for value in values)
    return " ± ".join(f"{100 * value:.1f}" for value in values) + " %"


def _write(report: Path, model: str, settings: Settings, tasks: Sequence[_Task]) -> None:
    content = {
        "kantha": __version__,
        "model": model,
        "settings": asdict(settings),
        "notes": {task.name: task.notes for task in tasks},
        "scores": [  # as `kantha publish --scores` reads them
            {
                "task": f"{task.name} on {task.data}",
                "sizes": task.sizes,
                "method": method,
                "metrics": {
                    metric: {
                        "mean": spread.mean,
                        "std": spread.deviation,
                        "n": len(spread.values),
                        "values": spread.values,
                    }
                    for metric, spread in row.items()
                },
            }
            for task in tasks
            for method, row in by_method(task.scores).items()
        ],
    }
    try:
        report.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{report}: cannot be written ({error.strerror}); choose another place") from None
