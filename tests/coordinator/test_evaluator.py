"""Checkpoints are measured by a real process, which must neither disturb the coordinator nor outlive it."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from commands import wait_for

from kantha.coordinator import evaluator as module
from kantha.coordinator.evaluator import EXAMPLES, Evaluator
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import HeldoutStatus
from kantha.corpus import heldout_batches, load_tokenizer
from kantha.evaluation import fill_blanks, measure_heldout
from kantha.spec import RunSpec
from kantha.training import Replica
from kantha.training.checkpoint import MODEL_FILE, checkpoint_folder

PATIENCE = 60.0  # seconds; importing PyTorch takes some, on a machine that does other things as well


class Evaluated:
    """A run whose checkpoints are measured while the test saves them."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.ledger = Ledger(run.ledger)
        self.newest = 0
        self.said: list[str] = []
        self.asked: list[int] = []
        self.evaluator = Evaluator(run, self.ledger, lambda: self.newest, self.said.append)
        self._ask = self.evaluator._ask
        self.evaluator._ask = self._note  # type: ignore[method-assign]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.evaluator.work_until, args=(self._stop,))

    def _note(self, number: int, stop: threading.Event) -> module._Answer:
        answer = self._ask(number, stop)
        self.asked.append(number)
        return answer

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.ledger.close()

    def save(self, number: int) -> Replica:
        """A checkpoint with weights of its own."""
        replica = Replica(self.run.spec)
        with torch.no_grad():
            for parameter in replica.parameters:
                parameter.add_(torch.full_like(parameter, number / 100))
        self.run.save_checkpoint(replica, number)
        return replica

    def wait_until_asked(self, number: int) -> None:
        self.newest = number
        wait_for(lambda: number in self.asked, PATIENCE, f"round {number} is measured; {self.said}")


@pytest.fixture
def evaluated(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluated]:
    monkeypatch.setattr(module, "_SHARE", 1e9)  # no rest between two
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.02)
    evaluated = Evaluated(RunDirectory.open(run_path))
    yield evaluated
    evaluated.stop()


@pytest.fixture
def text_away(tiny_spec: RunSpec, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The run's text is not where its spec says, but at the second path."""
    text = Path(tiny_spec.data.sources[0].path)
    away = text.rename(tmp_path / "away.txt")
    yield text, away
    if away.exists():
        away.rename(text)


def scores(number: int) -> HeldoutStatus:
    return HeldoutStatus(
        round=number, loss=5.7, mlm_loss=5.0, mlm_accuracy=0.1, sop_loss=0.7, sop_accuracy=0.5, masked=300, pairs=90
    )


def test_every_checkpoint_is_measured_from_the_first_weights_on(evaluated: Evaluated) -> None:
    evaluated.start()
    evaluated.wait_until_asked(0)
    trained = evaluated.save(4)
    evaluated.wait_until_asked(4)
    evaluated.wait_until_asked(5)  # was deleted before it could be read
    evaluated.save(6)
    evaluated.wait_until_asked(6)
    wait_for(lambda: len(evaluated.ledger.heldout()) == 3, PATIENCE, "the last one is in the ledger")

    run = evaluated.run
    first, second, third = evaluated.ledger.heldout()
    batches = heldout_batches(run.spec, load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256), EXAMPLES, 32)
    for entry, model in ((first, Replica(run.spec).model), (second, trained.model)):
        expected = measure_heldout(model, batches)
        assert entry.mlm_loss == pytest.approx(expected.mlm_loss, rel=1e-5)
        assert entry.sop_loss == pytest.approx(expected.sop_loss, rel=1e-5)
        assert entry.loss == pytest.approx(expected.mlm_loss + expected.sop_loss, rel=1e-5)
        assert (entry.mlm_accuracy, entry.sop_accuracy) == (expected.mlm_accuracy, expected.sop_accuracy)
        assert (entry.masked, entry.pairs) == (expected.masked, expected.pairs)
    assert (first.round, second.round, third.round) == (0, 4, 6)
    assert first.loss != second.loss != third.loss
    assert evaluated.said == []

    tokenizer = load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256)
    filled = evaluated.ledger.blanks()
    assert [entry.round for entry in filled] == [0, 4, 6]
    for entry, model in ((filled[0], Replica(run.spec).model), (filled[1], trained.model)):
        expected = fill_blanks(model, tokenizer, run.spec.evaluation.sentences)
        assert [[guess.word for guess in guesses] for guesses in entry.guesses] == [
            [word for word, _ in words] for words in expected
        ]
    assert all(len(guesses) == 3 for entry in filled for guesses in entry.guesses)

    process = psutil.Process(evaluated.evaluator._process.pid)
    assert process.nice() == min(19, psutil.Process().nice() + 10)
    evaluated.stop()
    assert not process.is_running()


