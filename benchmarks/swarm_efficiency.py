"""Which share of its peers' computing does a swarm turn into rounds, and how long does a joiner wait?

Two engines side by side: `kantha` (ours) and `hivemind` (`hivemind.Optimizer`, with the settings of its own ALBERT
example). Real: the processes, the network stack, 18 million fp32 values with two Adam moments each, LAMB. Emulated: the
accelerator, a sleep of 8 samples a second, handed over once a second. A hand-over that takes under a second costs it
nothing; through a longer one it stands still. Each peer has a network namespace of its own, with an address that looks
public (libp2p leaves out private ones), on a link shaped in both directions; a bridge in one more namespace joins them,
and nothing leads out. Where namespaces are missing, the peers meet unshaped on loopback, and the output says so.

    A  4 peers, 100 Mbit/s, 1024 samples a round: ideally 32 s
    B  4 peers, 100 Mbit/s,  512 samples a round: ideally 16 s
    C  4 peers,  20 Mbit/s, 1024 samples a round: ideally 32 s
    D  as A; every minute the oldest peer is killed (SIGKILL to it and all that it started) and a fresh one started

In A to C two peers start at once; a third and a fourth, the late joiners, after 0.25 and 0.4 of the window. In D four
start at once, and every replacement is a late joiner.

Definitions:

* A peer's clock starts when its program, libraries loaded and tensors made, begins to enter the swarm: before its DHT
  is there, so that finding the others and fetching the state count. It stops when the peer is killed.
* A peer has finished a round when an averaging of gradients, its own among them, ended whole: every part of every
  member arrived, and there was at least one other member. (Nobody is alone here: a round by oneself is one that the
  others do not have.)
* share of ideal: the peers' own samples in finished rounds, over 8/s x every peer's time on the clock. The window is
  from the first peer's start until the newest sample of the last finished round was handed over: what is computed while
  that round is averaged belongs to the next one, which is cut off by the end and counts neither way.
* join seconds: from a late joiner's start until the first sample that went into a finished round was handed over. A
  joiner without one counts as if that had been at the end of the run (or when it was killed).
* MB per peer and round: bytes sent and received at the peers' interfaces until the last finished round (the counters
  are read up to 0.1 s later), over the rounds that each peer finished. State for joiners and failed attempts are part
  of it. None on loopback.
* rounds: how many different rounds any peer finished. Failed attempts are added up over the peers.

How samples are counted. kantha: `RoundResult.samples`; the engine has no results that are not whole. Had two groups
finished the same round, only what more peers have would count, and a line would say so. hivemind: subclasses that
change nothing note `local_samples_accumulated`, which is the weight, when `Optimizer` hands its accumulated gradients
to `GradientAverager.step`, and count it when that averaging has returned a group and, in the averager's process, no
part had failed and no sender had been banned. This is kind to it: where four peers average two by two, all four are
counted, and so is a gradient that was computed on older weights. What it drops when it is out of sync, and steps on
local gradients alone, are not counted; an update without a whole averaging is a failed attempt.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # only the peers need PyTorch; `--help` does not wait for it
    import torch

PEERS = 4
RATE = 8  # samples per second and peer
HAND_OVER = 1.0  # seconds of computing that make a batch
REPLACE_EVERY = 60.0  # seconds, in D
LATE = (0.25, 0.4)  # of the window, in A to C
SPARES = 6  # peers of D that wait with their libraries loaded
LOADING_SECONDS = 300.0  # for a peer to load its libraries, before the run is given up
READY_SECONDS = 3600.0  # for a newcomer to get the swarm's weights: as long as the window
ENGINES = ("kantha", "hivemind")

# ALBERT-base's, without its second half: embeddings, a layer, and more of a layer up to 18.0 million values
SHAPES: tuple[tuple[int, ...], ...] = (
    (30_000, 128),
    (512, 128),
    (128, 768),
    *[(768, 768)] * 7,
    *[(768, 3072), (3072, 768)] * 2,
    (768, 548),
    *[(768,)] * 12,
)


@dataclasses.dataclass(frozen=True)
class Scenario:
    name: str
    mbit: int  # of each link, each way
    target: int  # samples in a round
    churn: bool = False

    @property
    def ideal_seconds(self) -> float:
        """Of a round, were all peers computing all the time."""
        return self.target / (PEERS * RATE)

    def starts(self, window: float) -> list[float]:
        """Seconds after which peers start, without replacements."""
        return [0.0] * PEERS if self.churn else [0.0, 0.0, *(share * window for share in LATE)]

    def replacements(self, window: float) -> list[float]:
        """Seconds after which a peer is killed and another one started."""
        if not self.churn:
            return []
        return [minute * REPLACE_EVERY for minute in range(1, int((window - 1) // REPLACE_EVERY) + 1)]


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("A", mbit=100, target=1024),
        Scenario("B", mbit=100, target=512),
        Scenario("C", mbit=20, target=1024),
        Scenario("D", mbit=100, target=1024, churn=True),
    )
}


# A peer: this file as `_peer SETTINGS`, in its namespace


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a peer is told when it is started; the addresses of others follow on its standard input."""

    engine: str
    index: int
    newcomer: bool  # the swarm is there; load its state
    target: int
    ideal_seconds: float
    listen: str
    folder: str
    run_key: str  # file of the key by which Kantha's peers are members


