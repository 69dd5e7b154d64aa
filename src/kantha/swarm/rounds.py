"""The rules of a round, without I/O: when to average, what to do when it fails, how to join, catch up and leave.

`Rounds` is one peer's side. It is told what happened (samples done, peers seen, an attempt ended, state received) and
the time, and `poll` returns what to do. It knows no torch, no network and no thread, and does not care what is
averaged. The engine (`rounds_engine.py`) feeds it from a real swarm, `simulation/` from a virtual one.

                 weights here                target reached, or called
    LOADING ───────────────▶ COMPUTING ◀──────────────────────────────▶ AVERAGING
       ▲     state loaded       │  ▲         applied · failed · too late     │
       │                        │  │ has caught up                           │
       │ no update kept         ▼  │                                         │
       └────────────────── CATCHING_UP ◀─────────────────────────────────────┘
                                              the others have finished it

A trainer computes in every phase but the first part of LOADING, and hands in what it has when it leaves.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from math import sqrt

from kantha.swarm.groups import Member

OLD_NEWS = 10.0  # seconds without a look at the others after which no attempt begins: frozen, or cut off
AHEAD = 2.0  # seconds before the target batch is there that peers call each other together
LEADERS = 3  # peers that are asked to lead, before an attempt ends without a group
ATTEMPTS = 3  # failed attempts in a row after which a round is counted as failed, and put off
BACKOFF = 5.0  # seconds that it is put off
AGAIN = 1.0  # seconds between two attempts that found no group
SUSPECT = 30.0  # seconds that a peer which broke an attempt is left out where others suffice; doubled with each time
MOST_SUSPECT = 480.0
UPDATES_KEPT = 8  # rounds whose result a peer keeps for those who missed them
FETCH_AGAIN = 2.0  # seconds between two attempts to fetch
LOST = 120.0  # seconds without anybody's state after which a trainer gives up
FORK = 6.0  # seconds that peers of another lineage must be seen before this one goes over to them
DRIFT = 2e-3  # relative distance from the others at which a replica is repaired
REPAIR = 10.0  # seconds that such a replica waits for peers to load from, without averaging
JURY = 9  # replicas that are compared to tell which one is right
PUSH_AFTER = 6.0  # seconds that a peer nobody can serve must be behind, before an outbound-only one sends it the state
PUSH_AGAIN = 30.0
LEAVE = 20.0  # seconds, beyond a running attempt, in which a leaver hands in its work


@dataclass(frozen=True)
class PeerView:
    """What one peer last said of itself."""

    role: str  # trainer or averager
    dialable: bool
    ready: bool  # holds the whole state of `round`
    round: int  # rounds finished
    lineage: str
    samples: int  # towards the next round
    rate: float  # samples a second
    age: float  # seconds since it said so
    sketch: tuple[float, ...] = ()  # of its weights, see `distance`


@dataclass(frozen=True)
class RoundSettings:
    target: int  # samples that make a round, at first
    patience: float  # seconds that a group waits for a peer that does not come
    averaging_timeout: float  # seconds until a group's deadline


class Phase(Enum):
    LOADING = "loading"
    COMPUTING = "computing"
    AVERAGING = "averaging"
    CATCHING_UP = "catching up"
    LEFT = "left"


# ---- what to do


@dataclass(frozen=True)
class Attempt:
    """Form a group and average, once; answered by `attempt_ended`."""

    round: int
    lineage: str
    leaders: tuple[str, ...]  # whom to ask for a group, in this order; this peer among them where it can lead
    here: frozenset[str]  # peers that are in the swarm and ready, this one included
    suspects: frozenset[str]
    not_before: float  # when the target batch is there


@dataclass(frozen=True)
class Apply:
    """Apply the averaged result; answered by `applied`."""

    round: int


@dataclass(frozen=True)
class Thaw:
    """Put samples that were frozen for an attempt back to those that wait for one."""


@dataclass(frozen=True)
class Drop:
    """Forget all samples, frozen and waiting: some may be counted in the state that was loaded."""


@dataclass(frozen=True)
class FetchUpdates:
    """Fetch and apply the results of rounds `first` to `last`; `applied` for each, then `fetched`."""

    first: int
    last: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class FetchSnapshot:
    """Fetch the whole state from peers that are at `round`; `weights_here` on the way, then `fetched`."""

    round: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Push:
    """Send the whole state to a peer that cannot fetch it; answered by `pushed`."""

    peer: str


@dataclass(frozen=True)
class HandIn:
    """Give the samples that wait to a peer that stays; answered by `handed_in`."""

    peer: str


@dataclass(frozen=True)
class Failed:
    """Count the round as failed. It is tried again later."""

    round: int
    reason: str


@dataclass(frozen=True)
class Lost:
    """The swarm's state cannot be had: end with this reason."""

    reason: str


