"""Starts `kantha` commands as real processes, and waits for what they do."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import psutil

from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import RunStatus
from kantha.spec import (
    DataSpec,
    FileSource,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    SwarmSpec,
    TokenizerSpec,
)

LEAVE_SECONDS = 60.0
_WORDS = ["আমি", "তুমি", "নদী", "পাখি", "গান", "ফুল", "আকাশ", "বাতাস", "বই", "গ্রাম", "মানুষ", "জল", "আলো", "মেঘ"]


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until the condition holds; fails with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)


class Command:
    """One running `kantha` command; its output goes to a file."""

    def __init__(self, folder: Path, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kantha", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "KANTHA_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1", **(env or {})},
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def family(self) -> list[psutil.Process]:
        """This process and everything that it started."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def kill(self) -> None:
        """As `kill -9`, and nothing of it may survive for long."""
        family = self.family()
        self.process.kill()
        self.process.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"{self.name} was killed, but {alive} live on"

    def leave(self) -> int:
        """As Ctrl-C or `kill`: ask it to end, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=LEAVE_SECONDS)


class Run:
    """A served run, and the volunteers that a test starts."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.folder = folder
        self.run_dir = run_dir
        self.commands: list[Command] = []
        self.url = ""

    def serve(self, port: int = 0, *options: str) -> Command:
        command = self.start("coordinator", "serve", str(self.run_dir), "--port", str(port), *options)
        offset = len(command.output())

        def answers() -> bool:
            assert command.process.poll() is None, command.output()
            lines = [line for line in command.output().splitlines() if line.startswith("the run's page: ")]
            if lines:
                self.url = lines[-1].split()[-1]
            return bool(self.url) and self.status() is not None

        wait_for(answers, 60, f"the coordinator answers ({command.output()[offset:]})")
        return command

    def join(self, name: str, *options: str, label: str = "", env: Mapping[str, str] | None = None) -> Command:
        """:param label: of the command, where one person has several"""
        arguments = ["join", self.url, "--name", name, "--threads", "1", "--micro-batch", "4", *options]
        return self.start(label or name, *arguments, env=env)

    def start(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> Command:
        command = Command(self.folder, name, *arguments, env=env)
        self.commands.append(command)
        return command

    def status(self) -> RunStatus | None:
        try:
            return RunStatus.model_validate_json(httpx.get(f"{self.url}/api/v1/status", timeout=5.0).content)
        except (httpx.TransportError, ValueError):
            return None

    def wait_for_round(self, number: int, seconds: float) -> RunStatus:
        wait_for(
            lambda: (s := self.status()) and s.rounds and s.round >= number, seconds, f"round {number}\n{self.story()}"
        )
        status = self.status()
        assert status is not None
        return status

    def wait_for_volunteer(self, name: str, seconds: float) -> None:
        """Until samples of this volunteer count."""
        wait_for(
            lambda: (s := self.status()) and any(v.name == name and v.samples > 0 for v in s.volunteers),
            seconds,
            f"{name} contributes\n{self.story()}",
        )

    def story(self) -> str:
        """What all of them said last, for the message of a failed test."""
        return "\n".join(f"--- {c.name} ---\n{c.output()[-1500:]}" for c in self.commands)

    def end(self) -> None:
        for command in self.commands:
            if command.process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in command.family():
                        process.kill()
                command.process.wait()


@contextlib.contextmanager
def served(folder: Path, run_dir: Path) -> Iterator[Run]:
    """A run whose processes have all ended when the block is left."""
    run = Run(folder, run_dir)
    try:
        yield run
    finally:
        run.end()


def small_run(folder: Path) -> Path:
    """A run on made-up Bengali sentences; rounds of seconds: reports carry the last 32, for who looks away."""
    rng = random.Random(7)
    sentences = [[" ".join(rng.choices(_WORDS, k=6)) + "।" for _ in range(4)] for _ in range(400)]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(document) for document in sentences), encoding="utf-8")
    spec = RunSpec(
        name="test run",
        model=ModelSpec(
            embedding_size=16, hidden_size=32, intermediate_size=64, layers=2, attention_heads=2, max_positions=32
        ),
        tokenizer=TokenizerSpec(vocab_size=200),
        data=DataSpec(sources=(FileSource(kind="file", path=str(corpus)),), sequence_length=32, heldout_share=0.05),
        optimizer=OptimizerSpec(learning_rate=1e-2),
        schedule=ScheduleSpec(warmup_samples=32),
        swarm=SwarmSpec(target_batch_size=3_000, matchmaking_seconds=1.5, averaging_timeout=20.0, checkpoint_rounds=2),
    )
    run_dir = folder / "run"
    RunDirectory.create(run_dir, spec, lambda _: None)
    return run_dir