class Events:
    """What a peer tells the parent: lines of JSON in a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def write(self, event: str, **values: Any) -> None:
        with self._lock:
            self._file.write(json.dumps({"event": event, "time": time.monotonic(), **values}) + "\n")
            self._file.flush()


class Accelerator:
    """Computes `RATE` samples a second by sleeping."""

    def __init__(self) -> None:
        self._ready = time.monotonic() + HAND_OVER
        self.samples = 0

    def batch(self) -> int:
        """Wait for the next batch; returns its size."""
        now = time.monotonic()
        if now > self._ready:  # the hand-over before took longer than a batch
            self._ready = now + HAND_OVER
        time.sleep(self._ready - now)
        self._ready += HAND_OVER
        size = int(RATE * HAND_OVER)
        self.samples += size
        return size


def tensors(seed: int, scale: float) -> "list[torch.Tensor]":
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul_(scale) for shape in SHAPES]


def lamb(groups: Any) -> "torch.optim.Optimizer":
    """LAMB without bias correction, its state allocated by a step at learning rate zero."""
    import torch
    from pytorch_optimizer import Lamb

    optimizer: torch.optim.Optimizer = Lamb(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-6, adam_debias=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"], group["step"] = 1e-3, 0
    return optimizer


def constant(optimizer: "torch.optim.Optimizer") -> Any:
    """A schedule that changes nothing."""
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, lambda _round: 1.0)


def kantha_peer(
    settings: Settings,
    bootstrap: list[str],
    parameters: "list[torch.nn.Parameter]",
    gradients: "list[torch.Tensor]",
    events: Events,
) -> None:
    from kantha.spec import PRESETS, Schedule, SwarmSpec
    from kantha.swarm.guard import Guard
    from kantha.swarm.identity import PeerIdentity
    from kantha.swarm.membership import RunKey, Trust
    from kantha.swarm.node import Node
    from kantha.swarm.rounds_engine import RoundsEngine

    optimizer = lamb(parameters)
    spec = SwarmSpec(target_batch_size=settings.target, matchmaking_seconds=8, averaging_timeout=60, compression="8bit")
    events.write("start")
    identity, key = PeerIdentity(Path(settings.folder, "identity")), RunKey.load(Path(settings.run_key))
    certificate = key.certify("be" * 32, "peer", identity.peer_id)
    guard = Guard(Trust("be" * 32, key.public_key), certificate)
    node = Node(identity, guard, bootstrap=bootstrap, listen=[settings.listen])
    try:
        events.write("listening", addresses=node.addresses())
        engine = RoundsEngine(
            node,
            spec,
            parameters,
            optimizer,
            Schedule(PRESETS["demo"].model_copy(update={"swarm": spec})),
            None if settings.newcomer else 0,
            folder=Path(settings.folder, "snapshots"),
        )
        try:
            engine.wait_ready(READY_SECONDS)
            events.write("ready")
            accelerator, failed = Accelerator(), 0
            handed_over: deque[float] = deque()  # when, of each sample that is in no round yet
            while engine.is_alive():
                with engine.hold():
                    pass  # a trainer copies the weights to its accelerator here, if they are new
                batch = accelerator.batch()
                handed_over.extend([time.monotonic()] * batch)
                result = engine.contribute(gradients, batch)
                if engine.failed_attempts > failed:
                    events.write("failed", attempts=engine.failed_attempts - failed)
                    failed = engine.failed_attempts
                if result is None:
                    continue
                # in order: what was dropped as too old, what is in the round, what waits for the next one
                for _ in range(result.lost):
                    handed_over.popleft()
                taken = [handed_over.popleft() for _ in range(min(result.samples, len(handed_over)))]
                events.write(
                    "round",
                    round=result.round,
                    lineage=result.lineage,
                    samples=result.samples,
                    whole=True,  # a group's result that is not never counts, see kantha.swarm.groups
                    peers=result.peers,
                    since=taken[0] if taken else None,
                    until=taken[-1] if taken else None,
                    computed=accelerator.samples,
                )
        finally:
            engine.close()
    finally:
        node.close()


def hivemind_peer(
    settings: Settings,
    bootstrap: list[str],
    parameters: "list[torch.nn.Parameter]",
    gradients: "list[torch.Tensor]",
    events: Events,
) -> None:
    import hivemind
    from hivemind.compression import Float16Compression
    from hivemind.optim.grad_averager import GradientAverager

    accelerator = Accelerator()

    class CountingAverager(GradientAverager):
        """Notes what an averaging was given, and across its process border how it ended."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.outcome = multiprocessing.Array("q", 2)  # of the last all-reduce: peers, whether it was whole
            self.since: float | None = None  # when the first of the accumulated samples was handed over
            self.given: tuple[int, float | None, float] = (0, None, 0.0)
            super().__init__(*args, **kwargs)

        def accumulate_grads_(self, batch_size: int) -> None:
            if not self.local_samples_accumulated:
                self.since = time.monotonic()
            super().accumulate_grads_(batch_size)

        def step(self, *args: Any, **kwargs: Any) -> Any:
            self.given = (self.local_samples_accumulated, self.since, time.monotonic())
            return super().step(*args, **kwargs)

        async def _run_allreduce_inplace_(self, tensors: Any, group_info: Any, *args: Any, **kwargs: Any) -> None:
            whole = False
            try:
                await super()._run_allreduce_inplace_(tensors, group_info, *args, **kwargs)
                runner = self._running_groups[group_info.group_id].result()
                whole = runner.tensor_part_container.failed_size == 0 and not runner.banned_senders
            finally:
                self.outcome[:] = [group_info.group_size, int(whole)]

    class CountingOptimizer(hivemind.Optimizer):
        """Writes down what becomes of each averaging of gradients."""

        def __init__(self, **kwargs: Any) -> None:
            self.attempts: dict[int, dict[str, Any]] = {}
            self.thread = threading.local()
            super().__init__(grad_averager_factory=CountingAverager, **kwargs)

        def _begin_averaging_gradients(self, grad_scaler: Any) -> bool:
            began = bool(super()._begin_averaging_gradients(grad_scaler))
            if began:
                samples, since, until = self.grad_averager.given
                self.attempts[id(self.scheduled_grads)] = {
                    "round": self.local_epoch + 1,
                    "lineage": "",
                    "samples": samples,
                    "since": since,
                    "until": until,
                    "computed": accelerator.samples,
                }
            else:
                events.write("failed", attempts=1)
            return began

        def _average_gradients_and_load_into_optimizer(self, maybe_step_control: Any) -> None:
            self.thread.fell_back = False
            super()._average_gradients_and_load_into_optimizer(maybe_step_control)
            attempt = self.attempts.pop(id(maybe_step_control))
            if self.thread.fell_back:
                events.write("failed", attempts=1)
            else:
                peers, whole = self.grad_averager.outcome[:]
                events.write("round", whole=bool(whole), peers=peers, **attempt)

        def _load_local_gradients_into_optimizer(self) -> None:
            self.thread.fell_back = True
            super()._load_local_gradients_into_optimizer()

    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    events.write("start")
    dht = hivemind.DHT(initial_peers=bootstrap, host_maddrs=[settings.listen], client_mode=False, start=True)
    events.write("listening", addresses=[str(address) for address in dht.get_visible_maddrs(latest=True)])
    optimizer = CountingOptimizer(
        dht=dht,
        run_id="benchmark",
        target_batch_size=settings.target,
        batch_size_per_step=int(RATE * HAND_OVER),
        params=parameters,
        optimizer=lamb,
        scheduler=constant,
        matchmaking_time=min(15.0, settings.ideal_seconds / 2),
        averaging_timeout=60.0,
        average_state_every=1,
        use_local_updates=False,
        offload_optimizer=True,
        delay_optimizer_step=True,
        delay_grad_averaging=True,
        client_mode=False,
        grad_compression=Float16Compression(),
        state_averaging_compression=Float16Compression(),
        verbose=False,
    )
    if settings.newcomer:
        optimizer.load_state_from_peers()  # as the example does when its training begins
    events.write("ready")
    while optimizer.is_alive():
        accelerator.batch()
        optimizer.step()


