"""The main job, on one page: join a run by its link, train, report, leave.

describe → membership → swarm → snapshot → ( batch → gradients → hand over )* → hand in, goodbye
"""

import getpass
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from pydantic import SecretStr
from rich.console import Console
from tokenizers import Tokenizer

from kantha.api import RunDescription
from kantha.corpus import Batch, ExampleStream, Feed, load_tokenizer
from kantha.errors import CorpusError, MembershipError, PlatformError, ProcessEndedError, SwarmError, printable
from kantha.spec import FileSource, RunSpec
from kantha.swarm.guard import Guard
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import DownloadRequest
from kantha.swarm.node import Node, log_to_file
from kantha.swarm.processes import start_again
from kantha.swarm.reports import PRESENT
from kantha.swarm.rounds_engine import RoundsEngine
from kantha.training import Replica, Trainer, choose_device, describe_device, peak_flops
from kantha.volunteer.client import CoordinatorClient
from kantha.volunteer.console import VolunteerConsole, download_progress, state_progress
from kantha.volunteer.folders import PeerFolder
from kantha.volunteer.membership import Applicant, News, Renewal, enter, trust_run
from kantha.volunteer.service import find_service
from kantha.volunteer.session import Session
from kantha.volunteer.tokens import read_only_token

_log = logging.getLogger(__name__)
_HAND_OVER_SECONDS = 1.0
_KEPT_SECONDS = 600.0  # for a coordinator that is away when the run ends
_TEXT_SECONDS = 0.5  # between two looks, while a source gives no text, at what else there is to do
_PAUSED_SECONDS = 0.5  # between two looks whether the run goes on
_NOTE_SECONDS = 30.0  # between two notes of the place in the data, which a killed program goes on from
_LARGE = 5_000_000  # bytes from which on a download is worth a line where no bar is drawn
_NO_PEER_SECONDS = 60.0  # without a piece of the state from any peer, until the checkpoint is downloaded instead
_DROPPED_IN_A_ROW = 50  # gradients that are not finite before a volunteer gives up; fp16 drops some at the start


@dataclass(frozen=True)
class JoinOptions:
    """What the volunteer decides."""

    username: str = ""  # in a run without sign-in; empty: that of the user of this machine
    threads: int | None = None  # CPU threads; None: as many as PyTorch likes
    micro_batch: int | None = None  # examples computed at once; None: by device
    outbound_only: bool | None = None  # accept no connections; None: only on the coordinator's own machine
    token: bool = False  # sign in by a Hugging Face token, where there is no browser
    take_over: bool = False  # end this volunteer's other instances on this service


def join(url: str, options: JoinOptions, console: Console) -> None:
    """Take part in the run at `url` until told to stop (SIGINT, SIGTERM). Raises `KanthaError`s.

    Where a child process that this program needs is gone (p2pd crashed, or the kernel killed it), it starts again.
    """
    try:
        _join(url, options, console)
    except ProcessEndedError as error:
        start_again(error, lambda line: _say(console, line))


