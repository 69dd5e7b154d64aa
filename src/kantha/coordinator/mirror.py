"""Mirrors a run's curves to Weights & Biases while it goes on: `kantha serve --wandb PROJECT`.

Its client is a program by itself, which interrupts the one it lives in when somebody presses "stop" over there, and
which asks for a key on a terminal. So it gets a process of its own, without a terminal:

    python -m kantha.coordinator.mirror RUN PROJECT PARENT-PROCESS

It reads what happened from stdin, and answers each line with one. Where the key is, and whether anything is sent now or
kept for later (WANDB_MODE=offline), is the client's affair; this program never sees the key. Figures of whole rounds
are all that is sent: nothing about persons or machines, the coordinator's own neither.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from kantha.coordinator.ledger import Ledger
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import HeldoutStatus, RoundStatus
from kantha.errors import StorageError, printable
from kantha.swarm.processes import signal_when_parent_dies

SETTLED = 60.0  # seconds after its end from which on a round's figures stay as they are
LOOK_SECONDS = 15.0  # between two looks for new rounds
_RETRY_SECONDS = 600.0
_ANSWER_SECONDS = 180.0  # the client waits 90 s for its own server
_END_SECONDS = 20.0  # to send the rest when the coordinator stops
_LAST_ROUNDS = 50
_MOST_ROUNDS = 1_000  # in one line
_STATE = "mirrored.json"  # beside what the client keeps in the folder wandb


class _Mirrored(BaseModel):
    """How far the mirror has come, or what is wrong."""

    round: int = 0
    heldout: int = Field(-1, description="Round of the newest checkpoint that was measured; 0 is one.")
    error: str = ""


class _Portion(BaseModel):
    rounds: list[RoundStatus]
    heldout: list[HeldoutStatus]


class Mirror:
    """The coordinator's side."""

    def __init__(
        self,
        run: RunDirectory,
        ledger: Ledger,
        project: str,
        say: Callable[[str], None],
        settled: float = SETTLED,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """
        :param project: PROJECT or ENTITY/PROJECT
        :param say: told in a sentence when it fails, once until it succeeds again
        :param settled: seconds after its end from which on a round is mirrored
        :param look_seconds: between two looks for new rounds
        """
        self._run, self._ledger, self._project, self._say = run, ledger, project, say
        self._settled, self._look_seconds = settled, look_seconds
        self._log = run.path / "log" / "wandb.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._done = _Mirrored()
        self._failing = False

    def work_until(self, stop: threading.Event) -> None:
        """Mirror until `stop` is set, and what is new then. Nothing that goes wrong here ends the run.

        The process lives in the calling thread, and no longer than this call.
        """
        try:
            while True:
                is_last = stop.is_set()
                error = self._mirror(stop)
                if error and not self._failing:
                    self._say(
                        f"wandb: {error} (the run goes on; it is tried again every {_RETRY_SECONDS / 60:.0f} min, and "
                        f"this is not said again; {self._log} has more)"
                    )
                self._failing = bool(error)
                if error:
                    self._end_process(0.0)
                if is_last:
                    return
                stop.wait(_RETRY_SECONDS if error else self._look_seconds)
        finally:
            self._end_process(_END_SECONDS)

    def _mirror(self, stop: threading.Event) -> str:
        """Returns what went wrong."""
        try:
            if self._process is None:
                self._start_process()
                self._done = self._answer(stop)
            while not self._done.error and (portion := self._news()) is not None:
                self._done = self._ask(portion, stop)
            return self._done.error
        except (StorageError, OSError) as error:
            return str(error)

    def _news(self) -> _Portion | None:
        """The next rounds and scores that are not mirrored; None: there are none."""
        before = time.time() - self._settled
        last = self._ledger.last_rounds(_LAST_ROUNDS)
        rounds: Iterable[RoundStatus] = last
        if last and last[0].round > self._done.round + 1:
            rounds = self._ledger.export_rounds(self._done.round - 1)  # from the last one on: a round's length needs it
        new: list[RoundStatus] = []
        for entry in rounds:
            if entry.round > self._done.round and entry.finished <= before:
                new.append(entry)
            if len(new) == _MOST_ROUNDS:
                break
        heldout = [entry for entry in self._ledger.heldout() if entry.round > self._done.heldout][:_MOST_ROUNDS]
        return _Portion(rounds=new, heldout=heldout) if new or heldout else None

    def _ask(self, portion: _Portion, stop: threading.Event) -> _Mirrored:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says nothing more
            self._process.stdin.write(portion.model_dump_json().encode() + b"\n")
        return self._answer(stop)

    def _answer(self, stop: threading.Event) -> _Mirrored:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + _ANSWER_SECONDS
        answered = select.poll()
        answered.register(self._process.stdout, select.POLLIN)
        while not answered.poll(500):
            if stop.is_set():
                deadline = min(deadline, time.monotonic() + _END_SECONDS)
            if time.monotonic() > deadline:
                return _Mirrored(error="its client does not answer")
        line = self._process.stdout.readline()
        try:
            return _Mirrored.model_validate_json(line)
        except ValidationError:
            return _Mirrored(error="its process ended")

    def _start_process(self) -> None:
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kantha.coordinator.mirror", self._run.path, self._project, str(os.getpid())],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the coordinator; and no terminal to ask for a key on
            )

    def _end_process(self, seconds: float) -> None:
        """:param seconds: that it gets to send the rest"""
        if self._process is None:
            return
        with self._process as process:  # closes its pipes, and waits
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            with contextlib.suppress(ProcessLookupError):  # the client's own process, too
                os.killpg(process.pid, signal.SIGKILL)
        self._process = None


