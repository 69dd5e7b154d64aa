"""What a population of volunteers makes of a run, and from which size on it breaks: `kantha simulate`.

The real rules on a virtual network. A gradient's size follows from the spec's model and compression; speeds and links
are the organizer's guess. Volunteers leave after sessions of about the given length, and others take their place.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from kantha.errors import SpecError
from kantha.simulation.network import Host
from kantha.simulation.peers import Observer, Result, Rules, SimPeer, World
from kantha.spec import RunSpec
from kantha.swarm.rounds import RoundSettings

_GROUP = re.compile(r"(\d+)x(\d+(?:\.\d+)?)@(\d+(?:\.\d+)?)")
_MBIT = 125_000.0  # bytes a second
_BYTES = {"8bit": 1 + 4 / 256, "fp16": 2.0, "none": 4.0}  # a value
_MOST_PEERS = 400  # that are tried
_LARGER_ROUNDS = 6  # ideal rounds for which a larger population is tried
_BROKEN = 0.5  # share of ideal below which a population is too large
_FIRST = "start"


@dataclass(frozen=True)
class Volunteers:
    """Some of a kind."""

    count: int
    speed: float  # samples a second each
    mbit: float  # of the link, each way

    @staticmethod
    def parse(text: str) -> "Volunteers":
        """`20x8@50`: 20 volunteers of 8 samples/s on 50 Mbit/s. Raises `SpecError`."""
        match = _GROUP.fullmatch(text)
        if match is None or not int(match[1]) or not float(match[2]) or not float(match[3]):
            raise SpecError("--group", [f"{text!r} is not like 20x8@50: 20 volunteers, 8 samples/s, 50 Mbit/s"])
        return Volunteers(int(match[1]), float(match[2]), float(match[3]))


@dataclass(frozen=True)
class Population:
    volunteers: Sequence[Volunteers]
    session_hours: float
    outbound_share: float  # of volunteers that nobody can dial
    coordinator_mbit: float

    @property
    def count(self) -> int:
        return sum(kind.count for kind in self.volunteers)

    def times(self, factor: int) -> "Population":
        larger = [Volunteers(kind.count * factor, kind.speed, kind.mbit) for kind in self.volunteers]
        return Population(larger, self.session_hours, self.outbound_share, self.coordinator_mbit)


@dataclass(frozen=True)
class Plan:
    """What came of a population."""

    volunteers: int
    hours: float
    rounds: int
    failed: int
    ideal_seconds: float  # of a round, if nothing but computing took time
    share_of_ideal: float
    mb_per_volunteer_hour: float
    coordinator_mb_per_hour: float

    @property
    def rounds_per_hour(self) -> float:
        return self.rounds / self.hours

    @property
    def is_broken(self) -> bool:
        return self.share_of_ideal < _BROKEN


def count_values(spec: RunSpec) -> int:
    """Parameters of the spec's model with its two heads, all of which travel in every round."""
    shape, vocabulary = spec.model, spec.tokenizer.vocab_size
    e, h, f = shape.embedding_size, shape.hidden_size, shape.intermediate_size
    embeddings = (vocabulary + shape.max_positions + 2) * e + 2 * e
    projection = e * h + h
    attention = 4 * (h * h + h) + 2 * h
    feed_forward = h * f + f + f * h + h + 2 * h
    pooler = h * h + h
    masked_head = h * e + e + 2 * e + vocabulary  # its decoder is the embedding
    order_head = 2 * h + 2
    group = attention + feed_forward
    return embeddings + projection + shape.layer_groups * group + pooler + masked_head + order_head


class _Counter(Observer):
    """Adds up what is finished: each round once, however many peers finish it."""

    def __init__(self) -> None:
        self.rounds: dict[str, int] = {}  # samples, by lineage
        self.failures: set[int] = set()

    def finished(self, peer: SimPeer, result: Result | None, *, averaged: bool) -> None:
        if result is not None:
            self.rounds[result.lineage] = sum(batch.samples for batch in result.batches)

    def failed(self, peer: SimPeer, round_number: int, reason: str) -> None:
        self.failures.add(round_number)


