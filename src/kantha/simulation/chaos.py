"""Small virtual swarms under random faults: `python -m kantha.simulation.chaos --seeds 1000`.

Each seed is another swarm of 2 to 8 peers, 0 to 2 of them averagers, some outbound-only, of unequal speed and link. For
some minutes peers crash, freeze (SIGSTOP), lose their link, are parted into two halves, lose messages, drift, leave and
join, averagers return from an older checkpoint; half of the faults hit in the middle of an averaging. Then the faults
stop. These must hold:

(a) *A round completes* within `Bounds.round` of the last fault, and again after each round, while somebody who can be
    dialled (as every averager can), a trainer, and somebody who holds a state are alive and connected.
(b) *No sample is counted twice* or in two rounds, in the history of any replica.
(c) *Nobody stays behind*: `Bounds.caught_up` after the last fault every peer is within two rounds of the newest.
(d) *One result a round*: two peers that have the same result of a round, and are alive, unfrozen and connected from
    `SETTLED` before they had it, never get different results of the next one from a group. Nor has a round two results
    after a single peer crashed, froze, left or was slow: what one peer reports as counted is not lost with it. Where a
    fault has made two lineages, or a replica drifted, it is over `Bounds.caught_up` after the last fault: every peer's
    state is in the history of the newest one, which has one result for every round.
(e) *Nobody waits without a deadline*: an attempt ends within `Bounds.attempt`, a fetch, push or hand-in within
    `Bounds.transfer` without progress, a leaver is gone within `Bounds.leave`, of time in which its program ran.

The first that does not hold ends the seed: it is printed with its timeline, and the exit status is 1.
"""

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random

from kantha.simulation.network import Host
from kantha.simulation.peers import CALL, PRESENT, Observer, Result, Rules, SimPeer, World
from kantha.swarm import groups, rounds
from kantha.swarm.rounds import RoundSettings

FIRST = "start"  # the lineage of round 0
CHECK = 5.0  # seconds between two looks at the whole swarm
SETTLED = 5.0  # seconds after a fault, until a peer has seen the others again


@dataclass(frozen=True)
class Bounds:
    """Seconds, for one seed's settings."""

    round: float
    caught_up: float
    attempt: float
    transfer: float
    leave: float

    @staticmethod
    def of(settings: RoundSettings, rate: float, slowest: float, values: float) -> "Bounds":
        """:param rate: samples a second of all trainers that are alive
        :param slowest: link, in bytes a second
        """
        forming = 3 * settings.patience + 10.0
        averaging = settings.averaging_timeout + 2 * groups.MARGIN + 5.0
        state = 8 * 5.0 * values / slowest  # a whole state, on a link that up to eight share
        attempt = (rounds.LEADERS + 1) * (CALL + settings.patience + forming) + averaging
        caught_up = 2 * PRESENT + rounds.PUSH_AGAIN + forming + averaging + 2 * state + 2 * settings.target / rate
        return Bounds(
            round=PRESENT
            + rounds.SUSPECT
            + rounds.PUSH_AGAIN
            + forming
            + averaging
            + state
            + 2 * settings.target / rate,
            caught_up=caught_up,
            attempt=attempt,
            transfer=60.0 + 2 * state,
            leave=attempt + 2 * rounds.LEAVE + 60.0 + state,
        )


class Violation(Exception):
    """An invariant does not hold."""


@dataclass
class Fault:
    """One fault, while it is on."""

    who: str
    parts: bool  # peers from one another; else it is one peer's own
    since: float
    until: float = float("inf")


@dataclass
class History:
    """What one peer has been through."""

    became: dict[str, float] = field(default_factory=dict)  # when it was at a lineage, first
    undisturbed_since: float = 0.0
    faults: int = 0  # on it now