def _join(url: str, options: JoinOptions, console: Console) -> None:
    check_platform()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _StopSignals(console) as signals, CoordinatorClient(url) as client:
        description, spec = client.describe()
        _say(console, f"{spec.name}: {spec.goal}")
        username = _name(description, options, console)
        folder = PeerFolder(description.fingerprint, username)
        log_to_file(folder.log)
        trust = trust_run(client, description, folder)
        identity = folder.identity
        applicant = Applicant(identity, spec.fingerprint, *find_service(), username)
        admission = enter(
            client,
            trust,
            applicant,
            console,
            signals.stop,
            take_over=options.take_over,
            token=_token(client, description, options, console),
        )
        username = admission.certificate.membership.username
        tokenizer = load_tokenizer(fetch_tokenizer(client, description, folder), spec.tokenizer.sha256)
        is_here = urlsplit(client.url).hostname in ("127.0.0.1", "localhost", "::1")
        if not is_here and any(isinstance(source, FileSource) for source in spec.data.sources):
            raise CorpusError(f"{url}: the run's text is in files of the coordinator's machine; only that one can join")
        _say(console, f"let in as {username}; looking for the others …")
        replica = Replica(spec)
        with (
            Renewal(client, applicant, admission, lambda line: _say(console, line), signals.stop) as renewal,
            closing(
                Node(
                    identity,
                    Guard(trust, admission.certificate),
                    bootstrap=description.bootstrap,
                    listen=["/ip4/127.0.0.1/tcp/0" if is_here else "/ip4/0.0.0.0/tcp/0"],
                    outbound_only=not is_here if options.outbound_only is None else options.outbound_only,
                )
            ) as node,
            _kept_notice(node, folder),
            closing(
                RoundsEngine(
                    node,
                    spec.swarm,
                    replica.parameters,
                    replica.optimizer,
                    replica.schedule,
                    round_number=None,
                    folder=folder.path / "swarm",
                )
            ) as engine,
        ):
            renewal.start(node.set_certificate, lambda notice: _hear(notice, node, folder))
            signals.install()
            device = choose_device()
            session = Session(describe_device(device), engine, peak_flops(device), folder.load_given())
            engine.complete = session.complete
            trainer = Trainer(spec, device)
            trainer.prepare(options.micro_batch, lambda line: _say(console, line))  # the state is on its way meanwhile
            load_state(client, spec, folder, engine, console, identity)
            # peers of one run differ in their keys, so the key seeds a walk through the data that is this peer's own
            stream = open_stream(spec, tokenizer, identity.peer_id, folder)
            news = News(trust, folder)
            with (
                Feed(stream, trainer.micro_batch) as feed,
                VolunteerConsole(
                    spec.name, client.url, username, session, engine, news, console, signals.stop
                ) as screen,
            ):
                signals.stop_ends_loop = True
                train(feed, trainer, engine, replica, session, screen, news, folder, signals.stop)
            renewal.raise_if_ended()  # who may not stay cannot hand anything in either
            if engine.schedule_state.is_finished:
                _say(console, f"the run is finished: its model is annealed, after round {engine.round}")
                wait_until_kept(engine, signals.stop, console)
            else:
                _say(console, "leaving: what is computed is handed in …")
            for result in engine.leave():
                session.ended(result)
            folder.save_given(session.counted_in_all)
            engine.say_goodbye()
        _say(
            console,
            f"left after {(time.monotonic() - session.started) / 60:.1f} minutes: {session.counted} of your samples "
            f"count{session.pace}. {_since_first(session)}Thank you!"
            + ("" if engine.schedule_state.is_finished else f" `kantha join {url}` comes back any time."),
        )


def _since_first(session: Session) -> str:
    return f"With those before, {session.counted_in_all}. " if session.counted_before else ""


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def open_stream(spec: RunSpec, tokenizer: Tokenizer, peer_id: str, folder: PeerFolder) -> ExampleStream:
    """This peer's walk through the data, from where it was the last time."""
    # peers of one run differ in their keys, so the key seeds a walk that is this peer's own
    seed, place = int.from_bytes(peer_id.encode()[-6:]), folder.load_place()
    try:
        return ExampleStream(spec, tokenizer, seed, place)
    except ValueError as error:
        _log.warning("starts its walk through the data anew: %s", error)
        return ExampleStream(spec, tokenizer, seed)


