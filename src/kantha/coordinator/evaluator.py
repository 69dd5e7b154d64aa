"""Measures a run's checkpoints on held-out text while it goes on, in a process of its own that takes little.

The coordinator reduces gradients and answers requests, often on a small machine without a GPU: nothing here may hold
that up. Its process has threads and cannot fork safely any more, so this is a program by itself:

    python -m kantha.coordinator.evaluator RUN PARENT-PROCESS

It reads numbers of rounds from stdin, one a line, and answers each with a line of JSON. It has one thread and a low
priority, and is killed when the coordinator dies. The held-out examples are found at the first question, which takes
minutes where text is streamed, and kept.

What it measures is the sum that volunteers report of their training, masked tokens and sentence order. The two differ
in this: theirs is of the round's own examples, with the weights from before it; and it weighs batches of like length by
their examples and not by their masked tokens, which changed the demo's by 0.01 nats.

It also notes what the model fills into the blanks of the run spec's sentences, which costs next to nothing.
"""

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, Field
from tokenizers import Tokenizer

from kantha.coordinator.ledger import Ledger
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import BlanksStatus, Guess, HeldoutStatus
from kantha.corpus import Batch, heldout_batches, load_tokenizer
from kantha.errors import DigestError, KanthaError, StorageError, printable
from kantha.evaluation import fill_blanks, measure_heldout
from kantha.model import build_model
from kantha.swarm.processes import signal_when_parent_dies
from kantha.training.checkpoint import MANIFEST, MODEL_FILE, checkpoint_folder, load_weights

# With the demo's model the standard error of the loss is 0.05 nats, of a run that falls by two; between two rounds of
# one curve it is less, since both see the same examples. That of the accuracy of the sentence order is 2 %, which is
# what asks for so many: for masked tokens a quarter would do where examples are of 512 tokens.
EXAMPLES = 512
_BATCH = 8  # examples at once; with 32 an ALBERT-base is no faster on one core, and takes 1.1 GB instead of 0.8
# Of one core, over the time from one measurement to the next. An ALBERT-base reads 512 examples of 512 tokens in 11
# minutes of one core, so that its curve gets a point every two hours.
_SHARE = 0.1
_NICENESS = 10  # a tenth of what others get where the machine is busy; with 19 it would be a seventieth: never done
_LOOK_SECONDS = 0.5  # between two looks for a newer checkpoint, an answer, the end


class _Answer(BaseModel):
    """What came of one checkpoint; neither scores nor an error where it was gone before it could be read."""

    scores: HeldoutStatus | None = None
    blanks: BlanksStatus | None = None
    error: str | None = None
    seconds: float = Field(0.0, description="CPU seconds that it took.")