class _Swarm:
    """A population at work."""

    def __init__(self, spec: RunSpec, population: Population, seed: int) -> None:
        self._random = Random(seed)
        self._population = population
        self.observer = _Counter()
        settings = RoundSettings(
            target=spec.swarm.target_batch_size,
            patience=spec.swarm.matchmaking_seconds,
            averaging_timeout=spec.swarm.averaging_timeout,
        )
        values = count_values(spec) * _BYTES[spec.swarm.compression]
        self.world = World(settings, values, self._random, Rules(), self.observer)
        self.hosts: list[Host] = []
        self.possible = 0.0  # samples, if every volunteer had computed from its start to its end
        self._running: dict[str, tuple[float, float]] = {}  # speed and start of every volunteer that is here
        self._incarnations = 0
        self._start("coordinator", 0.0, population.coordinator_mbit, dialable=True, state=(0, _FIRST))
        for kind in population.volunteers:
            for _ in range(kind.count):
                self._volunteer(kind, first=True)

    def _start(self, name: str, speed: float, mbit: float, *, dialable: bool, state: tuple[int, str] | None) -> SimPeer:
        self._incarnations += 1
        host = Host(name, up=mbit * _MBIT, down=mbit * _MBIT, latency=self._random.uniform(0.01, 0.1))
        peer = SimPeer(
            self.world,
            host,
            trains=speed > 0,
            dialable=dialable,
            speed=speed,
            offset=self._random.uniform(-30.0, 30.0),
            incarnation=self._incarnations,
            round_number=state[0] if state else None,
            lineage=state[1] if state else "",
        )
        self.world.peers[name] = peer
        peer.start()
        return peer

    def _volunteer(self, kind: Volunteers, *, first: bool) -> None:
        """One that stays for a session; then another comes."""
        dialable = self._random.random() >= self._population.outbound_share
        peer = self._start(f"volunteer {self._incarnations}", kind.speed, kind.mbit, dialable=dialable, state=None)
        self.hosts.append(peer.host)
        began = self.world.loop.now
        session = self._population.session_hours * 3600 * self._random.uniform(0.5, 1.5)
        if first:  # the swarm is seen in the middle of its life
            session *= self._random.random()

        def leave() -> None:
            self.possible += kind.speed * (self.world.loop.now - began)
            self._running.pop(peer.name)
            peer.leave()
            self._volunteer(kind, first=False)

        self._running[peer.name] = (kind.speed, began)
        self.world.loop.at(began + session, leave)

    def run(self, seconds: float, say: Callable[[float], None]) -> None:
        step = max(10.0, seconds / 20)
        until = 0.0
        while until < seconds:
            until = min(seconds, until + step)
            self.world.loop.run(until)
            say(until / seconds)
        self.possible += sum(speed * (seconds - began) for speed, began in self._running.values())


def simulate(spec: RunSpec, population: Population, hours: float, seed: int, say: Callable[[float], None]) -> Plan:
    """Run a population for some virtual hours; `say` is told how far that is, from 0 to 1."""
    swarm = _Swarm(spec, population, seed)
    seconds = hours * 3600
    swarm.run(seconds, say)
    speed = sum(kind.count * kind.speed for kind in population.volunteers)
    coordinator = swarm.world.peers["coordinator"].host
    return Plan(
        volunteers=population.count,
        hours=hours,
        rounds=len(swarm.observer.rounds),
        failed=len(swarm.observer.failures),
        ideal_seconds=spec.swarm.target_batch_size / speed,
        share_of_ideal=sum(swarm.observer.rounds.values()) / swarm.possible,
        mb_per_volunteer_hour=sum(host.sent + host.received for host in swarm.hosts) / 1e6 / hours / population.count,
        coordinator_mb_per_hour=(coordinator.sent + coordinator.received) / 1e6 / hours,
    )


def find_limit(
    spec: RunSpec, population: Population, seed: int, say: Callable[[int, float], None]
) -> tuple[list[Plan], bool]:
    """Larger and larger populations of the same mix, until one breaks: (what came of each, whether one broke)."""
    plans: list[Plan] = []
    factor = 2
    while population.count * factor <= _MOST_PEERS:
        larger = population.times(factor)
        speed = sum(kind.count * kind.speed for kind in larger.volunteers)
        seconds = max(300.0, _LARGER_ROUNDS * spec.swarm.target_batch_size / speed)
        plans.append(
            simulate(spec, larger, seconds / 3600, seed, lambda done, size=larger.count: say(size, done))  # type: ignore[misc]
        )
        if plans[-1].is_broken:
            return plans, True
        factor *= 2
    return plans, False
