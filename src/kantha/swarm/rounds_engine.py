"""One peer of the swarm at work: the rules of rounds.py, fed from the averager process and from everybody's reports.

The program's own thread only computes: `contribute` adds gradients and returns at once. Three threads do the rest:
`rounds` runs the rules and applies results to the replica, `publish` renews this peer's report, `watch` reads others'.
"""

import logging
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hivemind.utils import get_dht_time

from kantha import __version__
from kantha.errors import DigestError, ProcessEndedError, SwarmError
from kantha.spec import Schedule, ScheduleState, SwarmSpec
from kantha.swarm.averager import Averager, UpdateHeader
from kantha.swarm.groups import Member
from kantha.swarm.node import Node
from kantha.swarm.orders import Order
from kantha.swarm.parts import Layout
from kantha.swarm.reports import LEFT, PRESENT, RENEWAL, FailedRound, Report, Roster
from kantha.swarm.rounds import (
    LEAVE,
    UPDATES_KEPT,
    Action,
    Apply,
    Attempt,
    Drop,
    Failed,
    FetchSnapshot,
    FetchUpdates,
    HandIn,
    Left,
    Lost,
    PeerView,
    Phase,
    Push,
    Rounds,
    RoundSettings,
    Thaw,
    next_lineage,
)
from kantha.swarm.snapshots import SnapshotManifest, load_moments, load_weights, write_snapshot

_TICK = 0.1  # seconds between two looks at the rules, where nothing happens
_SPEED_WINDOW = 60.0  # seconds over which this peer's speed is measured
_SLOW = 5.0  # seconds for the DHT after which it is said in the log
_PAUSE = 10.0  # seconds without a new gradient that are taken for one that is under way
_LATE = 2  # rounds that gradients may be late: one as a rule, two where their peer missed a group
_LINEAGES_KEPT = 64  # rounds
_SKETCH = 32  # values of a sketch
_GOODBYES = 3  # attempts to say goodbye
_ROUND_LIMIT = 10**7  # a peer that claims a later round is not believed
_BEGINNING = ScheduleState()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """A round that ended for this peer."""

    round: int
    lineage: str  # after it
    samples: int  # this peer's own in it
    peers: int  # that put samples in
    lost: int  # this peer's own that are in no round, since the last that ended