def end_with_parent() -> None:
    """Standard input ends with the parent; nothing of this peer may outlive it."""
    while os.read(0, 4096):
        pass
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def peer_main(settings: Settings) -> None:
    """Load, wait for the word to start on standard input, take part until killed."""
    import torch

    torch.set_num_threads(1)
    engine: Callable[..., None] = kantha_peer if settings.engine == "kantha" else hivemind_peer
    importlib.import_module("kantha.swarm.rounds_engine" if settings.engine == "kantha" else "hivemind")
    events = Events(Path(settings.folder, "events"))
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors(seed=0, scale=0.02)]
    gradients = tensors(seed=1 + settings.index, scale=0.001)
    lamb([torch.nn.Parameter(torch.zeros(2))])  # loads its library
    events.write("loaded")
    line = b""
    while not line.endswith(b"\n"):
        read = os.read(0, 4096)
        if not read:
            return
        line += read
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        engine(settings, json.loads(line), parameters, gradients, events)
    finally:
        events.write("ended")


# The network


class Network:
    """Namespaces with shaped links, joined by a bridge in a namespace of its own."""

    def __init__(self, mbit: int) -> None:
        self._mbit = mbit
        self._prefix = f"kantha-bench-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._names: list[str] = []
        self._add(self._switch)
        self._ip("link", "add", "bridge", "type", "bridge", name=self._switch)
        self._ip("link", "set", "bridge", "up", name=self._switch)

    def host(self, index: int) -> tuple[str, str]:
        """One more host; returns its namespace and its address."""
        name, port, address = f"{self._prefix}-{index}", f"p{index}", f"5.77.0.{2 + index}"
        self._add(name)
        self._run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", port, "netns", self._switch)
        for namespace, device in ((name, "eth0"), (self._switch, port)):  # upload, download
            rate = ("rate", f"{self._mbit}mbit", "burst", "64kb", "latency", "100ms")
            self._run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *rate)
        self._ip("link", "set", port, "master", "bridge", "up", name=self._switch)
        self._ip("address", "add", f"{address}/24", "dev", "eth0", name=name)
        self._ip("link", "set", "lo", "up", name=name)
        self._ip("link", "set", "eth0", "up", name=name)
        return name, address

    def close(self) -> None:
        """Take it down. Whatever still runs inside is ended first: its interfaces would outlive the namespace."""
        for name in reversed(self._names):
            for _ in range(20):
                listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
                if not listed.stdout.split():
                    break
                for pid in listed.stdout.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                time.sleep(0.1)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        self._names.clear()

    def _add(self, name: str) -> None:
        self._run("ip", "netns", "add", name)
        self._names.append(name)

    def _ip(self, *arguments: str, name: str) -> None:
        self._run("ip", "-n", name, *arguments)

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)