@dataclass(frozen=True)
class Left:
    """All is done that a leaver can do."""


Action = Attempt | Apply | Thaw | Drop | FetchUpdates | FetchSnapshot | Push | HandIn | Failed | Lost | Left


class End(Enum):
    """How an attempt ended."""

    COMMITTED = "committed"
    NO_GROUP = "no group"  # none formed; nothing was sent
    BROKEN = "broken"  # a group formed, and its result does not count
    BEHIND = "behind"  # the others have finished this round


def next_lineage(lineage: str, digest: str) -> str:
    """The lineage after a result with this digest: equal for two peers if all results they applied are."""
    return hashlib.sha256(f"{lineage}:{digest}".encode()).hexdigest()[:16]


def distance(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Estimated relative distance of two replicas from their sketches (AMS sketches: Alon, Matias, Szegedy 1996)."""
    norm = sqrt(sum(x * x for x in theirs))
    return sqrt(sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True))) / norm if norm > 0 else 0.0


class Rounds:
    """One peer's rules. `round` and `lineage` say what its replica is, `phase` what it does."""

    def __init__(
        self,
        me: Member,
        settings: RoundSettings,
        now: float,
        *,
        trains: bool,
        round_number: int | None = None,
        lineage: str = "",
    ) -> None:
        """:param round_number: of the state that it holds; None: it is a newcomer and loads the swarm's"""
        self.me = me
        self.settings = settings
        self.phase = Phase.LOADING if round_number is None else Phase.COMPUTING
        self.round = round_number if round_number is not None else 0
        self.lineage = lineage
        self.ready = round_number is not None
        self.samples = 0  # that wait for a group
        self.frozen_samples = 0  # in an attempt under way
        self.sketch: tuple[float, ...] = ()
        self.target = settings.target  # where rounds grow, the engine changes it with each
        self.is_finished = False  # the run is: no more rounds
        self._rate = 0.0
        self._trains = trains
        self._peers: Mapping[str, PeerView] = {}
        self._seen_at = float("-inf")
        self._failures = 0  # attempts in a row
        self._not_before = now  # for the next attempt
        self._suspects: dict[str, float] = {}  # until when
        self._offences: dict[str, int] = {}  # attempts that each broke
        self._called = False
        self._pending_apply = False
        self._fetching = False
        self._fetch_after = now
        self._searching_since = now
        self._updates_failed = False
        self._other_since: tuple[str, float] | None = None
        self._repair_from: tuple[frozenset[str], float] | None = None  # peers that this replica drifted from, and when
        self._behind_since: dict[str, float] = {}
        self._push_after = now
        self._pushing = False
        self._leaving: float | None = None
        self._handing_in = False
        self._queue: list[Action] = []

    # ---- what happened

    def computed(self, samples: int, rate: float) -> None:
        """`samples` more wait; this peer does `rate` a second."""
        self.samples += samples
        self._rate = rate

    def seen(self, now: float, peers: Mapping[str, PeerView]) -> None:
        """Everybody else who is here, by peer."""
        self._peers, self._seen_at = peers, now
        for peer, view in peers.items():
            if view.ready and view.round >= self.round:
                self._behind_since.pop(peer, None)
            else:
                self._behind_since.setdefault(peer, now)
        self._behind_since = {peer: since for peer, since in self._behind_since.items() if peer in peers}
        if not self._updates_failed and self._fork(now):
            self._updates_failed = True  # the state must come from a snapshot
        # replicas are compared while they average, too: where rounds are short, reports of one round meet only then
        if self.ready and not self._pending_apply and (right := self._not_drifted()) is not None:
            self._repair_from = frozenset(right), now

    def called(self) -> None:
        """Another peer waits for this one to lead a group."""
        self._called = True

    def frozen(self) -> bool:
        """A group has formed: what waited is in it now; what is computed from now on is for the next round.

        False: samples are frozen already, in a group of this round that failed for this peer, and may yet be counted
        there. These and no others are in the new group, so that the round's one result has all of them or none.
        """
        if self.frozen_samples:
            return False
        self.frozen_samples, self.samples = self.samples, 0
        return True

    def attempt_ended(self, now: float, end: End, culprits: Sequence[str] = (), reason: str = "") -> None:
        self._called = False
        if self.phase is not Phase.AVERAGING:
            return
        self.phase = Phase.COMPUTING
        if end is End.NO_GROUP:
            self._suspects.clear()  # of two that suspect each other, none would follow the other
        for peer in culprits:
            self._offences[peer] = self._offences.get(peer, 0) + (end is End.BROKEN)
            self._suspects[peer] = now + min(MOST_SUSPECT, SUSPECT * 2.0 ** max(0, self._offences[peer] - 1))
        if end is End.COMMITTED:
            self._failures = 0
            self._pending_apply = True
            self._queue.append(Apply(self.round + 1))
        elif end is End.BEHIND:
            self._fetch_after = now
        else:
            self._not_before = now + (AGAIN if end is End.NO_GROUP else 0.0)
            if end is End.BROKEN:
                self._failures += 1
                if self._failures >= ATTEMPTS:
                    self._failures = 0
                    self._not_before = now + BACKOFF
                    self._queue.append(Failed(self.round + 1, reason))

    def applied(self, now: float, round_number: int, lineage: str, *, contributed: bool) -> None:
        """The replica has finished a round.

        :param contributed: this peer's frozen samples are in it; if not, they wait again
        """
        self._pending_apply = False
        if not contributed:
            self._thaw()
        self.frozen_samples = 0
        self._failures = 0
        self._become(now, round_number, lineage)

    def weights_here(self, round_number: int, lineage: str) -> None:
        """A newcomer has weights to compute with; the rest of the state is on its way."""
        if not self.ready:
            self.round, self.lineage = round_number, lineage

    def fetched(self, now: float, round_number: int | None, lineage: str = "", *, snapshot: bool) -> None:
        """A fetch ended: the replica is at `round_number` now; None: it failed."""
        self._fetching = False
        if round_number is None:
            self._updates_failed = True
            self._fetch_after = now + (FETCH_AGAIN if snapshot else 0.0)
        elif snapshot:
            self._load(now, round_number, lineage)

    def pushed(self, now: float) -> None:
        self._pushing = False
        self._push_after = now + PUSH_AGAIN

    def take_over(self, now: float, round_number: int, lineage: str) -> bool:
        """Another peer sent its whole state; True: the replica is at `round_number` now, False: it is not wanted."""
        if self.phase in (Phase.AVERAGING, Phase.LEFT) or self._pending_apply or self._fetching:
            return False
        if self.ready and round_number <= self.round:
            return False
        self._load(now, round_number, lineage)
        return True

    def handed_in(self, now: float, samples: int) -> None:
        """`samples` of those that wait are with another peer now."""
        self._handing_in = False
        self.samples -= samples
        if samples == 0:
            self._suspects.update(dict.fromkeys(self._receivers(now)[:1], now + SUSPECT))

    def leave(self, now: float) -> None:
        self._leaving = now

    # ---- what to do

    def poll(self, now: float) -> list[Action]:
        actions, self._queue = self._queue, []
        if self.phase is Phase.LEFT:
            return []
        if self.phase is Phase.AVERAGING or self._pending_apply or self._fetching:
            return actions  # each has a deadline of its own, and is answered
        if self._leaving is not None and (not self.frozen_samples or now - self._leaving >= LEAVE):
            return actions + self._poll_leave(now)
        newest = self._newest()
        if not self.ready or newest > self.round or self._updates_failed:
            actions += self._poll_fetch(now, newest)
            return actions
        if self.phase is Phase.CATCHING_UP:
            self.phase = Phase.COMPUTING
        if self._repair_from is not None and now - self._repair_from[1] >= REPAIR:
            self._repair_from = None  # the next look at the others tells whether it is still needed
        if self._repair_from is not None:  # no attempt, until one of those peers has said that it is as far as this one
            if any(view.round >= self.round for peer, view in self._peers.items() if peer in self._repair_from[0]):
                self._updates_failed = True
                actions += self._poll_fetch(now, newest)
        elif (attempt := self._poll_attempt(now)) is not None:
            self.phase = Phase.AVERAGING
            actions.append(attempt)
        elif (push := self._poll_push(now)) is not None:
            self._pushing = True
            actions.append(push)
        return actions

    def progress(self, now: float) -> tuple[float, float]:
        """(samples that wait in the whole swarm, samples a second), as far as this peer can tell."""
        samples, rate = float(self.samples + self.frozen_samples), self._rate
        for view in self._peers.values():
            # who is still loading computes already, and brings it into a group when its state is whole
            if view.ready and view.round == self.round and view.lineage == self.lineage:
                samples += view.samples + view.rate * (view.age + now - self._seen_at)
            if view.role == "trainer":
                rate += view.rate
        return samples, rate

    # ---- helpers

    def _become(self, now: float, round_number: int, lineage: str) -> None:
        self.round, self.lineage = round_number, lineage
        self.ready = True
        self.sketch = ()
        self._called = False
        self._searching_since = now
        self._other_since = None
        self._not_before = now
        if self.phase in (Phase.LOADING, Phase.CATCHING_UP):
            self.phase = Phase.COMPUTING

    def _load(self, now: float, round_number: int, lineage: str) -> None:
        """A whole state is here. Its history may have samples that this peer still holds, and those that wait were
        computed with weights of long ago; a newcomer's were not, and one that repaired itself knows its history."""
        if self.ready and (round_number, lineage) != (self.round, self.lineage) and self.samples + self.frozen_samples:
            self.samples = self.frozen_samples = 0
            self._queue.append(Drop())
        self._updates_failed = False
        self._repair_from = None
        self._become(now, round_number, lineage)

    def _thaw(self) -> None:
        if self.frozen_samples:
            self.samples += self.frozen_samples
            self.frozen_samples = 0
            self._queue.append(Thaw())

    def _ready_peers(self) -> dict[str, PeerView]:
        return {peer: view for peer, view in self._peers.items() if view.ready}

    def _newest(self) -> int:
        return max((view.round for view in self._ready_peers().values()), default=self.round if self.ready else -1)

    def _rank(self, peer: str, round_number: int) -> tuple[bool, str]:
        """Who leads: averagers first, for they stay and have nothing else to do; then by a hash that changes with the
        round."""
        view = self._peers.get(peer)
        is_trainer = self._trains if view is None else view.role == "trainer"
        return is_trainer, hashlib.sha256(f"{round_number}:{peer}".encode()).hexdigest()

    def _poll_attempt(self, now: float) -> Attempt | None:
        if self.is_finished or now < self._not_before or now - self._seen_at > OLD_NEWS:
            return None
        samples, rate = self.progress(now)
        missing = self.target - samples
        soon = missing <= AHEAD * rate if rate > 0 else missing <= 0
        if not (self._called or self.frozen_samples or soon):
            return None
        suspects = frozenset(peer for peer, until in self._suspects.items() if until > now)
        peers = self._ready_peers()
        dialable = [peer for peer, view in peers.items() if view.dialable]
        if self.me.dialable:
            dialable.append(self.me.peer)
        if not dialable:
            return None  # without a peer that accepts connections nobody can meet
        if samples <= 0 and not self._called:
            return None
        leaders = sorted(dialable, key=lambda peer: (peer in suspects, self._rank(peer, self.round + 1)))
        if self.me.peer in leaders:
            leaders = leaders[: leaders.index(self.me.peer) + 1]
        return Attempt(
            round=self.round + 1,
            lineage=self.lineage,
            leaders=tuple(leaders[:LEADERS]),
            here=frozenset(peers) | {self.me.peer},
            suspects=suspects,
            # who was called may know less of the progress than the caller, who sees the target near
            not_before=now + min(AHEAD, max(0.0, missing / rate)) if rate > 0 else now,
        )

    def _poll_fetch(self, now: float, newest: int) -> list[Action]:
        if self.phase is not Phase.LOADING:
            self.phase = Phase.CATCHING_UP
        if now < self._fetch_after:
            return []
        wanted = max(newest, self.round) if self.ready else newest
        sources = sorted(
            (peer for peer, view in self._ready_peers().items() if view.dialable and view.round == wanted),
            # everybody asks somebody else first; whoever failed an attempt comes last
            key=lambda peer: (
                self._suspects.get(peer, 0.0) > now,
                hashlib.sha256(f"{self.me.peer}:{peer}".encode()).hexdigest(),
            ),
        )
        if self._updates_failed and self.ready and newest == self.round:
            sources = self._winners(sources)
            if self._repair_from is not None:
                sources = [peer for peer in sources if peer in self._repair_from[0]]
        if not sources:
            if self._trains and now - self._searching_since > LOST:
                return [Lost(f"no peer gave the swarm's state within {LOST:.0f} s")]
            if self.ready and newest <= self.round:
                self._updates_failed = False  # nobody is left to differ from
            return []
        if now - self._searching_since > LOST and self._trains and not self.ready:
            return [Lost(f"no peer gave the swarm's state within {LOST:.0f} s")]
        self._fetching = True
        if self.ready and not self._updates_failed and newest - self.round <= UPDATES_KEPT:
            return [FetchUpdates(self.round + 1, newest, tuple(sources))]
        return [FetchSnapshot(wanted, tuple(sources))]

    def _fork(self, now: float) -> bool:
        """Whether this peer must go over to another lineage: at the same round, more peers have that one."""
        if not self.ready or self.phase is Phase.AVERAGING or self._pending_apply:
            return False
        support: dict[str, int] = {self.lineage: 1}
        for view in self._ready_peers().values():
            if view.round == self.round:
                support[view.lineage] = support.get(view.lineage, 0) + 1
        best = max(support, key=lambda lineage: (support[lineage], lineage))
        if best == self.lineage:
            self._other_since = None
            return False
        if self._other_since is None or self._other_since[0] != best:
            self._other_since = (best, now)
        return now - self._other_since[1] >= FORK

    def _winners(self, sources: Sequence[str]) -> list[str]:
        support: dict[str, int] = {self.lineage: 1}
        for view in self._ready_peers().values():
            if view.round == self.round:
                support[view.lineage] = support.get(view.lineage, 0) + 1
        best = max(support, key=lambda lineage: (support[lineage], lineage))
        return [peer for peer in sources if self._peers[peer].lineage == best]

    def _not_drifted(self) -> list[str] | None:
        """Peers to load the state from because this replica is far from it, though all results that it applied are
        theirs; None: it is not.

        Only replicas that can be loaded are compared. The one that is nearest to all the others is the right one.
        """
        sketches = {
            peer: view.sketch
            for peer, view in self._ready_peers().items()
            if view.round == self.round and view.lineage == self.lineage and view.dialable
            if view.sketch and len(view.sketch) == len(self.sketch)
        }
        if all(distance(self.sketch, sketch) <= DRIFT for sketch in sketches.values()):
            return None
        if self.me.dialable:
            sketches[self.me.peer] = self.sketch
        believed = sorted(sketches, key=lambda peer: self._rank(peer, 0))[:JURY]
        right = min(
            believed,
            key=lambda peer: sum(distance(sketches[other], sketches[peer]) > DRIFT for other in believed),
        )
        if distance(self.sketch, sketches[right]) <= DRIFT:
            return None
        return [peer for peer, sketch in sketches.items() if distance(sketch, sketches[right]) <= DRIFT]

    def _poll_push(self, now: float) -> Push | None:
        """A peer that is behind can only fetch from one that can be dialled; where none can, it is sent the state."""
        if self.me.dialable or self._pushing or now < self._push_after:
            return None
        views = self._ready_peers()
        if any(view.dialable and view.round >= self.round for view in views.values()):
            return None
        at_newest = [peer for peer, view in views.items() if view.round >= self.round and not view.dialable]
        if any(self._rank(peer, self.round) < self._rank(self.me.peer, self.round) for peer in at_newest):
            return None
        behind = sorted(
            peer
            for peer, since in self._behind_since.items()
            if self._peers[peer].dialable and now - since >= PUSH_AFTER
        )
        return Push(behind[0]) if behind else None

    def _receivers(self, now: float) -> list[str]:
        return sorted(
            (
                peer
                for peer, view in self._ready_peers().items()
                if view.dialable
                and view.round == self.round
                and view.lineage == self.lineage
                and self._suspects.get(peer, 0.0) <= now
            ),
            key=lambda peer: self._rank(peer, 0),
        )

    def _poll_leave(self, now: float) -> list[Action]:
        assert self._leaving is not None
        if self._handing_in and now - self._leaving < LEAVE:
            return []
        receivers = self._receivers(now) if self.ready else []
        if self.samples > 0 and receivers and not self.is_finished and now - self._leaving < LEAVE:
            self._handing_in = True
            return [HandIn(receivers[0])]
        self.phase = Phase.LEFT
        return [Left()]
