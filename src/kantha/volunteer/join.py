"""The main job, on one page: join a run by its link, train, report, leave.

describe → membership → snapshot → swarm → ( batch → gradients → hand over )* → goodbye
"""

import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from rich.console import Console

from kantha.api import RunDescription
from kantha.corpus import Batch, ExampleStream, load_tokenizer
from kantha.errors import CorpusError, PlatformError, SwarmError
from kantha.spec import FileSource, RunSpec
from kantha.swarm.engine import Engine
from kantha.swarm.hivemind_engine import HivemindEngine
from kantha.swarm.node import Node, log_to_file
from kantha.swarm.reports import RENEWAL, Roster
from kantha.training import Replica, Trainer, choose_device, describe_device
from kantha.volunteer.client import CoordinatorClient, request_membership
from kantha.volunteer.console import VolunteerConsole, download_progress
from kantha.volunteer.folders import PeerFolder
from kantha.volunteer.session import Session

_CPU_BATCH, _GPU_BATCH = 8, 32  # examples computed at once
_HAND_OVER_SECONDS = 1.0
_LARGE = 5_000_000  # bytes from which on a download is worth a line where no bar is drawn
_GOODBYES = 3  # attempts to say goodbye
_DROPPED_IN_A_ROW = 50  # gradients that are not finite before a volunteer gives up; fp16 drops some at the start
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JoinOptions:
    """What the volunteer decides."""

    username: str
    threads: int | None = None  # CPU threads; None: as many as PyTorch likes
    micro_batch: int | None = None  # examples computed at once; None: by device
    outbound_only: bool | None = None  # accept no connections; None: only on the coordinator's own machine


def join(url: str, options: JoinOptions, console: Console) -> None:
    """Take part in the run at `url` until told to stop (SIGINT, SIGTERM). Raises `KanthaError`s."""
    check_platform()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _StopSignals(console) as signals:
        with CoordinatorClient(url) as client:
            description, spec = client.describe()
            _say(console, f"{spec.name}: {spec.goal}")
            folder = PeerFolder(description.fingerprint, options.username)
            log_to_file(folder.log)
            identity = folder.identity
            request_membership(client, description, identity, options.username, "local")
            _say(console, f"let in as {options.username}; loading the state of round {description.snapshot.round}")
            replica = fetch_replica(client, description, spec, folder, console)
        tokenizer = load_tokenizer(folder.path / "snapshot" / "tokenizer.json", spec.tokenizer.sha256)
        is_here = urlsplit(client.url).hostname in ("127.0.0.1", "localhost", "::1")
        if not is_here and any(isinstance(source, FileSource) for source in spec.data.sources):
            raise CorpusError(f"{url}: the run's text is in files of the coordinator's machine; only that one can join")
        with (
            closing(
                Node(
                    spec.fingerprint,
                    identity,
                    bootstrap=description.bootstrap,
                    listen=["/ip4/127.0.0.1/tcp/0" if is_here else "/ip4/0.0.0.0/tcp/0"],
                    outbound_only=not is_here if options.outbound_only is None else options.outbound_only,
                )
            ) as node,
            closing(
                HivemindEngine(node, spec.swarm, replica.parameters, replica.optimizer, replica.schedule, replica.round)
            ) as engine,
        ):
            signals.install()
            # peers of one run differ in their keys, so the key seeds a walk through the data that is this peer's own
            stream = ExampleStream(spec, tokenizer, peer_seed=int.from_bytes(identity.peer_id.encode()[-6:]))
            device = choose_device()
            trainer = Trainer(spec, device)
            batch = options.micro_batch or (_GPU_BATCH if device.type == "cuda" else _CPU_BATCH)
            session = Session(describe_device(device), engine.round)
            with (
                VolunteerConsole(
                    spec.name, client.url, options.username, session, engine, console, signals.stop
                ) as screen,
                _Reporter(node, engine, session, signals.fail) as reporter,
            ):
                signals.stop_ends_loop = True
                train(stream, batch, trainer, engine, replica, session, screen, reporter, signals.stop)
            _say(console, "leaving the swarm …")
        _say(
            console,
            f"left after {(time.monotonic() - session.started) / 60:.1f} minutes: {session.counted} of your samples "
            f"count. Thank you! `kantha join {url}` comes back any time.",
        )


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def train(
    stream: ExampleStream,
    batch_size: int,
    trainer: Trainer,
    engine: Engine,
    replica: Replica,
    session: Session,
    screen: VolunteerConsole,
    reporter: "_Reporter",
    stop: threading.Event,
) -> None:
    """The loop that ties training to swarm, until `stop` is set."""
    dropped = 0
    trainer.load(replica.parameters)
    while not stop.is_set():
        reporter.raise_if_failed()
        began = time.monotonic()
        gradients = trainer.compute(_batches(stream, batch_size))
        if gradients is None:
            dropped += 1
            if dropped == _DROPPED_IN_A_ROW:
                raise SwarmError(
                    f"the last {dropped} gradients were not finite: the model diverged; tell the organizer"
                )
            continue
        dropped = 0
        session.computed(gradients, time.monotonic() - began)
        result = engine.contribute(gradients.tensors, gradients.samples)
        session.handed_over(result, engine.round)
        trainer.load(replica.parameters)
        screen.tick(round_ended=result is not None)