def why_unshaped() -> str | None:
    """Why there can be no shaped links here; None where there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "they need root on Linux"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "`ip` and `tc` (iproute2) are missing"
    network = None
    try:
        network = Network(mbit=100)
        network.host(0)
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}"
    finally:
        if network is not None:
            network.close()
    return None


# The parent


@dataclasses.dataclass(frozen=True)
class Finished:
    """A round that a peer finished."""

    time: float
    round: int
    lineage: str  # kantha: replicas that finished a round alike have this in common; hivemind knows no such thing
    samples: int
    since: float | None  # when the first of the samples was handed over
    until: float  # the same of its newest


class Peer:
    """A peer's process, and what it told."""

    def __init__(self, settings: Settings, namespace: str | None, late: bool) -> None:
        self.name = f"peer {settings.index}"
        self.late = late
        self.newcomer = settings.newcomer
        self.loaded = False
        self.started: float | None = None
        self.stopped: float | None = None  # killed by the scenario
        self.lost = False  # ended by itself
        self.addresses: list[str] = []
        self.finished: list[Finished] = []
        self.failed = 0
        self.bytes = 0
        self._shaped = namespace is not None
        self._family: list[psutil.Process] = []
        self._left: list[Path] = []
        self._folder = Path(settings.folder)
        self._folder.mkdir()
        self._read = 0
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*inside, sys.executable, __file__, "_peer", json.dumps(dataclasses.asdict(settings))],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def here(self) -> bool:
        """Started, and neither killed nor lost."""
        return self.started is not None and self.stopped is None and not self.lost

    def begin(self, bootstrap: list[str]) -> None:
        """Tell it to enter the swarm."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(bootstrap).encode() + b"\n")
            self._process.stdin.flush()

    def poll(self) -> Iterator[str]:
        """Take in what it wrote since the last call; yields a line for each event that a reader may want to see."""
        path = self._folder / "events"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._read)
                fresh = file.read()
            complete = fresh[: fresh.rfind(b"\n") + 1]
            self._read += len(complete)
            for line in complete.splitlines():
                if said := self._take(json.loads(line)):
                    yield said
        if not self.lost and self.stopped is None and self._process.poll() is not None:
            self.lost = True
            log = (self._folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            yield f"ended by itself, code {self._process.returncode}: {log[-1] if log else 'it said nothing'}"

    def _take(self, event: dict[str, Any]) -> str | None:
        match event["event"]:
            case "loaded":
                self.loaded = True
            case "start":
                self.started = event["time"]
                return "starts, late" if self.late else "starts"
            case "listening":
                self.addresses = event["addresses"]
            case "ready":
                return f"computes, {event['time'] - (self.started or 0.0):.1f} s after its start"
            case "failed":
                self.failed += event["attempts"]
                return "an attempt failed"
            case "round" if event["whole"] and not event["samples"]:
                return f"round {event['round']} reached, with no sample of its own"
            case "round" if event["whole"] and event["peers"] > 1:
                values = (event[name] for name in ("time", "round", "lineage", "samples", "since", "until"))
                self.finished.append(Finished(*values))
                if sum(done.samples for done in self.finished) > event["computed"]:
                    raise SystemExit(f"{self.name}: more samples counted than computed; these figures would be wrong")
                return f"round {event['round']} finished, {event['samples']} samples, group of {event['peers']}"
            case "round":
                self.failed += 1
                what = "alone" if event["peers"] <= 1 else "not whole"
                return f"round {event['round']} does not count, {what}"
        return None

    def count_bytes(self) -> None:
        """Read its interface's counters; they are gone when its process is."""
        if not self._shaped or self.started is None:
            return
        with contextlib.suppress(OSError):  # /sys/class/net of its namespace shows the same numbers, in there only
            for line in Path(f"/proc/{self._process.pid}/net/dev").read_text().splitlines():
                device, _, counters = line.partition(":")
                if device.strip() == "eth0":
                    self.bytes = int(counters.split()[0]) + int(counters.split()[8])

    def kill(self) -> None:
        """SIGKILL to it and everything that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            self._family = [process, *process.children(recursive=True)]
            self._left = self._sockets()
        for member in self._family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()

    def bury(self) -> None:
        """Wait until it is gone after `kill`, and remove the files that it could not."""
        self._process.wait()
        psutil.wait_procs(self._family, timeout=10)
        for member in self._family:
            self._left += Path("/dev/shm").glob(f"torch_{member.pid}_*")
        for path in self._left:
            path.unlink(missing_ok=True)
        self._family, self._left = [], []
        shutil.rmtree(self._folder / "snapshots", ignore_errors=True)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _sockets(self) -> list[Path]:
        """hivemind's Unix sockets in its namespace, which a process that is killed leaves in /tmp."""
        if not self._shaped:
            return []  # others on this machine may have some
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{self._process.pid}/net/unix").read_text().splitlines()
            return [Path(path) for line in lines if (path := line.split()[-1]).startswith("/tmp/hivemind-")]
        return []


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one engine in one scenario; the module's docstring defines them."""

    scenario: str
    engine: str
    share_of_ideal: float
    join_seconds_median: float | None
    join_seconds_worst: float | None
    late_joiners: int
    late_joiners_without_a_round: int
    mb_per_peer_round: float | None
    rounds: int
    rounds_failed: int
    minutes: float
    shaped: bool