class Watcher(Observer):
    """Checks the invariants of one seed."""

    def __init__(self, trace: bool) -> None:
        self.timeline: list[str] = []
        self.rounds_finished = 0
        self.last_round_at = 0.0
        self.newest = 0
        self.forks = 0
        self.failed_rounds = 0
        self.recovery = 0.0  # seconds from the last fault to the first round after it
        self.network_faults = 0  # now
        self.on_group: list[Callable[[SimPeer], None]] = []  # when a group begins, told its leader
        self.on_held: list[Callable[[SimPeer], None]] = []  # when a member has every part
        self._faults: list[Fault] = []
        self._first_at: dict[str, float] = {FIRST: 0.0}  # when the first peer was at a lineage
        self._trace = trace
        self._world: World | None = None
        self._parents: dict[str, tuple[str, int]] = {}  # lineage -> (lineage of the round before, round)
        self._counted: dict[str, dict[str, set[tuple[str, int]]]] = {FIRST: {}}
        self._batches: dict[str, frozenset[tuple[str, int]]] = {}
        self._reached: dict[str, dict[str, list[str]]] = {}  # lineage -> next lineages -> peers that averaged it
        self._histories: dict[str, History] = {}

    def watch(self, world: World) -> None:
        self._world = world

    @property
    def world(self) -> World:
        assert self._world is not None
        return self._world

    # ---- what happens

    def note(self, peer: str, text: Callable[[], str]) -> None:
        if self._trace:
            self.timeline.append(f"{self.world.loop.now:8.1f}  {peer:<5} {text()}")

    def group(self, peer: SimPeer) -> None:
        for react in self.on_group:
            react(peer)

    def failed(self, peer: SimPeer, round_number: int, reason: str) -> None:
        self.failed_rounds += 1

    def disturbed(self, key: str, faults: int) -> None:
        """A fault hit this peer now (1), has just ended (-1), or came and went (0)."""
        history = self._histories[key]
        history.faults += faults
        history.undisturbed_since = self.world.loop.now + SETTLED

    def held(self, peer: SimPeer) -> None:
        for react in self.on_held:
            react(peer)

    def fault(self, who: str, *, parts: bool) -> "Fault":
        """:param parts: it parts peers from one another; else it is one peer's own"""
        fault = Fault(who, parts, self.world.loop.now)
        self._faults.append(fault)
        return fault

    def started(self, peer: SimPeer) -> None:
        history = self._histories[peer.key] = History(undisturbed_since=self.world.loop.now)
        if peer.rounds.ready:
            history.became[peer.rounds.lineage] = self.world.loop.now

    def finished(self, peer: SimPeer, result: Result | None, *, averaged: bool) -> None:
        now, number, lineage = self.world.loop.now, peer.rounds.round, peer.rounds.lineage
        group = "" if result is None else f" ({result.group})"
        self.note(peer.name, lambda: f"is at round {number} {lineage[:4]}{group}")
        self._histories[peer.key].became.setdefault(lineage, now)
        self._first_at.setdefault(lineage, now)
        if result is None:
            return
        if number > self.newest:
            self.newest = number
            self.last_round_at = now
        if lineage not in self._parents:
            self.rounds_finished += 1
            self._parents[lineage] = (result.base, number)
            self._count(peer, result)
        if averaged:
            self._check_same_result(peer, result)

    # ---- (b)

    def _count(self, peer: SimPeer, result: Result) -> None:
        batches = [(batch.peer, batch.number) for batch in result.batches]
        if not batches:
            self._violated("b", f"{result.group} counts as round {result.round}, and has no sample")
        if len(set(batches)) < len(batches):
            self._violated("b", f"{result.group} has a sample twice: {_twice(batches)}")
        self._batches[result.lineage] = frozenset(batches)
        lineage = result.base
        while lineage in self._batches:
            if both := self._batches[lineage] & self._batches[result.lineage]:
                self._violated(
                    "b",
                    f"{len(both)} batches of {result.group} (round {result.round}), of "
                    f"{sorted({name for name, _ in both})}, are in round {self._parents[lineage][1]} already",
                )
            lineage = self._parents[lineage][0]

    # ---- (d), while it happens

    def _check_same_result(self, peer: SimPeer, result: Result) -> None:
        results = self._reached.setdefault(result.base, {})
        if peer.key in results.setdefault(result.lineage, []):
            return
        if len(results) > 1 and not results[result.lineage]:
            self.forks += 1
            self.note(peer.name, lambda: f"FORK: {result.lineage[:4]} after {result.base[:4]}, as {list(results)}")
            since = self._first_at[result.base] - SETTLED
            faults = [fault for fault in self._faults if fault.until + SETTLED >= since]
            if not any(fault.parts for fault in faults) and len({fault.who for fault in faults}) <= 1:
                self._violated(
                    "d", f"round {result.round} has two results, and only {[fault.who for fault in faults]} had a fault"
                )
        results[result.lineage].append(peer.key)
        if not self._undisturbed(peer.key, result.base):
            return
        for lineage, names in results.items():
            for name in names:
                if lineage != result.lineage and self._undisturbed(name, result.base):
                    self._violated(
                        "d",
                        f"{peer.key} and {name} were at {result.base[:4]} and undisturbed since; one has "
                        f"{result.lineage[:4]} ({result.group}) for round {result.round}, the other {lineage[:4]}",
                    )

    def _undisturbed(self, key: str, since: str) -> bool:
        history = self._histories[key]
        quiet = not history.faults and not self.network_faults
        return quiet and history.undisturbed_since <= history.became.get(since, -1.0)

    # ---- (e)

    def ticked(self, peer: SimPeer) -> None:
        now, bounds = peer.clock(), self.bounds
        ran_since = peer.thawed_at
        for what, since in peer.busy.items():
            bound = bounds.attempt if what == "attempt" else bounds.transfer
            if now - max(since, ran_since) > bound:
                self._violated("e", f"{peer.name} waits since {now - since:.0f} s in {what}, {bound:.0f} s allowed")

    bounds: Bounds

    # ---- (a), (c), (d)

    def check(self, last_fault: float) -> None:
        """A look at the whole swarm, while no fault is on."""
        now, world = self.world.loop.now, self.world
        peers = [peer for peer in world.peers.values() if peer.host.alive and not peer.leaving]
        ready = [peer for peer in peers if peer.rounds.ready]
        trainers = [peer for peer in peers if peer.trains]
        able = bool(ready) and bool(trainers) and any(peer.dialable for peer in peers)
        since = max(last_fault, self.last_round_at)
        if able and now - since > self.bounds.round:
            self._violated("a", f"no round for {now - since:.0f} s, {self.bounds.round:.0f} s allowed")
        if not ready or not able or now - last_fault < self.bounds.caught_up:
            return
        newest = max(ready, key=lambda peer: peer.rounds.round)
        history, lineage = {}, newest.rounds.lineage
        while lineage in self._parents:
            lineage_before, number = self._parents[lineage]
            history[number] = lineage
            lineage = lineage_before
        history[0] = lineage
        for peer in peers:
            if now - self._histories[peer.key].undisturbed_since < self.bounds.caught_up:
                continue
            own = peer.rounds
            if not own.ready or own.round < newest.rounds.round - 2:
                at = f"{peer.name} is {own.phase.value} at {own.round}"
                self._violated("c", f"{at}, {newest.name} at {newest.rounds.round}")
            if history.get(own.round) != own.lineage:
                has = f"{peer.name} has {own.lineage[:4]} for round {own.round}"
                self._violated("d", f"{has}, {newest.name} {history.get(own.round)}")
            if abs(peer.drift - newest.drift) > 2 * rounds.DRIFT:
                self._violated("d", f"{peer.name}'s replica is {peer.drift:.3f} off, and nobody repairs it")

    def _violated(self, invariant: str, text: str) -> None:
        self.note("!", lambda: f"({invariant}) {text}")
        raise Violation(f"({invariant}) at {self.world.loop.now:.1f} s: {text}")


