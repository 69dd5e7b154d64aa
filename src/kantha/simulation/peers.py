"""Peers of a virtual swarm. Each follows the rules of `swarm/rounds.py` and `swarm/groups.py` as the real engine does;
only what carries their decisions out is virtual: reports, calls, transfers, an all-reduce, snapshots.

A sample is a token here, so that it can be seen where it is counted; a state is its lineage.
"""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from kantha.simulation.network import Future, Host, Loop, Network
from kantha.swarm import rounds
from kantha.swarm.groups import Agreement, Dissolved, Group, Member, Refusal, RollCall, Status
from kantha.swarm.rounds import End, Rounds, RoundSettings

PRESENT = 20.0  # seconds after which a peer whose report does not change is no longer counted as here
RENEWAL = 3.0  # seconds between two reports of a peer, and between two looks at the others'
TICK = 1.0  # seconds between two times that a peer adds samples, and looks what to do if nothing happened
CALL = 5.0  # seconds that a call may take
QUESTION = 2.0  # seconds that a question for another member's status may take
SENDER_SILENT = 10.0  # seconds without bytes from a sender after which a reducer gives its part up
REDUCER_SILENT = 15.0  # seconds without bytes from a reducer after which a member stops waiting
APPLY = 0.3  # seconds to apply a result
SNAPSHOT_WEIGHTS, SNAPSHOT_REST = 2.0, 4.0  # bytes a value


@dataclass(frozen=True)
class Batch:
    """Samples that one peer computed together."""

    peer: str
    number: int
    samples: int


@dataclass(frozen=True)
class Result:
    """What a group averaged, as everyone keeps it who counts it."""

    group: str
    round: int
    base: str  # lineage of the round before
    lineage: str
    batches: tuple[Batch, ...]


@dataclass(frozen=True)
class Rules:
    """The classes that peers follow; a test puts broken ones here."""

    rounds: type[Rounds] = Rounds
    roll_call: type[RollCall] = RollCall
    agreement: type[Agreement] = Agreement


@dataclass(frozen=True)
class Report:
    """What a peer says of itself: fields of `rounds.PeerView`."""

    role: str
    dialable: bool
    ready: bool
    round: int
    lineage: str
    samples: int
    rate: float
    sketch: tuple[float, ...]


class Observer:
    """What is told to whoever watches a virtual swarm."""

    def note(self, peer: str, text: Callable[[], str]) -> None: ...

    def finished(self, peer: "SimPeer", result: Result | None, *, averaged: bool) -> None: ...

    def ticked(self, peer: "SimPeer") -> None: ...

    def group(self, leader: "SimPeer") -> None: ...

    def held(self, peer: "SimPeer") -> None: ...

    def failed(self, peer: "SimPeer", round_number: int, reason: str) -> None: ...


class World:
    """A swarm: its peers by name, its network, and what stands in its DHT."""

    def __init__(
        self, settings: RoundSettings, values: float, random: Random, rules: Rules, observer: Observer
    ) -> None:
        """:param values: of the replica; a gradient takes a byte a value on the wire"""
        self.settings = settings
        self.values = values
        self.random = random
        self.rules = rules
        self.observer = observer
        self.loop = Loop()
        self.network = Network(self.loop, random)
        self.peers: dict[str, SimPeer] = {}
        self.board: dict[str, tuple[float, Host, Report | None]] = {}
        self._groups = 0
        self._batches: dict[str, dict[str, tuple[Batch, ...]]] = {}

    def group_id(self) -> str:
        self._groups += 1
        return f"g{self._groups}"

    def write(self, host: Host, report: Report | None) -> None:
        """Put a report into the DHT, or a goodbye; it takes a moment until others can read it."""
        now = self.loop.now

        def stand() -> None:
            if host.name not in self.board or self.board[host.name][0] < now:
                self.board[host.name] = (now, host, report)

        self.loop.at(now + self.random.uniform(0.1, 0.6), stand)

    def contributed(self, group: str, peer: "SimPeer") -> None:
        """What a member brings into a group: its samples that are frozen when the group begins for it."""
        self._batches.setdefault(group, {})[peer.name] = tuple(peer.frozen)

    def result(self, group: Group) -> Result:
        """What a member holds that has every part of a group."""
        batches = self._batches[group.id]
        return Result(
            group.id,
            group.round,
            group.lineage,
            rounds.next_lineage(group.lineage, group.id),
            tuple(batch for member in group.members for batch in batches[member.peer]),
        )


