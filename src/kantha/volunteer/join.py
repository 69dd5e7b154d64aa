"""The main job, on one page: join a run by its link, train, report, leave.

describe → membership → snapshot → swarm → ( batch → gradients → hand over )* → goodbye
"""

import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from rich.console import Console

from kantha.api import RunDescription
from kantha.corpus import ExampleStream, load_tokenizer
from kantha.errors import PlatformError, SwarmError
from kantha.spec import RunSpec
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
    with CoordinatorClient(url) as client:
        description, spec = client.describe()
        console.print(f"{spec.name}: {spec.goal}", markup=False, soft_wrap=True)
        folder = PeerFolder(description.fingerprint, options.username)
        log_to_file(folder.log)
        identity = folder.identity
        request_membership(client, description, identity, options.username, "local")
        console.print(
            f"let in as {options.username}; loading the state of round {description.snapshot.round}",
            markup=False,
            soft_wrap=True,
        )
        replica = fetch_replica(client, description, spec, folder, console)
    tokenizer = load_tokenizer(folder.run_folder / "tokenizer.json", spec.tokenizer.sha256)
    outbound_only = options.outbound_only
    if outbound_only is None:
        outbound_only = urlsplit(client.url).hostname not in ("127.0.0.1", "localhost", "::1")
    node = Node(description.fingerprint, identity, bootstrap=description.bootstrap, outbound_only=outbound_only)
    try:
        engine = HivemindEngine(
            node, spec.swarm, replica.parameters, replica.optimizer, replica.schedule, replica.round
        )
        try:
            # peers of one run differ in their keys, so the key seeds a walk through the data that is this peer's own
            stream = ExampleStream(spec, tokenizer, peer_seed=int.from_bytes(identity.peer_id.encode()[-6:]))
            device = choose_device()
            trainer = Trainer(spec, device)
            session = Session(describe_device(device))
            session.handed_over(None, engine.round)
            batch = options.micro_batch or (_GPU_BATCH if device.type == "cuda" else _CPU_BATCH)
            with (
                VolunteerConsole(spec.name, client.url, options.username, session, engine, console) as screen,
                _stop_signals(screen) as stop,
                _Reporter(node, engine, session) as reporter,
            ):
                train(stream, batch, trainer, engine, replica, session, screen, reporter, stop)
        finally:
            engine.close()
    finally:
        node.close()
    console.print(
        f"left after {(time.monotonic() - session.started) / 60:.1f} minutes: {session.counted} of your samples count. "
        f"Thank you! `kantha join {url}` comes back any time.",
        markup=False,
        soft_wrap=True,
    )


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
    trainer.load(replica.parameters)
    while not stop.is_set():
        reporter.raise_if_failed()
        began = time.monotonic()
        gradients = trainer.compute(stream.next_batch(batch_size))
        if gradients is None:
            continue
        session.computed(gradients, time.monotonic() - began)
        result = engine.contribute(gradients.tensors, gradients.samples)
        session.handed_over(result, engine.round)
        trainer.load(replica.parameters)
        screen.tick(round_ended=result is not None)


def fetch_replica(
    client: CoordinatorClient, description: RunDescription, spec: RunSpec, folder: PeerFolder, console: Console
) -> Replica:
    """The run's tokenizer and newest checkpoint, downloaded unless they are here, checked and loaded."""
    snapshot = folder.path / "snapshot"
    files = [(description.tokenizer, folder.run_folder / "tokenizer.json")]
    files += [(file, snapshot / name) for name, file in description.snapshot.files.items()]
    with download_progress(console) as progress:
        for file, target in files:
            if target.exists() and file.matches(target):
                continue
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

    def __init__(self, node: Node, engine: Engine, session: Session) -> None:
        self._node = node
        self._engine = engine
        self._session = session
        self._roster = Roster()
        self._stop = threading.Event()
        self._error: SwarmError | None = None
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)

    def __enter__(self) -> "_Reporter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Say goodbye: the last rounds reach the coordinator even if it looks a little later."""
        self._stop.set()
        self._thread.join()
        self._session.leave()
        if self._error is None:
            try:
                self._node.publish(self._session.report())
            except SwarmError as error:
                warnings.warn(f"the goodbye reached nobody: {error}", stacklevel=1)

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            if not self._node.is_alive():
                self._error = SwarmError("this machine's swarm process ended unexpectedly; join again")
                return
            try:
                self._node.publish(self._session.report())
                self._roster.update(self._node.reports())
            except SwarmError:
                pass  # shown as an absent coordinator until it works again
            trainers, averagers = self._roster.present("trainer"), self._roster.present("averager")
            self._engine.see_averagers(len(averagers))
            session = self._session
            session.peers = len(trainers)
            session.coordinator_here = bool(averagers)
            session.swarm_speed = sum(report.samples_per_second for report, _ in trainers.values())
            session.swarm_samples = sum(
                report.samples for report, _ in trainers.values() if report.round == session.round
            )
            if not averagers:
                self._node.rejoin()
            if self._stop.wait(RENEWAL):
                return


@contextmanager
def _stop_signals(screen: VolunteerConsole) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask the loop to end; a second one ends it at once. hivemind ignores SIGINT, so set it anew."""
    stop = threading.Event()

    def ask(_signum: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        screen.say_leaving()

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    sys.stdout.flush()