def _twice(batches: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [batch for batch in set(batches) if batches.count(batch) > 1]


class Chaos:
    """One seed: a swarm, its faults, its recovery."""

    def __init__(self, seed: int, rules: Rules, trace: bool = False) -> None:
        self.random = random = Random(seed)
        self.watcher = Watcher(trace)
        averagers, trainers = random.choice(
            [(0, 2), (0, 4), (1, 1), (1, 2), (1, 3), (1, 3), (1, 7), (2, 2), (2, 3), (2, 6)]
        )
        outbound_share = random.choice([0.0, 0.0, 0.3, 0.7, 1.0])
        speeds = [random.choice([1.0, 2.0, 4.0, 8.0]) for _ in range(trainers)]
        target = int(random.uniform(8.0, 25.0) * sum(speeds))
        self._up = [random.choice([10, 20, 50, 100, 1000]) * 125e3 for _ in range(averagers + trainers)]
        values = min(self._up) * random.uniform(0.2, 2.0)
        self._settings = RoundSettings(
            target=target, patience=random.uniform(2.0, 5.0), averaging_timeout=random.uniform(15.0, 30.0)
        )
        self.world = World(self._settings, values, random, rules, self.watcher)
        self.watcher.watch(self.world)
        self._checkpoint_rounds = random.choice([1, 3, 5])
        self._checkpoints: dict[str, tuple[int, str]] = {}
        self._speeds: dict[str, float] = {}
        self._dialable: dict[str, bool] = {}
        self._incarnations = 0
        self._last_fault = 0.0
        trainers_have_state = averagers == 0 or random.random() < 0.5
        for i in range(averagers):
            self._start(f"a{i}", dialable=True, state=(0, FIRST))
        for i, speed in enumerate(speeds):
            name = f"t{i}"
            self._speeds[name] = speed
            dialable = random.random() >= outbound_share or (averagers == 0 and i == 0)
            self._start(name, dialable=dialable, state=(0, FIRST) if trainers_have_state else None)
        self._heal: list[Callable[[], None]] = []
        self.faults_until = random.uniform(60.0, 240.0)
        self._at_results = random.random() < 0.25  # all faults are crashes and freezes at the most delicate moment
        for _ in range(random.choice([0, 1, 1, 2, 3, 5, 8, 12])):
            self._plan_fault()

    def run(self) -> None:
        """Raises `Violation`."""
        loop = self.world.loop
        self._set_bounds()
        loop.at(CHECK, self._check)
        loop.run(self.faults_until)
        self._end_of_faults()
        self._set_bounds()
        ended = loop.now
        loop.run(ended + self.watcher.bounds.caught_up + self.watcher.bounds.round / 2)

    # ---- peers

    def _start(self, name: str, dialable: bool, state: tuple[int, str] | None) -> SimPeer:
        random, index = self.random, len(self._dialable) % len(self._up)
        self._dialable[name] = dialable
        up = self._up[index]
        host = Host(name, up=up, down=up * random.choice([1, 2, 5]), latency=random.uniform(0.005, 0.1))
        self._incarnations += 1
        peer = SimPeer(
            self.world,
            host,
            trains=name.startswith("t"),
            dialable=dialable,
            speed=self._speeds.get(name, 0.0),
            offset=random.uniform(-1e4, 1e4),
            incarnation=self._incarnations,
            round_number=state[0] if state else None,
            lineage=state[1] if state else "",
        )
        self.world.peers[name] = peer
        self.watcher.started(peer)
        begins = f"with round {state[0]}" if state else "without a state"
        self.watcher.note(name, lambda: f"starts {begins}{'' if dialable else ', outbound-only'}")
        peer.start()
        return peer

    def _alive(self, kind: str = "") -> list[SimPeer]:
        return [p for p in self.world.peers.values() if p.host.alive and not p.leaving and p.name.startswith(kind)]

    def _set_bounds(self) -> None:
        rate = sum(peer.speed for peer in self._alive("t"))
        self.watcher.bounds = Bounds.of(self._settings, rate or 1.0, min(self._up), self.world.values)

    # ---- faults

    def _plan_fault(self) -> None:
        random = self.random
        if self._at_results:
            self._plan_fault_at_result(random.choice([self._crash, self._crash, self._freeze]))
            return
        kind = random.choice(
            [
                *["crash", "crash", "averager", "freeze", "freeze", "cut", "cut", "partition", "loss", "leave", "join"],
                *["drift", "slow"],
            ]
        )
        when = random.uniform(10.0, self.faults_until - 10.0)
        fault = getattr(self, f"_{kind}")
        trigger = random.choice(["time", "group", "held"])
        if trigger == "time":
            self.world.loop.at(when, fault)
            return
        delay = random.uniform(0.0, random.choice([0.3, 1.0, 1.0, 3.0, 15.0]))
        armed = [False]

        def arm() -> None:
            armed[0] = True

        def react(peer: SimPeer) -> None:
            if armed[0]:
                armed[0] = False
                at_it = partial(fault, peer) if kind in ("crash", "freeze", "cut") and random.random() < 0.6 else fault
                self.world.loop.at(self.world.loop.now + delay, self._guarded(at_it))

        self.world.loop.at(when, arm)
        (self.watcher.on_group if trigger == "group" else self.watcher.on_held).append(react)

    def _plan_fault_at_result(self, fault: Callable[[SimPeer], None]) -> None:
        """A fault of a member that has just got a group's whole result, as the first or a later one."""
        random = self.random
        after, delay = random.uniform(10.0, self.faults_until - 10.0), random.uniform(0.0, 1.5)
        done = False

        def react(peer: SimPeer) -> None:
            nonlocal done
            if not done and self.world.loop.now > after:
                done = True
                self.world.loop.at(self.world.loop.now + delay, self._guarded(partial(fault, peer)))

        self.watcher.on_held.append(react)

    def _guarded(self, fault: Callable[[], None]) -> Callable[[], None]:
        def act() -> None:
            if self.world.loop.now < self.faults_until:
                fault()

        return act

    def _pick(self, kind: str = "") -> SimPeer | None:
        peers = self._alive(kind)
        return self.random.choice(peers) if peers else None

    def _for_a_while(self, peers: list[SimPeer], what: str, begin: Callable[[], None], end: Callable[[], None]) -> None:
        """A fault of these peers (none: of the network, so of everyone) that is over after some seconds, at the latest
        when faults end."""
        over = False
        who = peers[0].name if peers else "*"
        fault = self.watcher.fault(who, parts=what not in ("FREEZE", "SLOW LINK"))

        def undo() -> None:
            nonlocal over
            if not over:
                over = True
                fault.until = self.world.loop.now
                self.watcher.note(who, lambda: f"{what} IS OVER")
                end()
                self._disturb(peers, -1)

        self.watcher.note(who, lambda: what)
        begin()
        self._disturb(peers, 1)
        seconds = self.random.choice([2.0, 8.0, 20.0, 45.0, 80.0]) * self.random.uniform(0.5, 1.2)
        self.world.loop.at(self.world.loop.now + seconds, undo)
        self._heal.append(undo)

    def _disturb(self, peers: list[SimPeer], faults: int = 0) -> None:
        self._last_fault = self.world.loop.now
        if not peers:
            self.watcher.network_faults += faults
        for peer in peers or self._alive():
            self.watcher.disturbed(peer.key, faults if peers else 0)

    def _crash(self, peer: SimPeer | None = None) -> None:
        peer = peer or self._pick("t")
        if peer is None or not peer.host.alive:
            return
        name = peer.name
        self.watcher.note(name, lambda: "CRASHES")
        self.watcher.fault(name, parts=False).until = self.world.loop.now
        peer.host.alive = False
        self._disturb([peer])
        if self.random.random() < 0.7:
            self.world.loop.at(self.world.loop.now + self.random.uniform(2.0, 40.0), lambda: self._revive(name))

    def _revive(self, name: str) -> None:
        if self.world.peers[name].host.alive or self.world.loop.now > self.faults_until:
            return
        state = self._checkpoints.get(name, (0, FIRST)) if name.startswith("a") else None
        self.watcher.fault(name, parts=False).until = self.world.loop.now
        self._start(name, self._dialable[name], state)
        self._last_fault = self.world.loop.now

    def _averager(self) -> None:
        if (peer := self._pick("a")) is not None:
            self._crash(peer)

    def _freeze(self, peer: SimPeer | None = None) -> None:
        peer = peer or self._pick()
        if peer is None or peer.host.frozen or not peer.host.alive:
            return
        host = peer.host

        def thaw() -> None:
            host.frozen = False
            peer.thawed_at = peer.clock()
            backlog, host.backlog = host.backlog, []
            for action in backlog:
                self.world.loop.at(self.world.loop.now, action, host)

        self._for_a_while([peer], "FREEZE", lambda: setattr(host, "frozen", True), thaw)

    def _cut(self, peer: SimPeer | None = None) -> None:
        peer = peer or self._pick()
        if peer is not None and peer.host.alive and not peer.host.cut:
            host = peer.host
            self._for_a_while(
                [peer], "LINK CUT", lambda: setattr(host, "cut", True), lambda: setattr(host, "cut", False)
            )

    def _partition(self) -> None:
        away = [peer.host for peer in self._alive() if self.random.random() < 0.5]
        if any(peer.host.side for peer in self.world.peers.values()):
            return

        def part(side: int) -> None:
            for host in away:
                host.side = side

        self._for_a_while([], f"PARTITION OF {[host.name for host in away]}", lambda: part(1), lambda: part(0))

    def _loss(self) -> None:
        loss = self.random.choice([0.01, 0.05, 0.2])
        network = self.world.network
        self._for_a_while(
            [], f"{loss:.0%} LOSS", lambda: setattr(network, "loss", loss), lambda: setattr(network, "loss", 0.0)
        )

    def _slow(self) -> None:
        if (peer := self._pick()) is None or peer.host.slow:
            return
        host = peer.host

        def slow(factor: float) -> None:
            host.slow = not host.slow
            host.up, host.down = host.up * factor, host.down * factor

        self._for_a_while([peer], "SLOW LINK", lambda: slow(0.1), lambda: slow(10.0))

    def _drift(self) -> None:
        peer = self._pick()
        if peer is not None and peer.rounds.ready and peer.drift == 0.0:
            self.watcher.note(peer.name, lambda: "DRIFT")
            self._disturb([peer])
            peer.drifts(self.random.choice([0.01, 0.1, -0.3]))

    def _leave(self) -> None:
        if len(self._alive("t")) > 1 and (peer := self._pick("t")) is not None:
            self.watcher.fault(peer.name, parts=False)
            self._disturb([peer])
            peer.leave()

    def _join(self) -> None:
        rate = sum(peer.speed for peer in self._alive("t"))
        if len(self._alive()) >= 8 or self._settings.target < 5.0 * rate:
            return
        name = f"t{sum(name.startswith('t') for name in self._dialable)}"
        self._speeds[name] = self.random.choice([1.0, 2.0, 4.0, 8.0])
        self._start(name, self.random.random() < 0.5, None)
        self._last_fault = self.world.loop.now

    def _end_of_faults(self) -> None:
        self.watcher.on_group.clear()
        self.watcher.on_held.clear()
        for undo in self._heal:
            undo()
        if not self._alive("a") and "a0" in self._dialable:
            self._start("a0", True, self._checkpoints.get("a0", (0, FIRST)))
        if not self._alive("t"):
            self._start("t0", self._dialable["t0"], None)
        self._last_fault = self.world.loop.now
        self.watcher.note("*", lambda: "FAULTS ARE OVER")

    # ---- looking

    def _check(self) -> None:
        for peer in self._alive("a"):
            if peer.rounds.ready and peer.rounds.round % self._checkpoint_rounds == 0:
                self._checkpoints[peer.name] = (peer.rounds.round, peer.rounds.lineage)
        disturbed = self.world.network.loss > 0 or any(
            peer.host.frozen or peer.host.cut or peer.host.side for peer in self.world.peers.values()
        )
        if disturbed:
            self._last_fault = self.world.loop.now
        else:
            self.watcher.check(self._last_fault)
        self.world.loop.at(self.world.loop.now + CHECK, self._check)


@dataclass(frozen=True)
class Outcome:
    """What came of one seed."""

    seed: int
    violation: str | None
    rounds: int
    forks: int
    failed_rounds: int
    virtual_seconds: float


def run_seed(seed: int, rules: Rules | None = None) -> Outcome:
    chaos = Chaos(seed, rules or Rules())
    violation = None
    try:
        chaos.run()
    except Violation as found:
        violation = str(found)
    watcher = chaos.watcher
    return Outcome(seed, violation, watcher.rounds_finished, watcher.forks, watcher.failed_rounds, chaos.world.loop.now)


def timeline(seed: int, rules: Rules | None = None) -> list[str]:
    """What happened in one seed, a line each."""
    chaos = Chaos(seed, rules or Rules(), trace=True)
    with contextlib.suppress(Violation):
        chaos.run()
    return chaos.watcher.timeline


def run_seeds(seeds: range, processes: int = 2) -> Iterator[Outcome]:
    if processes == 1 or len(seeds) < 4:
        yield from map(run_seed, seeds)
        return
    with multiprocessing.Pool(processes) as pool:
        yield from pool.imap(run_seed, seeds, chunksize=5)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kantha.simulation.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many swarms")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, help="only this one, with its timeline")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first violation")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    say = sys.stdout.write
    if options.seed is not None:
        outcome = run_seed(options.seed)
        say("\n".join(timeline(options.seed)) + "\n")
        say(f"seed {options.seed}: {outcome.violation or 'no violation'}, {outcome.rounds} rounds\n")
        return 1 if outcome.violation else 0
    began = time.monotonic()
    outcomes: list[Outcome] = []
    violated: list[Outcome] = []
    for outcome in run_seeds(range(options.first_seed, options.first_seed + options.seeds), options.processes):
        outcomes.append(outcome)
        if outcome.violation is not None:
            violated.append(outcome)
            say(f"seed {outcome.seed}: {outcome.violation}\n")
            if not options.keep_going:
                break
        if len(outcomes) % 100 == 0:
            say(f"{len(outcomes)} seeds, {time.monotonic() - began:.0f} s\n")
            sys.stdout.flush()
    if violated and not options.keep_going:
        say("\n".join(timeline(violated[0].seed)) + "\n")
    seconds = time.monotonic() - began
    say(
        f"{len(outcomes)} seeds, {sum(o.virtual_seconds for o in outcomes) / 3600:.0f} virtual hours, "
        f"{sum(o.rounds for o in outcomes)} rounds, {sum(o.failed_rounds for o in outcomes)} counted as failed, "
        f"{sum(o.forks for o in outcomes)} forks healed, {len(violated)} seeds with a violation, {seconds:.0f} s\n"
    )
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main())