class Run:
    """One engine in one scenario."""

    def __init__(self, scenario: Scenario, engine: str, minutes: float, shaped: bool, folder: Path) -> None:
        self._scenario, self._engine, self._window = scenario, engine, minutes * 60
        self._folder = folder
        self._network = Network(scenario.mbit) if shaped else None
        self._peers: list[Peer] = []
        if engine == "kantha":
            from kantha.swarm.membership import RunKey

            RunKey.generate(folder / "run.pem")
        self._began = time.monotonic()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.kill()
        for peer in self._peers:
            peer.bury()
        if self._network is not None:
            self._network.close()

    def measure(self) -> Result:
        starts = self._scenario.starts(self._window)
        replacements = self._scenario.replacements(self._window)
        total = len(starts) + len(replacements)
        self._say(f"{self._name}: loading libraries in {min(total, len(starts) + SPARES)} processes")
        while len(self._peers) < min(total, len(starts) + SPARES):
            self._load(late=len(self._peers) >= len(starts) or starts[len(self._peers)] > 0)
        self._await(lambda: all(peer.loaded for peer in self._peers), "load its libraries")

        self._peers[0].begin([])
        self._await(lambda: bool(self._peers[0].addresses), "start its DHT")
        assert self._peers[0].started is not None
        self._began = self._peers[0].started
        plan = [(at, functools.partial(self._begin, index)) for index, at in enumerate(starts) if index > 0]
        plan += [
            (at, functools.partial(self._replace, len(starts) + index, total)) for index, at in enumerate(replacements)
        ]
        plan.sort(key=lambda step: step[0])
        while (now := time.monotonic()) < self._began + self._window:
            while plan and now >= self._began + plan[0][0]:
                plan.pop(0)[1]()
            self._poll()
            if not plan and not any(peer.here for peer in self._peers):
                self._say("no peer is left")
                break
            time.sleep(0.1)
        return self._result(min(time.monotonic(), self._began + self._window))

    @property
    def _name(self) -> str:
        return f"{self._scenario.name} {self._engine}"

    def _load(self, late: bool) -> None:
        """Start one more process, which loads its libraries and waits."""
        index = len(self._peers)
        namespace, address = self._network.host(index) if self._network is not None else (None, "127.0.0.1")
        settings = Settings(
            engine=self._engine,
            index=index,
            newcomer=late,
            target=self._scenario.target,
            ideal_seconds=self._scenario.ideal_seconds,
            listen=f"/ip4/{address}/tcp/0",
            folder=str(self._folder / f"peer-{index}"),
            run_key=str(self._folder / "run.pem"),
        )
        self._peers.append(Peer(settings, namespace, late))

    def _begin(self, index: int) -> None:
        self._peers[index].begin([address for peer in self._peers if peer.here for address in peer.addresses])

    def _replace(self, index: int, total: int) -> None:
        """Kill the oldest peer, start the next one, load another for later."""
        oldest = next((peer for peer in self._peers if peer.here), None)
        if oldest is not None:
            oldest.count_bytes()
            oldest.stopped = time.monotonic()
            oldest.kill()
            self._say("is killed", oldest)
        self._begin(index)
        if len(self._peers) < total:
            self._load(late=True)

    def _poll(self) -> None:
        finished = sum(len(peer.finished) for peer in self._peers)
        for peer in self._peers:
            for said in peer.poll():
                self._say(said, peer)
        if sum(len(peer.finished) for peer in self._peers) > finished:
            for peer in self._peers:
                if peer.here:
                    peer.count_bytes()

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LOADING_SECONDS
        while not condition():
            self._poll()
            if any(peer.lost for peer in self._peers) or time.monotonic() > deadline:
                raise SystemExit(f"{self._name}: a peer did not {what}; --logs DIR keeps what it said")
            time.sleep(0.1)

    def _say(self, text: str, peer: Peer | None = None) -> None:
        who = f"{self._name}  {peer.name}: " if peer is not None else ""
        print(f"{time.monotonic() - self._began:6.1f} s  {who}{text}", flush=True)

    def _result(self, end: float) -> Result:
        rounds = [done for peer in self._peers for done in peer.finished if done.time <= end]
        lineages = Counter((done.round, done.lineage) for done in rounds)
        best = {number: lineage for (number, lineage), _peers in reversed(lineages.most_common())}
        if len(best) < len(lineages):
            self._say("replicas parted; of each round only what most peers have counts")
            rounds = [done for done in rounds if done.lineage == best[done.round]]
        last = max((done.until for done in rounds), default=end)
        clock = sum(
            max(0.0, min(last, peer.stopped or last) - peer.started) for peer in self._peers if peer.started is not None
        )
        counted = set(rounds)
        late = [peer for peer in self._peers if peer.late and peer.started is not None]
        joins, without = [], 0
        for peer in late:
            first = min((done.since for done in peer.finished if done.since and done in counted), default=None)
            without += first is None
            joins.append((first or peer.stopped or end) - (peer.started or 0.0))
        measured = self._network is not None and rounds
        return Result(
            scenario=self._scenario.name,
            engine=self._engine,
            share_of_ideal=round(sum(done.samples for done in rounds) / (RATE * clock), 3) if clock else 0.0,
            join_seconds_median=round(statistics.median(joins), 1) if joins else None,
            join_seconds_worst=round(max(joins), 1) if joins else None,
            late_joiners=len(late),
            late_joiners_without_a_round=without,
            mb_per_peer_round=round(sum(p.bytes for p in self._peers) / 1e6 / len(rounds), 1) if measured else None,
            rounds=len({done.round for done in rounds}),
            rounds_failed=sum(peer.failed for peer in self._peers),
            minutes=round(self._window / 60, 2),
            shaped=self._network is not None,
        )