class _Mirroring:
    """The process's side."""

    def __init__(self, run: RunDirectory, project: str) -> None:
        self._run, self._project = run, project
        self._state = run.path / "wandb" / _STATE
        self.done = _Mirrored()
        with contextlib.suppress(OSError, ValidationError):  # else all is sent once more
            self.done = _Mirrored.model_validate_json(self._state.read_bytes())

    def begin(self) -> Any:
        """Returns the client's run."""
        import wandb

        entity, _, project = self._project.rpartition("/")
        spec = self._run.spec
        run = wandb.init(
            entity=entity or None,
            project=project,
            id=f"kantha-{spec.fingerprint[:16]}",
            name=spec.name,
            resume="allow",
            dir=self._run.path,
            config=spec.model_dump(mode="json"),
            force=True,  # else it goes on without a key, and sends nothing
            settings=wandb.Settings(
                # nothing about this machine, its programs, or who runs them
                host="coordinator",
                username="coordinator",
                program="kantha",
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        run.define_metric("*", step_metric="round")
        return run

    def log(self, run: Any, portion: _Portion) -> None:
        for entry in portion.rounds:
            figures = entry.model_dump(exclude={"reason"}, exclude_none=True)
            run.log(
                {"round": figures.pop("round"), **{f"round/{name}": float(value) for name, value in figures.items()}}
            )
            self.done.round = entry.round
        for scores in portion.heldout:
            figures = scores.model_dump()
            run.log({"round": figures.pop("round"), **{f"heldout/{name}": value for name, value in figures.items()}})
            self.done.heldout = scores.round
        self._state.parent.mkdir(exist_ok=True)
        self._state.write_text(self.done.model_dump_json(), encoding="utf-8")


def main() -> None:
    signal_when_parent_dies(signal.SIGTERM)  # the client sends what it has when its program ends
    if os.getppid() != int(sys.argv[3]):
        return  # it is dead already
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    mirroring = _Mirroring(RunDirectory.open(Path(sys.argv[1])), sys.argv[2])
    try:
        run = mirroring.begin()
        answers.write(mirroring.done.model_dump_json() + "\n")
        for line in sys.stdin:
            mirroring.log(run, _Portion.model_validate(json.loads(line)))
            answers.write(mirroring.done.model_dump_json() + "\n")
        run.finish()
    except Exception as error:  # noqa: BLE001  whatever the client raises is told, and that is all
        answers.write(_Mirrored(error=printable(f"{type(error).__name__}: {error}", 300)).model_dump_json() + "\n")


if __name__ == "__main__":
    main()