class AllReduce:
    """One member's side of one group's averaging."""

    def __init__(self, peer: "SimPeer", group: Group) -> None:
        self.group = group
        self.agreement = peer.world.rules.agreement(
            group, peer.name, peer.clock() + peer.world.settings.averaging_timeout
        )
        self.ended: Future[None] = Future()
        self.culprits: list[str] = []
        self.reduced = False
        self._peer = peer
        self._network = peer.world.network
        self._others = {m.peer: peer.world.peers[m.peer] for m in group.members if m.peer != peer.name}
        self._reducers = group.reducers
        self._reduces = peer.name in self._reducers
        self._size = peer.world.values / len(self._reducers)
        self._shares: set[str] = set()  # members whose share of this one's part is here
        self._parts: set[str] = set()  # reducers whose part is here
        self._flowed: dict[str, float] = {}
        self._stuck = False
        self._helping = False

    @property
    def given_up(self) -> bool:
        return self.agreement.status in (Status.ABANDONED, Status.BROKEN)

    def start(self) -> None:
        sends = self._size if self._peer.frozen else 0.0
        for reducer in self._reducers:
            if reducer == self._peer.name:
                self.share(reducer)
            else:
                self._send(reducer, sends, lambda other: other.on_share(self.group.id, self._peer.name))
        self._network.start(self._peer.host, self._watch)

    def share(self, sender: str) -> None:
        """A member's share of the part that this one reduces has come."""
        if not self._reduces or self._stuck or self.given_up:
            return
        self._shares.add(sender)
        if len(self._shares) < len(self.group.members) or self.reduced:
            return
        if not self._peer.world.result(self.group).batches:
            self._stick(self._peer.name, unfinished=True)  # nobody in the group has samples
            return
        self.reduced = True
        for member in self._others:
            self._send(member, self._size, lambda other: other.on_part(self.group.id, self._peer.name))
        self.part(self._peer.name)

    def part(self, reducer: str) -> None:
        """A reducer's averaged part has come."""
        self._parts.add(reducer)
        if len(self._parts) == len(self._reducers):
            self.agreement.hold(self._peer.clock())
            self._peer.world.observer.held(self._peer)
            self._peer.note(lambda: f"has all of {self.group.id}: {self.agreement.status.value}")

    def _send(self, to: str, size: float, arrived: "Callable[[SimPeer], None]") -> None:
        other = self._others[to]
        sent = self._network.transfer(self._peer.host, other.host, size)

        def done() -> None:
            if not self.given_up and sent.value:
                arrived(other)

        sent.then(done)

    async def _watch(self) -> None:
        peer, agreement = self._peer, self.agreement
        while not agreement.decided:
            self._look_for_silence()
            agreement.poll(peer.clock())
            for other in agreement.questions(peer.clock()):
                self._network.start(peer.host, partial(self._ask, other))
            if agreement.helpers and not self._helping:
                self._helping = True
                self._network.start(peer.host, self._fetch_missing)
            if not agreement.decided:
                await self._network.sleep(peer.host, 0.5)
        peer.note(lambda: f"{self.group.id} is {agreement.status.value} for it, culprits {self.culprits}")
        self.ended.set(None)

    def _look_for_silence(self) -> None:
        if self._stuck or self.agreement.status is not Status.RUNNING:
            return
        now = self._peer.clock()
        for name, other in self._others.items():
            run = other.runs.get(self.group.id)
            if run is not None and not run.given_up and self._network.flows(other.host, self._peer.host):
                self._flowed[name] = now
            silent = now - self._flowed.setdefault(name, now)
            broken = not other.host.alive or other.has_given_up(self.group.id)
            if self._reduces and not self.reduced and name not in self._shares and (broken or silent > SENDER_SILENT):
                self._stick(name, unfinished=True)
                return
            if name in self._reducers and name not in self._parts and (broken or silent > REDUCER_SILENT):
                self._stick(name, unfinished=False)
                return

    def _stick(self, culprit: str, unfinished: bool) -> None:
        self._peer.note(lambda: f"{self.group.id} stuck on {culprit}{', its part unfinished' if unfinished else ''}")
        self._stuck = True
        if culprit != self._peer.name:
            self.culprits.append(culprit)
        self.agreement.stick(unfinished=unfinished)

    async def _ask(self, name: str) -> None:
        other, status = self._others[name], self.agreement.status
        answer = await self._network.call(
            self._peer.host, other.host, lambda: other.on_question(self.group.id, status), QUESTION
        )
        self.agreement.answered(name, answer)

    async def _fetch_missing(self) -> None:
        for name in list(self.agreement.helpers):
            other = self._others[name]
            missing = (len(self._reducers) - len(self._parts)) * self._size
            if not await self._network.download(self._peer.host, other.host, missing):
                continue
            status = await self._network.call(
                self._peer.host, other.host, partial(other.on_question, self.group.id, Status.RUNNING)
            )
            if status is Status.COMMITTED:
                self.agreement.adopt()
            elif status is Status.HELD:
                self.agreement.hold(self._peer.clock())
            self._peer.note(lambda: f"fetched {self.group.id}: {self.agreement.status.value}")
            break
        self._helping = False