class RoundsEngine:
    """Made in the main thread, before CUDA is initialised: it forks the averager process."""

    def __init__(
        self,
        node: Node,
        settings: SwarmSpec,
        parameters: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        round_number: int | None,
        *,
        lineage: str = "",
        schedule_state: ScheduleState = _BEGINNING,
        role: str = "trainer",
        folder: Path | None = None,
    ) -> None:
        """
        :param parameters: the replica's, on the CPU in fp32, in the order of `contribute`'s gradients
        :param optimizer: over the same parameters, its state allocated
        :param schedule: learning rate and batch size
        :param round_number: of the state that the tensors hold; None: it is loaded from the swarm
        :param role: trainer, or averager: takes part without gradients of its own
        :param folder: for snapshots; None: a temporary one
        """
        self._node = node
        self._parameters, self._optimizer, self._schedule = parameters, optimizer, schedule
        self._role = role
        self.complete: Callable[[Report], Report] = lambda report: report  # adds what the engine does not know
        self._temporary = tempfile.TemporaryDirectory(prefix="kantha-") if folder is None else None
        self._folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.glob("snapshot-*"):  # of a program that was killed
            shutil.rmtree(old, ignore_errors=True)
        self.schedule_state = schedule_state
        layout = Layout([parameter.shape for parameter in parameters], settings.compression)
        rules = RoundSettings(settings.target_batch_size, settings.matchmaking_seconds, settings.averaging_timeout)
        self._averager = Averager(node, layout, settings.averaging_timeout, settings.matchmaking_seconds, self._folder)
        self._averaging_timeout = settings.averaging_timeout
        self._rounds = Rounds(
            Member(node.peer_id, not node.outbound_only),
            rules,
            time.monotonic(),
            trains=role == "trainer",
            round_number=round_number,
            lineage=lineage,
        )
        self.roster = Roster()
        self.failures: deque[FailedRound] = deque(maxlen=8)
        self.failed_attempts = 0
        self.loading: tuple[str, int, int] | None = None  # file, pieces here, pieces in all
        self._groups: dict[int, str] = {}  # whose results the last rounds were
        self._joined: dict[str, int] = {}  # groups that what is frozen was put into, and this peer's own samples in it
        self._frozen_own = 0  # this peer's own samples among those that are frozen
        self._given = 0  # samples that leavers handed in, among those that wait
        self._lost = 0  # this peer's own samples that were dropped, since a round ended
        self.lineages: dict[int, str] = {}  # after each of the last rounds
        self.shares: dict[int, dict[str, float]] = {}  # samples that each peer put into the last results, by round
        self.learning_rates: dict[int, float] = {}  # of the last rounds' steps
        self._results: deque[RoundResult] = deque()
        self._headers: dict[int, UpdateHeader] = {}
        self._catching_up: FetchUpdates | None = None
        self._history: deque[tuple[float, int]] = deque()
        self._weights_round = round_number or 0  # of the weights that the trainer computes with
        self._version = 0
        self._replica = threading.RLock()  # whoever holds it may read or change parameters and optimizer
        self._weights_ready = threading.Event()
        self._left = threading.Event()
        self._stop = threading.Event()
        self._kick = threading.Event()  # publish now
        self._membership = node.guard.certificate, node.guard.trust.number  # what the averager process knows
        self._publishing = threading.Lock()
        self._said_goodbye = False
        self._seen: Mapping[str, PeerView] | None = None
        self._seen_at = time.monotonic()
        self._error: Exception | None = None
        self._follow_schedule(schedule_state)
        if round_number is not None:
            self._weights_ready.set()
            self._averager.tell("set_replica", round_number, lineage, True)
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("rounds", self._run), ("publish", self._publish), ("watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    # ---- for the program

    @property
    def round(self) -> int:
        """Rounds that this peer's replica has finished."""
        return self._rounds.round

    @property
    def lineage(self) -> str:
        return self._rounds.lineage

    @property
    def target(self) -> int:
        """Samples that make the round."""
        return self._rounds.target

    @property
    def learning_rate(self) -> float:
        """Of the round."""
        return self._schedule.rate(self.schedule_state)

    def give_order(self, order: str) -> None:
        """Have the swarm follow an order of the organizer, from one of the next rounds on."""
        self._averager.tell("give_order", order)

    @property
    def is_ready(self) -> bool:
        """Whether the replica is whole: weights and optimizer state of one round."""
        return self._rounds.ready

    @property
    def phase(self) -> Phase:
        return self._rounds.phase

    def progress(self) -> tuple[float, float]:
        """(samples towards the next round, samples a second) of the whole swarm, as far as this peer knows."""
        return self._rounds.progress(time.monotonic())

    def wait_ready(self, timeout: float) -> None:
        """Until there are weights to compute with. Raises `SwarmError` when there are none after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not self.wait_weights(0.1):
            if time.monotonic() > deadline:
                raise SwarmError(f"the swarm's state did not arrive within {timeout:.0f} s; join again")

    def wait_weights(self, timeout: float) -> bool:
        """Whether there are weights to compute with, at most `timeout` seconds later."""
        self.raise_if_failed()
        return self._weights_ready.wait(timeout)

    def take_over(
        self,
        parameters: Sequence[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        round_number: int,
        lineage: str,
        schedule_state: ScheduleState,
    ) -> None:
        """Go on from a state that came from outside the swarm: a checkpoint."""
        if not self._rounds.take_over(time.monotonic(), round_number, lineage):
            return  # the swarm's state came meanwhile
        with self._replica, torch.no_grad():
            for mine, theirs in zip(self._parameters, parameters, strict=True):
                mine.copy_(theirs)
                for name, moment in self._optimizer.state[mine].items():
                    if isinstance(moment, torch.Tensor):
                        moment.copy_(optimizer.state[theirs][name])
            self._follow_schedule(schedule_state)
            self._version += 1
        self._averager.tell("set_replica", round_number, lineage, True)
        self._weights_ready.set()

    @contextmanager
    def hold(self) -> Iterator[int]:
        """The parameters do not change inside; the value changes when they have. What is contributed from then on is
        taken to be computed with them."""
        with self._replica:
            self._weights_round = self._rounds.round
            yield self._version

    def contribute(self, gradients: Sequence[torch.Tensor], samples: int) -> RoundResult | None:
        """Hand in the mean gradient over `samples` samples; returns the oldest round that ended and was not told yet.

        Does not wait. Raises `SwarmError` when the swarm is lost for good.
        """
        self.raise_if_failed()
        self._averager.add(gradients, samples, self._weights_round)
        now = time.monotonic()
        self._history.append((now, samples))
        while now - self._history[0][0] > _SPEED_WINDOW:
            self._history.popleft()
        return self.ended_round()

    def ended_round(self) -> RoundResult | None:
        """The oldest round that ended and was not told yet. Raises `SwarmError` when the swarm is lost for good."""
        self.raise_if_failed()
        return self._results.popleft() if self._results else None

    @property
    def samples_waiting(self) -> int:
        """Samples towards the next round, those in an averaging under way included."""
        return self._averager.waiting_tally.samples + self._averager.frozen_tally.samples

    @property
    def is_averaging(self) -> bool:
        """Whether samples of this peer are in an averaging under way."""
        return self._averager.frozen_tally.samples > 0

    @property
    def samples_per_second(self) -> float:
        history = list(self._history)
        if len(history) < 2:
            return 0.0
        # of the oldest is not known when its computing began; a pause since the newest counts as time, after a while
        end = max(history[-1][0], time.monotonic() - _PAUSE)
        return sum(samples for _, samples in history[1:]) / (end - history[0][0])

    @property
    def is_kept(self) -> bool:
        """Whether an averager, which stays when trainers leave, has come as far as this peer."""
        return any(
            report.ready and report.round >= self.round for report, _ in self.roster.present("averager").values()
        )

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def is_alive(self) -> bool:
        return self._error is None and bool(self._averager.is_alive()) and self._node.is_alive()

    def leave(self) -> list[RoundResult]:
        """Finish the averaging under way and hand in what waits; returns what came of it. May take a while."""
        if self._error is None:
            self._rounds.leave(time.monotonic())
            self._left.wait(2 * self._averaging_timeout + LEAVE)
        return list(self._results)

    def close(self) -> None:
        """End threads and processes. What was not handed in is lost."""
        self._stop.set()
        self._kick.set()
        for thread in self._threads:
            thread.join(timeout=PRESENT)
        if self._averager.is_alive():
            self._averager.shutdown()
        if self._temporary is not None:
            self._temporary.cleanup()

    def say_goodbye(self) -> None:
        """Publish that this peer leaves, with its last rounds."""
        with self._publishing:
            self._said_goodbye = True
            for _attempt in range(_GOODBYES):
                try:
                    self._node.publish(self._report(left=True))
                    return
                except SwarmError as error:
                    _log.warning("the goodbye reached nobody: %s", error)

    # ---- threads

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  raised again in the program's thread
            if self._stop.is_set():
                return
            _log.exception("the swarm part of this program failed")
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._left.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._check_processes()
            if self._averager.events.poll(_TICK):
                self._on_event(*self._averager.events.recv())
            now = time.monotonic()
            if self._seen is not None:
                views, self._seen = self._seen, None
                self._rounds.seen(now, views)
            if now - self._seen_at > PRESENT:
                continue  # cut off, or frozen: decide nothing on old news
            self._sync()
            for action in self._rounds.poll(now):
                _log.debug("%s", action)
                self._act(action)

    def _check_processes(self) -> None:
        if self._error is None and not (self._averager.is_alive() and self._node.is_alive()):
            self._fail(ProcessEndedError("a swarm process of this machine ended unexpectedly; start again"))

    def _publish(self) -> None:
        while not self._stop.is_set():
            self._kick.clear()
            began = time.monotonic()
            try:
                with self._publishing:
                    if not self._said_goodbye:
                        self._node.publish(self._report())
            except SwarmError as error:
                _log.warning("%s", error)
            self._say_if_slow("publishing this peer's report", began)
            self._kick.wait(RENEWAL)

    def _watch(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._tell_membership()
                self.roster.update(self._node.reports())
                if not self.roster.present("averager"):
                    self._node.rejoin()
                self._seen = self._views()
                self._seen_at = time.monotonic()
            except SwarmError as error:
                _log.warning("%s", error)
            self._say_if_slow("reading the others' reports", began)
            self._stop.wait(RENEWAL)

    def _tell_membership(self) -> None:
        """Bring the guards of this peer's processes to what one of them heard. Raises `SwarmError`."""
        self._node.tell_membership()
        guard = self._node.guard
        newest = guard.certificate, guard.trust.number
        if newest != self._membership:
            self._membership = newest
            self._averager.tell("set_membership", guard.certificate, guard.trust.notice)

    def _say_if_slow(self, what: str, began: float) -> None:
        seconds = time.monotonic() - began
        if seconds > _SLOW:
            _log.warning("%s took %.1f s", what, seconds)

    def _views(self) -> dict[str, PeerView]:
        return {
            peer: PeerView(
                role=report.role,
                dialable=report.dialable,
                ready=report.ready,
                round=report.round,
                lineage=report.lineage,
                samples=report.samples,
                rate=report.samples_per_second,
                age=age,
                sketch=tuple(report.sketch),
            )
            for role in ("trainer", "averager")
            for peer, (report, age) in self.roster.present(role).items()
            if peer != self._node.peer_id and report.round < _ROUND_LIMIT
        }

    def _report(self, *, left: bool = False) -> Report:
        rules = self._rounds
        return self.complete(
            Report(
                time=get_dht_time(),
                role=self._role,
                state=LEFT if left else rules.phase.value,
                dialable=rules.me.dialable,
                ready=rules.ready,
                round=rules.round,
                lineage=rules.lineage,
                sketch=list(rules.sketch),
                samples=self._averager.waiting_tally.samples,
                samples_per_second=self.samples_per_second,
                device="",
                version=__version__,
                certificate=self._node.guard.certificate.model_dump_json(),
                rounds=[],
                failed=list(self.failures),
            )
        )

    # ---- the rules' actions

    def _sync(self) -> None:
        """The tallies in shared memory are what is true; the rules are told."""
        self._rounds.samples = self._averager.waiting_tally.samples
        self._rounds.frozen_samples = self._averager.frozen_tally.samples
        self._rounds.computed(0, self.samples_per_second)

    def _act(self, action: Action) -> None:
        tell = self._averager.tell
        match action:
            case Attempt():
                tell("attempt", action, action.not_before)
            case Apply():
                tell("load_update", action.round)
            case Thaw():
                self._averager.thaw()
                self._joined.clear()
            case Drop():
                self._lost += self._averager.drop_waiting() - self._given
                if self._averager.frozen_tally.samples:
                    self._lost += self._frozen_own
                    self._averager.drop_frozen()
                self._given = self._frozen_own = 0
                self._joined.clear()
            case FetchUpdates():
                _log.info("rounds %d to %d are fetched", action.first, action.last)
                self._catching_up = action
                tell("fetch_update", action.first, self.lineage, action.sources)
            case FetchSnapshot():
                _log.info("the state of round %d is fetched", action.round)
                tell("fetch_snapshot", action.round, action.sources)
            case Push():
                _log.info("sending the state to a peer that cannot fetch it")
                tell("push", action.peer)
            case HandIn():
                tell("hand_in", action.peer)
            case Failed():
                _log.warning("round %d failed: %s", action.round, action.reason)
                self.failures.append(FailedRound(round=action.round, reason=action.reason[:100]))
            case Lost():
                self._fail(SwarmError(f"{action.reason}; join again"))
            case Left():
                self._left.set()

    def _on_event(self, kind: str, *details: Any) -> None:
        now = time.monotonic()
        match kind:
            case "called":
                self._rounds.called()
            case "frozen":
                group, samples = details
                self._rounds.frozen()
                if samples:
                    self._frozen_own, self._given = samples - self._given, 0
                self._joined[group] = self._frozen_own
            case "attempt_ended":
                end, culprits, reason = details
                self.failed_attempts += end.value == "broken"
                self._sync()
                self._rounds.attempt_ended(now, end, culprits, reason)
            case "update":
                header = UpdateHeader.model_validate(details[0])
                self._headers[header.round] = header
                for old in sorted(self._headers)[:-UPDATES_KEPT]:
                    del self._headers[old]
                if self._catching_up is not None and header.round == self.round + 1:
                    self._averager.tell("load_update", header.round)
            case "loaded":
                self._apply(details[0])
            case "fetch_failed":
                snapshot = self._catching_up is None
                self._catching_up = None
                self.loading = None
                self._rounds.fetched(now, None, snapshot=snapshot)
            case "loading":
                self.loading = details
            case "weights":
                self._load_weights(*details)
            case "snapshot":
                self._load_moments(*details)
            case "snapshot_wanted":
                self._offer_snapshot()
            case "pushed":
                self._rounds.pushed(now)
            case "pushed_here":
                self._take_over(*details)
            case "handed_in":
                self._handed_in(details[0])
            case "crashed":
                self._fail(ProcessEndedError(f"the averager process failed ({details[0]}); start again"))
            case "given":
                peer, samples = details
                self._given += samples
                _log.info("%s handed in %d samples", peer[-6:], samples)

    # ---- the replica

    def _apply(self, round_number: int) -> None:
        """A step of the optimizer on an averaged result."""
        header = self._headers[round_number]
        if round_number != self.round + 1 or header.base != self.lineage:
            _log.error("the result of round %d does not follow this replica's round %d", round_number, self.round)
            return
        lineage = next_lineage(header.base, header.digest)
        with self._replica:
            start = 0
            for parameter in self._parameters:
                flat = self._averager.update[start : start + parameter.numel()]
                parameter.grad = flat.view_as(parameter)
                start += parameter.numel()
            state = self.schedule_state
            if header.order:
                order = Order.model_validate_json(header.order)  # its signature was checked when it came
                state = state.obey(order.number, order.anneal_samples)
            rate = self._schedule.rate(state)
            self._step(rate)
            self._follow_schedule(state.advance(int(sum(header.samples.values()))))
            self._version += 1
            own = self._joined.get(header.group)
            self._rounds.applied(time.monotonic(), round_number, lineage, contributed=own is not None)
            if own is not None:
                self._averager.drop_frozen()  # the process has done so, where it saw the end itself
            self._remember(round_number, header.group)
            self._rounds.sketch = self._sketch()
        self._averager.tell("set_replica", round_number, lineage, True)
        self.shares[round_number], self.learning_rates[round_number] = header.samples, rate
        peers = sum(samples > 0 for samples in header.samples.values())
        self._end_round(round_number, lineage, own or 0, peers)
        self._joined.clear()
        self._drop_stale()
        self._kick.set()
        catching_up = self._catching_up
        if catching_up is not None:
            if round_number < catching_up.last:
                self._averager.tell("fetch_update", round_number + 1, lineage, catching_up.sources)
            else:
                self._catching_up = None
                self._rounds.fetched(time.monotonic(), round_number, lineage, snapshot=False)

    def _end_round(self, round_number: int, lineage: str, own: int, peers: int) -> None:
        self._results.append(RoundResult(round_number, lineage, own, peers, self._lost))
        self._lost = 0
        self.lineages[round_number] = lineage
        for old in sorted(self.lineages)[:-_LINEAGES_KEPT]:
            del self.lineages[old]
            self.shares.pop(old, None)
            self.learning_rates.pop(old, None)

    def _drop_stale(self) -> None:
        """Gradients of weights that are too old would harm."""
        if self._averager.waiting_tally.oldest < self.round - _LATE:
            samples = self._averager.drop_waiting()
            self._lost += samples - self._given
            self._given = 0
            _log.warning("%d samples were dropped: computed more than %d rounds ago", samples, _LATE)

    def _remember(self, round_number: int, group: str) -> None:
        self._groups[round_number] = group
        for old in sorted(self._groups)[:-UPDATES_KEPT]:
            del self._groups[old]

    def _step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        for state in self._optimizer.state.values():
            if "step" in state:  # AdamW corrects its moments by it; a state that was loaded made its steps elsewhere
                state["step"].fill_(self.round)
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None

    def _follow_schedule(self, state: ScheduleState) -> None:
        self.schedule_state = state
        self._rounds.target, self._rounds.is_finished = self._schedule.target(state), state.is_finished

    def _moments(self) -> list[dict[str, torch.Tensor]]:
        """The optimizer's tensors that have a parameter's shape and outlive a step, by parameter."""
        return [
            {
                name: value
                for name, value in sorted(self._optimizer.state[parameter].items())
                if name.startswith("exp_avg") and isinstance(value, torch.Tensor) and value.shape == parameter.shape
            }
            for parameter in self._parameters
        ]

    def _sketch(self) -> tuple[float, ...]:
        """Sums of the weights in classes of their index modulo 32, each with a pseudo-random sign: an AMS sketch."""
        sketch = torch.zeros(_SKETCH)
        for index, parameter in enumerate(self._parameters):
            flat = parameter.detach().reshape(-1)
            rows = torch.nn.functional.pad(flat, (0, -flat.numel() % _SKETCH)).view(-1, _SKETCH)
            signs = torch.randint(0, 2, (rows.shape[0], 1), generator=torch.Generator().manual_seed(index)) * 2.0 - 1.0
            sketch += (rows * signs).sum(dim=0)
        return tuple(float(value) for value in sketch) if bool(sketch.isfinite().all()) else ()

    def _offer_snapshot(self) -> None:
        folder = self._folder / f"snapshot-{self.round}"
        try:
            with self._replica:
                if not self.is_ready:
                    raise SwarmError("no whole state")
                manifest = write_snapshot(
                    folder,
                    self.round,
                    self.lineage,
                    self.schedule_state,
                    self._groups,
                    self._parameters,
                    self._moments(),
                )
        except (OSError, SwarmError) as error:
            _log.warning("no snapshot could be written: %s", error)
            self._averager.tell("offer_snapshot", folder, None)
            return
        self._averager.tell("offer_snapshot", folder, manifest)

    def _load_weights(self, folder: Path, content: dict[str, Any]) -> None:
        """First half of a snapshot: enough to compute with."""
        manifest = SnapshotManifest.model_validate(content)
        try:
            with self._replica:
                load_weights(folder / "weights", self._parameters)
                self._version += 1
                self._rounds.weights_here(manifest.round, manifest.lineage)
        except DigestError as error:
            _log.warning("%s", error)
            return
        self._averager.tell("set_replica", manifest.round, manifest.lineage, False)
        self._weights_ready.set()

    def _load_moments(self, folder: Path, content: dict[str, Any]) -> None:
        """Second half: the replica is whole."""
        manifest = SnapshotManifest.model_validate(content)
        self.loading = None
        try:
            with self._replica:
                load_moments(folder / "moments", self._moments())
                self._become(manifest)
                self._rounds.fetched(time.monotonic(), manifest.round, manifest.lineage, snapshot=True)
        except DigestError as error:
            _log.warning("%s", error)
            self._rounds.fetched(time.monotonic(), None, snapshot=True)
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._averager.tell("set_replica", manifest.round, manifest.lineage, True)
        self._kick.set()

    def _take_over(self, folder: Path, content: dict[str, Any]) -> None:
        """Another peer sent its state, because this one could not fetch it."""
        manifest = SnapshotManifest.model_validate(content)
        if not self._rounds.take_over(time.monotonic(), manifest.round, manifest.lineage):
            return
        try:
            with self._replica:
                load_weights(folder / "weights", self._parameters)
                load_moments(folder / "moments", self._moments())
                self._version += 1
                self._become(manifest)
        except DigestError as error:
            _log.warning("%s", error)
            return
        self._averager.tell("set_replica", manifest.round, manifest.lineage, True)
        self._weights_ready.set()
        self._kick.set()

    def _become(self, manifest: SnapshotManifest) -> None:
        self._sync()
        self._groups = dict(manifest.groups)
        self._follow_schedule(manifest.schedule)
        self._rounds.sketch = self._sketch()

    def _handed_in(self, samples: int) -> None:
        if samples:
            self._averager.drop_waiting()
            self._end_round(self.round + 1, "", max(0, samples - self._given), 1)
        self._rounds.handed_in(time.monotonic(), samples)