def test_what_the_ledger_has_is_not_measured_again(evaluated: Evaluated) -> None:
    evaluated.ledger.add_heldout(scores(0))
    assert evaluated.evaluator._evaluate(0, threading.Event()) == 0.0
    assert evaluated.asked == []
    assert evaluated.ledger.heldout() == [scores(0)]


def test_a_failure_is_said_once_and_the_next_checkpoints_are_tried(
    evaluated: Evaluated, text_away: tuple[Path, Path]
) -> None:
    evaluated.start()
    evaluated.wait_until_asked(0)
    evaluated.save(2)
    evaluated.wait_until_asked(2)
    [said] = evaluated.said
    assert said.startswith(f"round 0 is not measured on held-out text: {text_away[0]}: cannot be read")

    text_away[1].rename(text_away[0])
    evaluated.save(4)
    evaluated.wait_until_asked(4)
    wait_for(lambda: evaluated.ledger.heldout(), PATIENCE, "the scores are in the ledger")
    assert [entry.round for entry in evaluated.ledger.heldout()] == [4]
    assert len(evaluated.said) == 1

    damaged = checkpoint_folder(evaluated.run.checkpoints, 6)
    evaluated.save(6)
    (damaged / MODEL_FILE).write_bytes(b"torn")
    evaluated.wait_until_asked(6)
    wait_for(lambda: len(evaluated.said) == 2, PATIENCE, "that it is damaged is said")
    assert "damaged or changed" in evaluated.said[1]


def test_a_process_that_died_is_said_and_replaced(evaluated: Evaluated) -> None:
    evaluated.start()
    wait_for(lambda: evaluated.evaluator._process, PATIENCE, "a process is started")
    evaluated.evaluator._process.kill()
    wait_for(lambda: evaluated.said, PATIENCE, "that it ended is said")
    assert "its process ended by SIGKILL" in evaluated.said[0]
    evaluated.save(2)
    evaluated.wait_until_asked(2)
    wait_for(lambda: evaluated.ledger.heldout(), PATIENCE, "the scores are in the ledger")
    assert len(evaluated.said) == 1


def test_it_rests_nine_times_as_long_as_it_computed(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def ask(number: int, _stop: threading.Event) -> module._Answer:
        times.append(time.monotonic())
        evaluated.newest += 1
        return module._Answer(seconds=0.03)

    monkeypatch.setattr(module, "_SHARE", 0.1)
    monkeypatch.setattr(evaluated.evaluator, "_ask", ask)
    evaluated.start()
    wait_for(lambda: len(times) >= 3, PATIENCE, "three are measured")
    assert times[1] - times[0] >= 0.29
    assert times[2] - times[1] >= 0.29


COORDINATOR = """
import sys, threading
from pathlib import Path
from kantha.coordinator.evaluator import Evaluator
from kantha.coordinator.ledger import Ledger
from kantha.coordinator.rundir import RunDirectory

run = RunDirectory.open(Path(sys.argv[1]))
Evaluator(run, Ledger(run.ledger), lambda: 0, print).work_until(threading.Event())
"""


def test_no_process_outlives_a_coordinator_that_was_killed(run_path: Path) -> None:
    weights = checkpoint_folder(run_path / "checkpoints", 0) / MODEL_FILE
    weights.unlink()
    os.mkfifo(weights)  # it reads from here, and does not see that nobody waits for its answer
    writers: list[int] = []

    def is_reading() -> bool:
        with contextlib.suppress(OSError):  # nobody has opened it for reading
            writers.append(os.open(weights, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    coordinator = subprocess.Popen([sys.executable, "-c", COORDINATOR, str(run_path)])
    try:
        wait_for(is_reading, PATIENCE, "the first weights are read")
        [process] = psutil.Process(coordinator.pid).children(recursive=True)
        coordinator.kill()
        _, alive = psutil.wait_procs([process], timeout=10)
        assert not alive
    finally:
        coordinator.kill()
        coordinator.wait()
        for writer in writers:
            os.close(writer)