def machine() -> str:
    model = platform.processor()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{platform.system()} {platform.machine()}, {model}, {os.cpu_count()} cores"


def show(results: Sequence[Result]) -> None:
    """The table: share, joins (a star: a joiner had no round until the end), traffic, rounds."""
    print(f"\n{'':12} {'share of':>9} {'join s':>8} {'join s':>8} {'MB per':>10} {'':>7} {'attempts':>9}")
    print(f"{'':12} {'ideal':>9} {'median':>8} {'worst':>8} {'peer round':>10} {'rounds':>7} {'failed':>9}")
    for one in results:
        median = "-" if one.join_seconds_median is None else f"{one.join_seconds_median:.1f}"
        worst = "-" if one.join_seconds_worst is None else f"{one.join_seconds_worst:.1f}"
        star = "*" if one.late_joiners_without_a_round else ""
        traffic = "-" if one.mb_per_peer_round is None else f"{one.mb_per_peer_round:.1f}"
        print(
            f"{one.scenario} {one.engine:10} {one.share_of_ideal:9.3f} {median:>8} {worst + star:>8} {traffic:>10} "
            f"{one.rounds:7} {one.rounds_failed:9}"
        )
    if any(one.late_joiners_without_a_round for one in results):
        print("* a late joiner had no sample in a finished round by the end")