def _batches(stream: ExampleStream, size: int) -> Iterator[Batch]:
    """Batches for about a second: handing over costs a copy and a word to the swarm, however much is handed over."""
    deadline = time.monotonic() + _HAND_OVER_SECONDS
    while True:
        yield stream.next_batch(size)
        if time.monotonic() > deadline:
            return


def fetch_replica(
    client: CoordinatorClient, description: RunDescription, spec: RunSpec, folder: PeerFolder, console: Console
) -> Replica:
    """The run's newest checkpoint, its tokenizer included, downloaded unless it is here, checked and loaded."""
    snapshot = folder.path / "snapshot"
    with download_progress(console) as progress:
        for name, file in description.snapshot.files.items():  # the names are known ones, see `Snapshot`
            target = snapshot / name
            if target.exists() and file.matches(target):
                continue
            if not console.is_terminal and file.size > _LARGE:
                _say(console, f"downloading {name}, {file.size / 1e6:.0f} MB")
            task = progress.add_task(target.name, total=file.size)
            client.download(file, target, lambda done, task=task: progress.advance(task, done))  # type: ignore[misc]
    replica = Replica(spec)
    replica.load(snapshot)
    return replica


def check_platform() -> None:
    """Raises `PlatformError` where the swarm's libp2p daemon does not run."""
    system, machine = platform.system(), platform.machine()
    if (system, machine) != ("Linux", "x86_64"):
        advice = "WSL2 works on Windows" if system == "Windows" else "a Kaggle or Colab notebook works from any machine"
        raise PlatformError(
            f"{system} on {machine} cannot take part: the swarm's daemon is for Linux on x86-64; {advice}"
        )


class _Reporter:
    """Reports in the background, and watches the swarm; a context manager around the training loop."""

    def __init__(self, node: Node, engine: Engine, session: Session, fail: Callable[[Exception], None]) -> None:
        self._node = node
        self._fail = fail
        self._engine = engine
        self._session = session
        self._roster = Roster()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def __enter__(self) -> "_Reporter":
        self._exchange()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say goodbye: the last rounds reach the coordinator even if it looks a little later."""
        self._stop.set()
        self._thread.join()
        self._session.leave()
        for _attempt in range(_GOODBYES if self._error is None else 0):
            try:
                self._node.publish(self._session.report())
                return
            except SwarmError as error:
                _log.warning("the goodbye reached nobody: %s", error)

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(RENEWAL):
                if not (self._node.is_alive() and self._engine.is_alive()):
                    raise SwarmError("a swarm process of this machine ended unexpectedly; join again")
                self._exchange()
        except Exception as error:  # noqa: BLE001  raised again by the training loop, in the main thread
            _log.exception("the reporter stopped")
            self._error = error
            self._fail(error)

    def _exchange(self) -> None:
        """Tell the swarm of this peer, and look who else is there."""
        session = self._session
        try:
            self._node.publish(session.report())
            self._roster.update(self._node.reports())
            if not self._roster.present("averager"):
                self._node.rejoin()
        except SwarmError as error:
            _log.warning("%s", error)  # the console says that the coordinator does not answer
        trainers, averagers = self._roster.present("trainer"), self._roster.present("averager")
        self._engine.see_averagers(len(averagers), max((report.round for report, _ in averagers.values()), default=0))
        session.peers = len(trainers)
        session.coordinator_here = bool(averagers)
        session.swarm_speed = sum(report.samples_per_second for report, _ in trainers.values())
        session.swarm_samples = sum(report.samples for report, _ in trainers.values() if report.round == session.round)


class _StopSignals:
    """SIGINT and SIGTERM end the training loop after what is under way; before it they end the program, twice at once.

    A context manager. hivemind ignores SIGINT in a process that makes an averager, so `install` again after that.
    """

    def __init__(self, console: Console) -> None:
        self.stop = threading.Event()
        self.stop_ends_loop = False
        self._error: Exception | None = None
        self._console = console
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_StopSignals":
        self._before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def install(self) -> None:
        for signum in self._before:
            signal.signal(signum, self._ask)

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def fail(self, error: Exception) -> None:
        """From another thread: raise `error` in the main thread, which may be waiting for a process that is gone."""
        self._error = error
        os.kill(os.getpid(), signal.SIGTERM)

    def _ask(self, _signum: int, _frame: object) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self.stop.is_set():  # asked before: hivemind may wait for an averaging; the kernel ends our children with us
            if self._console.is_terminal:
                self._console.show_cursor(True)
            os._exit(130)
        self.stop.set()
        if not self.stop_ends_loop:
            raise KeyboardInterrupt