def train(
    feed: Feed,
    trainer: Trainer,
    engine: RoundsEngine,
    replica: Replica,
    session: Session,
    screen: VolunteerConsole,
    news: News,
    folder: PeerFolder,
    stop: threading.Event,
) -> None:
    """The loop that ties training to swarm, until `stop` is set. It computes all the time: the engine never waits.

    Only while the moderators pause the run, nothing is computed.
    """
    dropped, version = 0, None
    ended = noted = time.monotonic()
    while not (stop.is_set() or engine.schedule_state.is_finished):
        if news.paused:
            folder.save_place(feed.state)
            wait_while_paused(news, engine, session, screen, stop)
            ended = time.monotonic()  # nobody waited for the network
            continue
        with engine.hold() as newest:
            if newest != version:
                trainer.load(replica.parameters)
                version = newest
        if not feed.wait(_TEXT_SECONDS):
            engine.raise_if_failed()
            screen.tick(round_ended=False, waits_for="text")
            continue
        began = time.monotonic()
        gradients = trainer.compute(_batches(feed))
        waited, ended = began - ended, time.monotonic()
        if trainer.micro_batch < feed.size:
            feed.size = trainer.micro_batch
            screen.say(f"memory did not suffice: from now on {feed.size} examples at once; nothing is lost")
        if ended - noted > _NOTE_SECONDS:
            folder.save_place(feed.state)
            noted = ended
        if gradients is None:
            dropped += 1
            if dropped == _DROPPED_IN_A_ROW:
                raise SwarmError(
                    f"the last {dropped} gradients were not finite: the model diverged; tell the organizer"
                )
            continue
        dropped = 0
        session.computed(gradients, ended - began, waited)
        result = engine.contribute(gradients.tensors, gradients.samples)
        if result is not None:
            session.ended(result)
            folder.save_given(session.counted_in_all)
        screen.tick(round_ended=result is not None)
    folder.save_place(feed.state)


def wait_while_paused(
    news: News, engine: RoundsEngine, session: Session, screen: VolunteerConsole, stop: threading.Event
) -> None:
    """Until the moderators let the run go on. What is under way in the swarm is finished meanwhile."""
    said = ""
    while (reason := news.paused) and not (stop.is_set() or engine.schedule_state.is_finished):
        session.paused = reason
        if reason != said:
            said = reason
            screen.say(
                f"⏸ the moderators paused the run: {printable(reason)} – nothing is lost, and it goes on by itself "
                "(Ctrl-C leaves)"
            )
        result = engine.ended_round()
        if result is not None:
            session.ended(result)
        screen.tick(round_ended=result is not None)
        stop.wait(_PAUSED_SECONDS)
    session.paused = ""
    if not news.paused:
        screen.say("▶ the run goes on")


def _name(description: RunDescription, options: JoinOptions, console: Console) -> str:
    """The name to ask for: empty where people sign in. Raises `MembershipError` where there is none."""
    if description.sign_in != "local":
        if options.username:
            _say(console, "people sign in to this run, so --name is not used: your name is the one you sign in with")
        return ""
    try:
        return options.username or getpass.getuser()
    except (OSError, KeyError, ImportError):  # in a container, a user may have no name
        raise MembershipError("this machine does not know your user name; give a name with --name") from None


def _token(
    client: CoordinatorClient, description: RunDescription, options: JoinOptions, console: Console
) -> Callable[[], SecretStr] | None:
    """What gives a token to sign in with, if one is wanted. Raises `SignInError` where it must not be sent."""
    if not options.token:
        return None
    if description.sign_in == "local":
        _say(console, "nobody signs in to this run, so --token is not used: no token was read or sent")
        return None
    client.check_token_may_travel()
    return read_only_token


def _hear(notice: str, node: Node, folder: PeerFolder) -> None:
    node.take_notice(notice)
    folder.save_notice(node.notice())  # now: a program that is killed saves nothing


@contextmanager
def _kept_notice(node: Node, folder: PeerFolder) -> Iterator[None]:
    """What the organizer took back stays taken back when this program starts again, whoever it was heard from."""
    try:
        yield
    finally:
        folder.save_notice(node.notice())