def choices(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: one of these, or several with commas between."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if wrong := set(chosen) - set(allowed):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: choose from {', '.join(allowed)}")
        return chosen

    return parse


def stop(_signum: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", type=choices(tuple(SCENARIOS)), action="extend", help="default: all")
    parser.add_argument("--engine", type=choices(ENGINES), action="extend", help="default: both")
    parser.add_argument("--minutes", type=float, default=5.0, help="window of each scenario and engine (default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--logs", type=Path, help="keep what the peers said in this folder")
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, stop)
    reason = why_unshaped()
    if reason is not None:
        print(f"no network namespaces here ({reason}): the peers run unshaped on loopback")
    scenarios = [SCENARIOS[name] for name in dict.fromkeys(arguments.scenario or SCENARIOS)]
    engines = list(dict.fromkeys(arguments.engine or ENGINES))
    minutes = arguments.minutes * len(scenarios) * len(engines)
    print(
        f"{len(scenarios) * len(engines)} runs, {minutes:.0f} minutes and what it takes to load libraries", flush=True
    )

    results: list[Result] = []
    with contextlib.ExitStack() as stack:
        if arguments.logs is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kantha-bench-")))
        else:
            folder = arguments.logs.resolve() / f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
        try:
            for scenario in scenarios:
                for engine in engines:
                    inside = folder / f"{scenario.name}-{engine}"
                    inside.mkdir(parents=True)
                    with Run(scenario, engine, arguments.minutes, reason is None, inside) as run:
                        results.append(run.measure())
        except KeyboardInterrupt:
            print("stopped; figures of the runs that had ended follow", flush=True)
    show(results)
    if arguments.json:
        report = {
            "results": [dataclasses.asdict(result) for result in results],
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["_peer"]:
        peer_main(Settings(**json.loads(sys.argv[2])))
    else:
        main()