class Invitation:
    """A place in another peer's roll call."""

    def __init__(self) -> None:
        self.outcome: Future[Group | Dissolved | Refusal | str] = Future()  # str: the leader that this one follows


class SimPeer:
    """One peer: its rules, and what carries them out."""

    def __init__(
        self,
        world: World,
        host: Host,
        *,
        trains: bool,
        dialable: bool,
        speed: float = 0.0,
        offset: float = 0.0,
        incarnation: int = 0,
        round_number: int | None = None,
        lineage: str = "",
    ) -> None:
        """
        :param speed: samples a second
        :param offset: of its clock
        :param round_number: of the state it begins with; None: a newcomer
        """
        self.world, self.host, self.name = world, host, host.name
        self.trains, self.dialable, self.speed, self.offset = trains, dialable, speed, offset
        self.key = f"{host.name}#{incarnation}"  # of this program; another one may follow under its name
        self.me = Member(host.name, dialable)
        self.rounds = world.rules.rounds(
            self.me, world.settings, self.clock(), trains=trains, round_number=round_number, lineage=lineage
        )
        self.waiting: list[Batch] = []
        self.frozen: list[Batch] = []
        self.drift = 0.0  # relative distance of the replica from what it should be
        self.runs: dict[str, AllReduce] = {}
        self.results: dict[int, Result] = {}
        self.busy: dict[str, float] = {}  # what is under way, and since when on the own clock
        self.left = False
        self.thawed_at = self.clock()
        self._has_weights = round_number is not None
        self.leaving = False
        self._numbers = 0
        self._partial = 0.0  # of a sample
        self._computed_at = self.clock()
        self._pending: set[str] = set()  # groups that the frozen samples were in
        self._refused: set[str] = set()  # groups that this peer will have no part in
        self._early: dict[str, set[str]] = {}
        self._known: dict[str, tuple[float, Report, float]] = {}
        self._roll: RollCall | None = None
        self._invited: dict[str, tuple[SimPeer, Invitation]] = {}
        self._invitation: Invitation | None = None
        self._follows: str | None = None
        self._given: set[str] = set()
        self._set_sketch()

    def clock(self) -> float:
        return self.world.loop.now + self.offset

    def note(self, text: Callable[[], str]) -> None:
        self.world.observer.note(self.name, text)

    def start(self) -> None:
        for action, period in ((self._tick, TICK), (self._read, RENEWAL), (self._publish, RENEWAL)):
            self._repeat(action, period, self.world.random.uniform(0, period))

    def leave(self) -> None:
        if not self.leaving:
            self.note(lambda: "leaves")
            self.leaving = True
            self.rounds.leave(self.clock())
            self.poll()

    # ---- what others ask; each runs at this peer

    def on_join(
        self, other: "SimPeer", round_number: int, lineage: str, invitation: Invitation
    ) -> Refusal | str | None:
        """None: it is in; str: the leader that this peer follows."""
        if not self.rounds.ready or round_number > self.rounds.round + 1:
            return Refusal.NOT_YET
        if round_number <= self.rounds.round:
            return Refusal.BEHIND
        if self._follows is not None:
            return self._follows
        if self._roll is None:
            self._roll = self.world.rules.roll_call(
                self.me, round_number, self.rounds.lineage, self.world.settings.patience, self.clock()
            )
            self.rounds.called()
        refusal = self._roll.join(other.me, round_number, lineage)
        if refusal is None:
            self._invited[other.name] = (other, invitation)
        self.world.loop.at(self.world.loop.now, self.poll, self.host)
        return refusal

    def on_withdrawal(self, name: str, invitation: Invitation) -> None:
        if self._roll is not None and self._invited.get(name, (None, None))[1] is invitation:
            self._roll.drop(name)

    def on_invitation(self, invitation: Invitation, outcome: Group | Dissolved | Refusal | str) -> None:
        if invitation is self._invitation:
            invitation.outcome.set(outcome)
        elif isinstance(outcome, Group):
            self._refused.add(outcome.id)

    def on_share(self, group: str, sender: str) -> None:
        if group in self.runs:
            self.runs[group].share(sender)
        else:
            self._early.setdefault(group, set()).add(sender)

    def on_part(self, group: str, reducer: str) -> None:
        if group in self.runs:
            self.runs[group].part(reducer)

    def on_question(self, group: str, status: Status) -> Status:
        if group not in self.runs:
            self._refused.add(group)
            return Status.ABANDONED
        return self.runs[group].agreement.asked(status, self.clock())

    def has_given_up(self, group: str) -> bool:
        return group in self._refused or (group in self.runs and self.runs[group].given_up)

    def on_hand_in(self, key: str, lineage: str, batches: Sequence[Batch]) -> bool:
        if key in self._given:
            return True
        if not self.rounds.ready or self.leaving or self.rounds.lineage != lineage:
            return False
        self._given.add(key)
        self.waiting += batches
        self.rounds.computed(sum(batch.samples for batch in batches), self.speed)
        return True

    def on_push(self, round_number: int, lineage: str, drift: float) -> bool:
        taken = self.rounds.take_over(self.clock(), round_number, lineage)
        if taken:
            self.note(lambda: f"took over round {round_number} {lineage[:4]}")
            self._has_weights = True
            self.drift = drift
            self.poll()
            self._after_round(None)
        return taken

    # ---- time

    def _repeat(self, action: Callable[[], None], period: float, first: float) -> None:
        def again() -> None:
            action()
            self.world.loop.at(self.world.loop.now + period, again, self.host)

        self.world.loop.at(self.world.loop.now + first, again, self.host)

    def _tick(self) -> None:
        now = self.clock()
        elapsed, self._computed_at = min(now - self._computed_at, 2 * TICK), now  # none while frozen
        if self.trains and self._has_weights and not self.leaving:
            self._partial += elapsed * self.speed
            samples = int(self._partial)
            self._partial -= samples
            if samples:
                self._numbers += 1
                self.waiting.append(Batch(self.key, self._numbers, samples))
            self.rounds.computed(samples, self.speed)
        if self._roll is not None and "attempt" not in self.busy and self._roll.poll(now, "-") is not None:
            self._end_roll(Dissolved("over"))
        self.poll()
        self.world.observer.ticked(self)

    def _publish(self) -> None:
        host, rules = self.host, self.rounds
        if host.cut or self.left:
            return
        report = Report(
            role="trainer" if self.trains else "averager",
            dialable=self.dialable,
            ready=rules.ready,
            round=rules.round,
            lineage=rules.lineage,
            samples=rules.samples + rules.frozen_samples,
            rate=self.speed if self._has_weights and not self.leaving else 0.0,
            sketch=rules.sketch,
        )
        self.world.write(host, report)

    def _read(self) -> None:
        now, true_now = self.clock(), self.world.loop.now
        if self.host.cut and not self.dialable:
            return  # it knows that it reads nothing; one that others connect to reads what it stores itself
        if not self.host.cut:
            for name, (written, host, report) in self.world.board.items():
                if name == self.name or host.side != self.host.side:
                    continue
                if report is None:
                    self._known.pop(name, None)
                elif (name not in self._known or self._known[name][0] != written) and true_now - written < PRESENT:
                    self._known[name] = (written, report, now)
        views = {}
        for name, (_, said, since) in list(self._known.items()):
            if now - since >= PRESENT:
                if now - since > 10 * PRESENT:
                    del self._known[name]
                continue
            views[name] = rounds.PeerView(**vars(said), age=now - since)
        self.rounds.seen(now, views)
        self.poll()

    # ---- what to do

    def poll(self) -> None:
        self._act()
        assert sum(batch.samples for batch in self.waiting) == self.rounds.samples
        assert sum(batch.samples for batch in self.frozen) == self.rounds.frozen_samples

    def _act(self) -> None:
        for action in self.rounds.poll(self.clock()):
            self._do(action)

    def _do(self, action: rounds.Action) -> None:
        match action:
            case rounds.Attempt():
                self._run("attempt", self._attempt, action)
            case rounds.Apply():
                self._run("apply", self._apply, action.round)
            case rounds.Thaw():
                self.waiting, self.frozen = self.frozen + self.waiting, []
                self._pending.clear()
            case rounds.Drop():
                self.waiting, self.frozen = [], []
                self._pending.clear()
            case rounds.FetchUpdates():
                self._run("fetch", self._fetch_updates, action)
            case rounds.FetchSnapshot():
                self._run("fetch", self._fetch_snapshot, action)
            case rounds.Push():
                self._run("push", self._push, action.peer)
            case rounds.HandIn():
                self._run("hand in", self._hand_in, action.peer)
            case rounds.Failed():
                self.note(lambda: f"counts round {action.round} as failed: {action.reason}")
                self.world.observer.failed(self, action.round, action.reason)
            case rounds.Lost():
                self.note(lambda: f"is lost: {action.reason}")
                self.end()
            case rounds.Left():
                self.note(lambda: "has left")
                self.end()

    def end(self) -> None:
        self.left = True
        self.world.write(self.host, None)
        self.host.alive = False

    def _run(self, name: str, task: Callable[..., Coroutine[Any, Any, None]], argument: Any) -> None:
        self.busy[name] = self.clock()

        async def whole() -> None:
            await task(argument)
            self.poll()

        self.world.network.start(self.host, whole)

    # ---- an attempt

    async def _attempt(self, action: rounds.Attempt) -> None:
        end, culprits, reason = await self._attempts(action)
        self.note(lambda: f"attempt at round {action.round} ended: {end.value} {culprits} {reason}")
        self._follows = self._invitation = None
        self._end_roll(Dissolved("over"))
        del self.busy["attempt"]
        self.rounds.attempt_ended(self.clock(), end, culprits, reason)

    async def _attempts(self, action: rounds.Attempt) -> tuple[End, list[str], str]:
        self.note(lambda: f"attempts round {action.round} with {action.leaders} of {sorted(action.here)}")
        leaders, tried, culprits = list(action.leaders), set[str](), list[str]()
        while leaders:
            leader = leaders.pop(0)
            if leader in tried:
                continue
            tried.add(leader)
            outcome = await (self._lead(action) if leader == self.name else self._follow(action, leader))
            self._follows = self._invitation = None
            if isinstance(outcome, Group):
                if leader != self.name:
                    self._follows = leader
                return await self._average(outcome)
            if outcome is Refusal.BEHIND:
                return End.BEHIND, culprits, ""
            if outcome is Refusal.OVER:
                return End.NO_GROUP, culprits, "a group has begun without this peer"
            if isinstance(outcome, str):
                leaders.insert(0, outcome)
            elif outcome is None:
                culprits.append(leader)
        return End.NO_GROUP, culprits, "no group"

    async def _lead(self, action: rounds.Attempt) -> Group | Dissolved:
        if self._roll is None:
            self._roll = self.world.rules.roll_call(
                self.me, action.round, action.lineage, self.world.settings.patience, self.clock()
            )
        roll = self._roll
        roll.lead(action.here, action.suspects, action.not_before)
        while True:
            for name, (other, _) in self._invited.items():
                if not other.host.alive:
                    roll.drop(name)
            outcome = roll.poll(self.clock(), self.world.group_id())
            if isinstance(outcome, Group):
                self.note(lambda: f"begins {outcome.id} for round {outcome.round}: {[m.peer for m in outcome.members]}")
                self.world.observer.group(self)
                self._tell_invited(outcome)
                return outcome
            if isinstance(outcome, Dissolved):
                self.note(lambda: f"dissolves: {outcome.reason}")
                self._end_roll(Dissolved("over"))
                return outcome
            await self.world.network.sleep(self.host, 0.2)

    async def _follow(self, action: rounds.Attempt, leader: str) -> Group | Dissolved | Refusal | str | None:
        """The group; why there is none; another leader; None: this one does not answer."""
        network, patience = self.world.network, self.world.settings.patience
        until = self.clock() + patience
        while True:
            other = self.world.peers.get(leader)
            if other is None or not other.dialable:
                return None
            invitation = self._invitation = Invitation()
            answer = await network.call(
                self.host,
                other.host,
                lambda other=other, invitation=invitation: (  # type: ignore[misc]
                    other.on_join(self, action.round, action.lineage, invitation),
                ),
                CALL,
            )
            if answer is None:
                self._withdraw(other, invitation)
                return None
            if answer[0] is None:
                break
            if answer[0] is not Refusal.NOT_YET or self.clock() >= until:
                return answer[0]
            await network.sleep(self.host, 1.0)
        if self._roll is not None:
            self._end_roll(leader)
        self._follows = leader
        until = self.clock() + 3 * patience + 10.0
        while not invitation.outcome.done:
            await network.within(self.host, invitation.outcome, 1.0)
            if not invitation.outcome.done and (not other.host.alive or self.clock() >= until):
                self._withdraw(other, invitation)
                return None
        return await invitation.outcome

    def _withdraw(self, leader: "SimPeer", invitation: Invitation) -> None:
        self.world.network.tell(self.host, leader.host, lambda: leader.on_withdrawal(self.name, invitation))

    def _tell_invited(self, outcome: Group | Dissolved | Refusal | str) -> None:
        members = {member.peer for member in outcome.members} if isinstance(outcome, Group) else set()
        for other, invitation in self._invited.values():
            said = Refusal.OVER if members and other.name not in members else outcome  # it was left out
            self.world.network.tell(
                self.host,
                other.host,
                lambda o=other, i=invitation, s=said: o.on_invitation(i, s),  # type: ignore[misc]
            )
        self._invited.clear()

    def _end_roll(self, outcome: Dissolved | Refusal | str) -> None:
        self._roll = None
        self._tell_invited(outcome)

    async def _average(self, group: Group) -> tuple[End, list[str], str]:
        if group.id in self._refused:
            return End.BROKEN, [], "too late"
        if self.rounds.frozen():
            self.waiting, self.frozen = [], self.waiting
        run = self.runs[group.id] = AllReduce(self, group)
        for old in list(self.runs)[:-8]:
            del self.runs[old]
        self.world.contributed(group.id, self)
        if self.frozen:
            self._pending.add(group.id)
        run.start()
        for sender in self._early.pop(group.id, set()):
            run.share(sender)
        await run.ended
        if run.agreement.status is Status.COMMITTED:
            self.results[group.round] = self.world.result(group)
            return End.COMMITTED, [], ""
        return End.BROKEN, run.culprits, f"stuck on {run.culprits}"

    # ---- state

    async def _apply(self, round_number: int) -> None:
        await self.world.network.sleep(self.host, APPLY)
        del self.busy["apply"]
        self._finish(self.results[round_number], contributed=True, averaged=True)

    def _finish(self, result: Result, *, contributed: bool, averaged: bool) -> None:
        self.results[result.round] = result
        self.rounds.applied(self.clock(), result.round, result.lineage, contributed=contributed)
        self._act()
        self.frozen = []
        self._pending.clear()
        self._after_round(result, averaged=averaged)

    def _after_round(self, result: Result | None, *, averaged: bool = False) -> None:
        if result is None:  # another lineage's, maybe
            self.results.clear()
        for old in [number for number in self.results if number <= self.rounds.round - rounds.UPDATES_KEPT]:
            del self.results[old]
        self._set_sketch()
        if self._roll is not None and self._roll.round <= self.rounds.round:
            self._end_roll(Refusal.BEHIND)
        self.world.observer.finished(self, result, averaged=averaged)
        self._publish()

    def _set_sketch(self) -> None:
        if self.rounds.ready:
            self.rounds.sketch = (1.0 + self.drift,) * 4

    def drifts(self, distance: float) -> None:
        """The replica goes astray without notice."""
        self.drift = distance
        self._set_sketch()

    async def _fetch_updates(self, action: rounds.FetchUpdates) -> None:
        network = self.world.network
        for source in action.sources:
            other = self.world.peers.get(source)
            while other is not None and self.rounds.round < action.last:
                wanted = self.rounds.round + 1
                answer = await network.call(self.host, other.host, lambda: (other.results.get(wanted),), CALL)
                result = answer[0] if answer is not None else None
                if result is None or result.base != self.rounds.lineage:
                    break
                if not await network.download(self.host, other.host, self.world.values):
                    break
                await network.sleep(self.host, APPLY)
                self._finish(result, contributed=result.group in self._pending, averaged=False)
            if self.rounds.round >= action.last:
                break
        done = self.rounds.round >= action.last
        self.note(lambda: f"fetched updates to {self.rounds.round} of {action.last}")
        del self.busy["fetch"]
        self.rounds.fetched(self.clock(), self.rounds.round if done else None, self.rounds.lineage, snapshot=False)

    async def _fetch_snapshot(self, action: rounds.FetchSnapshot) -> None:
        network, values = self.world.network, self.world.values
        for source in action.sources:
            other = self.world.peers.get(source)
            if other is None:
                continue
            state = await network.call(self.host, other.host, other.state, CALL)
            if state is None or not await network.download(self.host, other.host, SNAPSHOT_WEIGHTS * values):
                continue
            round_number, lineage, drift = state
            if not self.rounds.ready:
                self.rounds.weights_here(round_number, lineage)
                self._has_weights = True
            if await network.download(self.host, other.host, SNAPSHOT_REST * values):
                self.note(lambda: f"has a snapshot of round {round_number} {lineage[:4]} from {source}")
                self.drift = drift
                del self.busy["fetch"]
                self.rounds.fetched(self.clock(), round_number, lineage, snapshot=True)
                self.poll()
                self._after_round(None)
                return
        self.note(lambda: f"got no snapshot from {action.sources}")
        del self.busy["fetch"]
        self.rounds.fetched(self.clock(), None, snapshot=True)

    def state(self) -> tuple[int, str, float] | None:
        return (self.rounds.round, self.rounds.lineage, self.drift) if self.rounds.ready else None

    async def _push(self, name: str) -> None:
        other, state = self.world.peers.get(name), self.state()
        if other is not None and state is not None:
            size = (SNAPSHOT_WEIGHTS + SNAPSHOT_REST) * self.world.values
            if await self._upload(other, size):
                await self.world.network.call(self.host, other.host, lambda: other.on_push(*state), CALL)
        del self.busy["push"]
        self.rounds.pushed(self.clock())

    async def _hand_in(self, name: str) -> None:
        other, given, lineage = self.world.peers.get(name), tuple(self.waiting), self.rounds.lineage
        samples = 0
        if other is not None and await self._upload(other, self.world.values):
            samples = sum(batch.samples for batch in given)
            for _ in range(3):  # the receiver knows the key, and adds the samples once
                answer = await self.world.network.call(
                    self.host, other.host, lambda: other.on_hand_in(self.key, lineage, given)
                )
                if answer is not None:
                    samples = samples if answer else 0
                    break
            self.waiting = self.waiting[len(given) :] if samples else self.waiting
        self.note(lambda: f"handed {samples} samples in to {name}")
        del self.busy["hand in"]
        self.rounds.handed_in(self.clock(), samples)

    async def _upload(self, other: "SimPeer", size: float) -> bool:
        """Send to a peer in pieces; False when the connection broke or nothing went for some seconds."""
        network = self.world.network
        for _ in range(8):
            piece = network.transfer(self.host, other.host, size / 8)
            silent_since = self.clock()
            while not piece.done:
                await network.within(self.host, piece, 1.0)
                if network.flows(self.host, other.host) and not other.host.frozen:
                    silent_since = self.clock()
                if not other.host.alive or self.clock() - silent_since > SENDER_SILENT:
                    return False
            if not await piece:
                return False
        return True