class Evaluator:
    """The coordinator's side: has the newest checkpoint measured, and enters the scores into the ledger."""

    def __init__(
        self, run: RunDirectory, ledger: Ledger, newest: Callable[[], int], say: Callable[[str], None]
    ) -> None:
        """
        :param newest: the round of the run's newest checkpoint
        :param say: told in a sentence when measuring fails, once until it succeeds again
        """
        self._run, self._ledger, self._newest, self._say = run, ledger, newest, say
        self._log = run.path / "log" / "evaluator.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._failing = False

    def work_until(self, stop: threading.Event) -> None:
        """Measure until `stop` is set: the checkpoint that is the newest now, then whichever is the newest each time.

        What the ledger has is not measured again. A checkpoint that cannot be measured costs its point of the curve.
        The process lives in the calling thread, and no longer than this call.
        """
        try:
            while not stop.is_set():
                number, began = self._newest(), time.monotonic()
                rest_until = began + self._evaluate(number, stop) / _SHARE
                while time.monotonic() < rest_until or self._newest() == number:
                    if stop.wait(_LOOK_SECONDS):
                        break
        finally:
            self._end_process()

    def _evaluate(self, number: int, stop: threading.Event) -> float:
        """Returns the CPU seconds that it took."""
        try:
            if any(known.round == number for known in self._ledger.heldout()):
                return 0.0
            answer = self._ask(number, stop)
            if answer.scores is not None:
                self._ledger.add_heldout(answer.scores, answer.blanks)
                self._failing = False
        except StorageError as error:
            answer = _Answer(error=str(error))
        if answer.error is not None and not self._failing:
            self._failing = True
            self._say(
                f"round {number} is not measured on held-out text: {answer.error} (the run goes on; the next "
                "checkpoints are tried, and this is not said again)"
            )
        return answer.seconds

    def _ask(self, number: int, stop: threading.Event) -> _Answer:
        began = time.monotonic()
        try:
            process = self._process or self._start_process()
        except OSError as error:
            return _Answer(error=f"its process cannot be started ({error})")
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says nothing more
            process.stdin.write(f"{number}\n".encode())
        answered = select.poll()
        answered.register(process.stdout, select.POLLIN)
        while not answered.poll(_LOOK_SECONDS * 1000):
            if stop.is_set():
                return _Answer()
        if line := process.stdout.readline():
            return _Answer.model_validate_json(line)
        code = process.wait()
        self._end_process()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return _Answer(
            error=f"its process ended {how}; see {self._log}",
            seconds=time.monotonic() - began,  # at most
        )

    def _start_process(self) -> subprocess.Popen[bytes]:
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kantha.coordinator.evaluator", str(self._run.path), str(os.getpid())],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C in a terminal is for the coordinator, which ends it
            )
        # from here and not by itself, so that its imports, seconds of computing, are held back as well
        os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
        return self._process

    def _end_process(self) -> None:
        if self._process is not None:
            with self._process as process:  # closes its pipes, and waits
                process.kill()
            self._process = None


class _Measuring:
    """The process's side."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._model = build_model(run.spec)
        self._batches: list[Batch] = []
        self._tokenizer: Tokenizer | None = None

    def answer(self, number: int) -> _Answer:
        began = time.process_time()
        answer = _Answer()
        try:
            answer.scores = self._scores(number)
        except KanthaError as failure:
            answer.error = printable(failure)
        if answer.scores is not None:
            if math.isfinite(answer.scores.loss):  # JSON has no other numbers
                answer.blanks = self._blanks(number)
            else:
                answer = _Answer(error=f"its loss is {answer.scores.loss}")
        answer.seconds = time.process_time() - began
        return answer

    def _scores(self, number: int) -> HeldoutStatus | None:
        """None where the checkpoint is gone; raises `DigestError` where it is damaged, and as `heldout_batches`."""
        run = self._run
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256)
        if not self._batches:
            self._batches = heldout_batches(run.spec, self._tokenizer, EXAMPLES, _BATCH)
        folder = checkpoint_folder(run.checkpoints, number)
        try:
            load_weights(self._model, folder)
        except DigestError:
            if all((folder / name).is_file() for name in (MANIFEST, MODEL_FILE)):
                raise
            return None  # only the newest are kept, and it may be deleted at any moment
        scores = measure_heldout(self._model, self._batches)
        return HeldoutStatus(round=number, loss=scores.mlm_loss + scores.sop_loss, **asdict(scores))

    def _blanks(self, number: int) -> BlanksStatus:
        """What the model that was measured just now fills in."""
        assert self._tokenizer is not None
        filled = fill_blanks(self._model, self._tokenizer, self._run.spec.evaluation.sentences)
        return BlanksStatus(
            round=number,
            guesses=[[Guess(word=word, probability=share) for word, share in words] for words in filled],
        )


def main() -> None:
    signal_when_parent_dies(signal.SIGKILL)
    if os.getppid() != int(sys.argv[2]):
        return  # it is dead already
    with contextlib.suppress(OSError):  # where memory is short this process has to go, and not the coordinator
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    measuring = _Measuring(RunDirectory.open(Path(sys.argv[1])))
    for line in sys.stdin:
        answers.write(measuring.answer(int(line)).model_dump_json() + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