def wait_until_kept(engine: RoundsEngine, stop: threading.Event, console: Console) -> None:
    """Until the coordinator has the run's end: if all left while it is away, the end would be lost."""
    deadline, said = time.monotonic() + _KEPT_SECONDS, False
    while not (engine.is_kept or stop.wait(_TEXT_SECONDS)):
        engine.raise_if_failed()
        if time.monotonic() > deadline:
            _say(console, f"the coordinator did not fetch the end within {_KEPT_SECONDS / 60:.0f} min")
            return
        if not said and time.monotonic() > deadline - _KEPT_SECONDS + PRESENT:
            said = True
            _say(console, "the coordinator does not have the last round yet; waiting for it (Ctrl-C leaves) …")


def _batches(feed: Feed) -> Iterator[Batch]:
    """Batches for about a second: handing over costs a copy and a word to the swarm, however much is handed over."""
    deadline = time.monotonic() + _HAND_OVER_SECONDS
    yield feed.next_batch()
    while (left := deadline - time.monotonic()) > 0 and feed.wait(left):
        yield feed.next_batch()


def fetch_tokenizer(client: CoordinatorClient, description: RunDescription, folder: PeerFolder) -> Path:
    """The run's tokenizer, downloaded unless it is here."""
    target = folder.path / "snapshot" / "tokenizer.json"
    if not (target.exists() and description.tokenizer.matches(target)):
        client.download(description.tokenizer, target, lambda done: None)
    return target


def load_state(
    client: CoordinatorClient,
    spec: RunSpec,
    folder: PeerFolder,
    engine: RoundsEngine,
    console: Console,
    identity: PeerIdentity,
) -> None:
    """Until there are weights to compute with: from the swarm's peers, or, where they give none, over HTTP."""
    known, since = None, time.monotonic()
    with state_progress(console) as progress:
        bar = progress.add_task("the model's state", total=None)
        while not engine.wait_weights(0.2):
            if engine.loading != known:
                known, since = engine.loading, time.monotonic()
            if known is not None:
                progress.update(bar, completed=known[1], total=known[2])
            if time.monotonic() - since > _NO_PEER_SECONDS:
                break
    if not engine.wait_weights(0.0):
        _say(console, "no peer gives the swarm's state; downloading the coordinator's last checkpoint")
        description, _ = client.describe()  # the checkpoint of the beginning may be gone by now
        loaded = fetch_replica(client, description, spec, folder, console, identity)
        engine.take_over(loaded.parameters, loaded.optimizer, loaded.round, loaded.lineage, loaded.schedule_state)


def fetch_replica(
    client: CoordinatorClient,
    description: RunDescription,
    spec: RunSpec,
    folder: PeerFolder,
    console: Console,
    identity: PeerIdentity,
) -> Replica:
    """The run's newest checkpoint, its tokenizer included, downloaded unless it is here, checked and loaded.

    :param identity: a member's; others are refused
    """
    snapshot = folder.path / "snapshot"

    def sign() -> DownloadRequest:
        return DownloadRequest.signed(identity, description.fingerprint)

    with download_progress(console) as progress:
        for name, file in description.snapshot.files.items():  # the names are known ones, see `Snapshot`
            target = snapshot / name
            if target.exists() and file.matches(target):
                continue
            if not console.is_terminal and file.size > _LARGE:
                _say(console, f"downloading {name}, {file.size / 1e6:.0f} MB")
            task = progress.add_task(target.name, total=file.size)
            client.download(file, target, lambda done, task=task: progress.advance(task, done), sign)  # type: ignore[misc]
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


class _StopSignals:
    """SIGINT and SIGTERM end the training loop after what is under way; before it they end the program, twice at once.

    A context manager. hivemind ignores SIGINT in a process that makes an averager, so `install` again after that.
    """

    def __init__(self, console: Console) -> None:
        self.stop = threading.Event()
        self.stop_ends_loop = False
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

    def _ask(self, _signum: int, _frame: object) -> None:
        if self.stop.is_set():  # asked before: hivemind may wait for an averaging; the kernel ends our children with us
            if self._console.is_terminal:
                self._console.show_cursor(True)
            os._exit(130)
        self.stop.set()
        if not self.stop_ends_loop:
            raise KeyboardInterrupt
