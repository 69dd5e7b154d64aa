"""The averager process: what the rules of rounds.py and groups.py decide, done on hivemind's libp2p.

One forked process a peer. The program tells it what to do (`attempt`, `fetch_…`, `push`, `hand_in`), and reads from
`events` what became of it; tensors lie in shared memory. Other peers reach it by five calls:

    rpc_join_group      take part in the group that this peer leads
    rpc_aggregate_part  all-reduce: parts come, averages go
    rpc_ask             a member asks how far this one is with a group's result
    rpc_fetch           results of past rounds, and pieces of a snapshot
    rpc_push            a leaver's work, or the state from one that cannot be dialled

Nothing waits without a deadline, and everything that comes from a peer is checked for type, size and finiteness.
"""

import asyncio
import hashlib
import json
import logging
import multiprocessing
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, AsyncIterator, Literal  # noqa: UP035  hivemind finds streaming calls by the typing one only

import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.p2p import P2PContext, PeerID
from hivemind.proto import averaging_pb2, runtime_pb2
from pydantic import BaseModel, ConfigDict, Field

from kantha.errors import DigestError, OrderError, ProcessEndedError, SwarmError
from kantha.swarm.allreduce import LINGER, MAX_WEIGHT, AllReduce, AllReduceError
from kantha.swarm.groups import Agreement, Dissolved, Group, Member, Refusal, RollCall, Status
from kantha.swarm.membership import Certificate
from kantha.swarm.node import Node
from kantha.swarm.orders import MOST_BYTES, parse_order, read_order
from kantha.swarm.parts import Layout, decode, digest_of, encode
from kantha.swarm.rounds import UPDATES_KEPT, Attempt, End
from kantha.swarm.snapshots import FILES, PIECE, SnapshotManifest, read_manifest, read_piece

_ANSWER = 5.0  # seconds for a peer's first answer
_CALL = 30.0  # seconds for one piece of anything; a mebibyte at 0.3 Mbit/s
_TICK = 0.1  # seconds between two looks at a roll call or an agreement
_KEEP_ALIVE = 1.0  # seconds between two words to a peer that waits for its group to begin
_GROUP_COMES = 10.0  # seconds that a member's first parts wait for the word that its group has begun
_GROUPS_KEPT = 8  # past groups that others may still ask about
_BATCH = 2**20  # bytes of parts in one answer
_FETCHERS = 2  # pieces under way from one peer
_FAILURES = 3  # failed pieces after which a peer is not asked for more
_MOST_MEMBERS = 1_000
_log = logging.getLogger(__name__)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Question(_Model):
    """rpc_ask: a member's status, and the digest of what it holds."""

    group: str = Field(max_length=64)
    status: Status
    digest: str = Field("", max_length=64)


class _Wanted(_Model):
    """rpc_fetch."""

    kind: Literal["update", "parts", "manifest", "piece"]
    round: int = 0  # update: of it; manifest: wished for; piece: of the snapshot
    group: str = Field("", max_length=64)  # parts
    indices: list[int] = Field([], max_length=100_000)  # parts
    name: Literal["weights", "moments"] = "weights"  # piece
    index: int = 0


class UpdateHeader(_Model):
    """An averaged result: what it is of, and who put how many samples into it."""

    round: int = Field(ge=1)
    group: str = Field(max_length=64)
    base: str = Field(max_length=64, description="Lineage of the round before.")
    digest: str = Field(max_length=64)
    samples: dict[str, Annotated[float, Field(ge=0, le=MAX_WEIGHT)]] = Field(max_length=_MOST_MEMBERS)
    order: str = Field("", max_length=MOST_BYTES, description="The organizer's newest, see `orders.py`.")


class _Gift(_Model):
    """rpc_push, a leaver's work: parts, one call after the other; counted at the last."""

    kind: Literal["gradient"] = "gradient"
    round: int
    lineage: str = Field(max_length=64)
    samples: int = Field(ge=1, le=10**9)
    oldest: int
    first: int
    count: int


class _State(_Model):
    """rpc_push, the whole state: first its manifest, then its pieces."""

    kind: Literal["state"] = "state"
    manifest: SnapshotManifest | None = None
    name: Literal["weights", "moments"] = "weights"
    index: int = 0


@dataclass
class _Update:
    header: UpdateHeader
    parts: list[bytes]


@dataclass
class _Running:
    """A group that this peer is, or was, a member of."""

    allreduce: AllReduce
    agreement: Agreement
    digest: str = ""


@dataclass
class _Incoming:
    """Something that a peer pushes, so far."""

    parts: list[bytes] = field(default_factory=list)
    manifest: SnapshotManifest | None = None
    folder: Path | None = None
    pieces: set[tuple[str, int]] = field(default_factory=set)


class Tally:
    """Samples behind the sums in shared memory, and the oldest weights that any of them was computed with."""

    def __init__(self) -> None:
        self._values = multiprocessing.Array("d", 2, lock=False)
        self.clear()

    @property
    def samples(self) -> int:
        return int(self._values[0])

    @property
    def oldest(self) -> float:
        return float(self._values[1])

    def add(self, samples: int, oldest: float) -> None:
        self._values[0] += samples
        self._values[1] = min(self._values[1], oldest)

    def clear(self) -> None:
        self._values[:] = [0.0, float("inf")]


class Averager(DecentralizedAverager):
    """See the module. Made in the main thread, before CUDA is initialised: it forks."""

    def __init__(
        self,
        node: Node,
        layout: Layout,
        averaging_timeout: float,
        patience: float,
        folder: Path,
    ) -> None:
        """
        :param patience: seconds that a group waits for a peer that does not come
        :param folder: for snapshots
        """
        self.layout = layout
        self.waiting = torch.zeros(layout.values)  # sums over samples that wait for a group
        self.frozen = torch.zeros(layout.values)  # the same, in an attempt under way
        self.update = torch.zeros(layout.values)  # an averaged result, decoded, for the program to apply
        self.waiting_tally, self.frozen_tally = Tally(), Tally()
        self.events, self._events_in = multiprocessing.Pipe(duplex=False)
        self._telling = threading.Lock()  # the pipe takes one message at a time
        self._tasks: set[asyncio.Task[Any] | None] = set()
        self._folder = folder
        self._timeout, self._patience = averaging_timeout, patience
        self._me = Member(node.peer_id, not node.outbound_only)
        self._guard = node.guard
        self._order = ""  # the organizer's newest that is known here
        self._replica: tuple[int, str, bool] = (0, "", False)  # round, lineage, whether whole
        self._roll: RollCall | None = None
        self._roll_ended: asyncio.Future[Group | Dissolved] | None = None
        self._following: str | None = None
        self._running: dict[str, _Running] = {}
        self._updates: dict[int, _Update] = {}
        self._errors: dict[int, torch.Tensor] = {}  # of what this peer averaged, by part
        self._incoming: dict[str, _Incoming] = {}
        self._snapshots: deque[tuple[Path, SnapshotManifest]] = deque(maxlen=2)
        self._snapshot_made: asyncio.Future[None] | None = None
        super().__init__(
            (self.waiting, self.frozen, self.update),
            node.dht,
            start=False,
            prefix=f"{node.prefix}_rounds",
            client_mode=node.outbound_only,
            allow_state_sharing=False,
            min_matchmaking_time=patience,
            request_timeout=min(1.0, patience / 2),
            declare_state_period=24 * 3600,
        )
        self.run_in_background(await_ready=True, timeout=60.0)

    # ---- called by the program

    def tell(self, method: str, *args: Any) -> None:
        """Have the process run one of its commands (`do_…`). Raises `ProcessEndedError` when it is gone."""
        try:
            with self._telling:
                self._outer_pipe.send(("_do", [method, *args], {}))
        except OSError as error:
            raise ProcessEndedError(f"the averager process is gone ({error}); start again") from None

    def add(self, gradients: Sequence[torch.Tensor], samples: int, weights_round: int) -> None:
        """Add the mean gradients over `samples` to those that wait."""
        with self.lock_averaged_tensors:
            start = 0
            for gradient in gradients:
                flat = gradient.detach().reshape(-1).to("cpu", torch.float32)
                self.waiting[start : start + flat.numel()].add_(flat, alpha=samples)
                start += flat.numel()
            self.waiting_tally.add(samples, weights_round)

    def thaw(self) -> None:
        """Put what was frozen back to what waits."""
        with self.lock_averaged_tensors:
            self.waiting.add_(self.frozen)
            self.waiting_tally.add(self.frozen_tally.samples, self.frozen_tally.oldest)
            self._clear(self.frozen, self.frozen_tally)

    def drop_waiting(self) -> int:
        """Forget what waits; returns how many samples that were."""
        with self.lock_averaged_tensors:
            samples = self.waiting_tally.samples
            self._clear(self.waiting, self.waiting_tally)
        return samples

    def drop_frozen(self) -> None:
        with self.lock_averaged_tensors:
            self._clear(self.frozen, self.frozen_tally)

    @staticmethod
    def _clear(sums: torch.Tensor, tally: Tally) -> None:
        sums.zero_()
        tally.clear()

    # ---- commands, in the process

    def _say(self, *event: Any) -> None:
        self._events_in.send(event)

    async def _do(self, method: str, *args: Any) -> None:
        """Run a command. hivemind forgets its task, and asyncio alone would let it be collected as garbage."""
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await getattr(self, f"do_{method}")(*args)
        except Exception as error:  # noqa: BLE001  what a command does not expect ends the program, in the open
            _log.exception("the averager's command %s failed", method)
            self._say("crashed", f"{method}: {error!r}")
        finally:
            self._tasks.discard(task)

    async def do_set_replica(self, round_number: int, lineage: str, ready: bool) -> None:
        self._replica = (round_number, lineage, ready)
        if self._roll is not None and self._roll.round <= round_number:
            self._end_roll(Dissolved("the round is over"))

    async def do_set_membership(self, certificate: Certificate, notice: str) -> None:
        """Bring the guard of this process to what the program knows."""
        self._guard.certificate = certificate
        if notice:
            self._guard.trust.take(notice)

    async def do_give_order(self, order: str) -> None:
        self._hear_order(order)

    async def do_attempt(self, attempt: Attempt, not_before: float) -> None:
        """Form a group and average; says `attempt_ended`."""
        culprits: list[str] = []
        try:
            end, reason = await self._attempt(attempt, not_before, culprits)
        except Exception as error:  # noqa: BLE001  whatever went wrong, the program must hear that it is over
            _log.exception("round %d: the attempt failed", attempt.round)
            end, reason = End.BROKEN, repr(error)
        finally:
            self._following = None
        if end is not End.COMMITTED:
            _log.warning("round %d: attempt ended: %s %s", attempt.round, end.value, reason)
        self._say("attempt_ended", end, culprits, reason)

    async def do_load_update(self, round_number: int) -> None:
        """Decode a kept result into `update`; says `loaded`."""
        update = self._updates[round_number]
        for part, encoded in zip(self.layout.parts, update.parts, strict=True):
            self.update[part.start : part.stop] = decode(encoded, part)
        self._say("loaded", round_number)

    async def do_fetch_update(self, round_number: int, lineage: str, sources: Sequence[str]) -> None:
        """Get the result of a round from peers that keep it; says `update` or `fetch_failed`."""
        reason = "no peer keeps it"
        for peer in sources[:3]:
            try:
                update = await self._fetch_update(round_number, lineage, peer)
            except Exception as error:  # noqa: BLE001  whatever a peer does wrong, the next is asked
                reason = f"{peer[-6:]}: {error!r}"
                _log.warning("fetching the result of round %d failed: %s", round_number, reason)
                continue
            self._keep(update)
            self._say("update", update.header.model_dump())
            return
        self._say("fetch_failed", reason)

    async def do_fetch_snapshot(self, round_number: int, sources: Sequence[str]) -> None:
        """Get the whole state from several peers at once; says `weights`, then `snapshot`, or `fetch_failed`."""
        try:
            await self._fetch_snapshot(round_number, sources)
        except Exception as error:  # noqa: BLE001  whatever a peer does wrong, the rules decide what next
            _log.warning("fetching a snapshot failed: %r", error)
            self._say("fetch_failed", repr(error))

    async def do_offer_snapshot(self, folder: Path, manifest: SnapshotManifest | None) -> None:
        """The program wrote a snapshot (None: it cannot now)."""
        if manifest is not None:
            if len(self._snapshots) == self._snapshots.maxlen:
                shutil.rmtree(self._snapshots[0][0], ignore_errors=True)
            self._snapshots.append((folder, manifest))
        if self._snapshot_made is not None and not self._snapshot_made.done():
            self._snapshot_made.set_result(None)

    async def do_push(self, peer: str) -> None:
        """Send the whole state to a peer; says `pushed`."""
        try:
            folder, manifest = await self._own_snapshot(self._replica[0])
            if await self._push(peer, _State(manifest=manifest)):
                for name in FILES:
                    for index in range(len(manifest.pieces[name])):
                        await self._push(peer, _State(name=name, index=index), read_piece(folder, name, index))
        except Exception as error:  # noqa: BLE001  it is tried again later
            _log.warning("sending the state to %s failed: %r", peer[-6:], error)
        self._say("pushed")

    async def do_hand_in(self, peer: str) -> None:
        """Give what waits to a peer; says `handed_in` and how many samples that were."""
        with self.lock_averaged_tensors:
            sums, samples, oldest = self.waiting.clone(), self.waiting_tally.samples, self.waiting_tally.oldest
        given = 0
        try:
            batch: list[bytes] = []
            round_number, lineage, _ = self._replica
            for index, part in enumerate(self.layout.parts):
                batch.append(encode(sums[part.start : part.stop] / samples, part)[0])
                if sum(map(len, batch)) >= _BATCH or index == len(self.layout.parts) - 1:
                    first = index + 1 - len(batch)
                    gift = _Gift(
                        round=round_number,
                        lineage=lineage,
                        samples=samples,
                        oldest=int(oldest),
                        first=first,
                        count=len(batch),
                    )
                    if not await self._push(peer, gift, b"".join(batch)):
                        raise SwarmError("it was refused")
                    batch = []
            given = samples
        except Exception as error:  # noqa: BLE001  another peer is tried
            _log.warning("handing the work in to %s failed: %r", peer[-6:], error)
        self._say("handed_in", given)

    # ---- forming a group

    async def _attempt(self, attempt: Attempt, not_before: float, culprits: list[str]) -> tuple[End, str]:
        leaders, tried = deque(attempt.leaders), set[str]()
        reason = "nobody leads"
        while leaders:
            leader = leaders.popleft()
            if leader in tried:
                continue
            tried.add(leader)
            outcome = (
                await self._lead(attempt, not_before)
                if leader == self._me.peer
                else await self._follow(leader, attempt)
            )
            if isinstance(outcome, Group):
                return await self._average(outcome, culprits)
            if isinstance(outcome, Dissolved):
                if leader != self._me.peer:
                    culprits.append(leader)
                return End.NO_GROUP, outcome.reason
            if outcome is Refusal.BEHIND:
                return End.BEHIND, "the others have finished it"
            if isinstance(outcome, Refusal):
                reason = outcome.value
            elif outcome is None:
                culprits.append(leader)
                reason = f"{leader[-6:]} does not answer"
            elif outcome not in tried:
                leaders.appendleft(outcome)  # the leader that this one follows
            elif outcome == self._me.peer:
                tried.discard(outcome)
                leaders.appendleft(outcome)
        return End.NO_GROUP, reason

    def _open_roll(self, attempt_round: int, lineage: str) -> RollCall:
        if self._roll is None or self._roll.round != attempt_round or self._roll.begun or self._roll.lineage != lineage:
            self._end_roll(Dissolved("another round"))
            self._roll = RollCall(self._me, attempt_round, lineage, self._patience, time.monotonic())
            self._roll_ended = asyncio.get_running_loop().create_future()
        return self._roll

    def _end_roll(self, outcome: Group | Dissolved) -> None:
        if self._roll_ended is not None and not self._roll_ended.done():
            self._roll_ended.set_result(outcome)

    async def _lead(self, attempt: Attempt, not_before: float) -> Group | Dissolved:
        if self._replica[:2] != (attempt.round - 1, attempt.lineage):
            return Dissolved("the replica has moved on")
        roll = self._open_roll(attempt.round, attempt.lineage)
        ended = self._roll_ended
        assert ended is not None
        roll.lead(attempt.here, attempt.suspects, not_before)
        while not ended.done():
            outcome = roll.poll(time.monotonic(), uuid.uuid4().hex)
            if isinstance(outcome, Group):
                outcome = replace(outcome, order=self._order)
                self._register(outcome)
            if outcome is not None:
                self._end_roll(outcome)
                return outcome
            await asyncio.sleep(_TICK)
        return Dissolved("the round is over")

    async def _follow(self, leader: str, attempt: Attempt) -> Group | Dissolved | Refusal | str | None:
        """The group; or why there is none: a refusal, another leader to ask, None where it does not answer."""
        request = averaging_pb2.JoinRequest(
            schema_hash=self.layout.digest,
            client_mode=not self._me.dialable,
            gather=json.dumps({"round": attempt.round, "lineage": attempt.lineage, "order": self._order}).encode(),
        )
        deadline = time.monotonic() + self._patience
        while True:
            outcome = await self._join(leader, request, attempt)
            if outcome not in (Refusal.NOT_YET, Refusal.OVER) or time.monotonic() > deadline:
                return outcome
            await asyncio.sleep(_KEEP_ALIVE)

    async def _join(self, leader: str, request: Any, attempt: Attempt) -> Group | Dissolved | Refusal | str | None:
        stream: Any = None
        try:
            stub = self._stub(leader)
            stream = await asyncio.wait_for(stub.rpc_join_group(request), _ANSWER)
            until = time.monotonic() + 3 * self._patience + 10.0
            while time.monotonic() < until:
                message = await asyncio.wait_for(anext(stream), _ANSWER)
                if message.code == averaging_pb2.ACCEPTED:
                    if self._following != leader:
                        self._following = leader
                        self._end_roll(Dissolved(f"follows {leader}"))
                    continue
                if message.code == averaging_pb2.BEGIN_ALLREDUCE:
                    group = self._parse_group(message, attempt)
                    self._register(group)
                    return group
                self._following = None
                if message.code == averaging_pb2.NOT_A_LEADER and message.suggested_leader:
                    return str(PeerID.from_base58(message.suggested_leader.decode()))
                if message.code == averaging_pb2.GROUP_DISBANDED:
                    return Dissolved(f"{leader[-6:]} disbanded the group")
                return Refusal(message.group_id.decode())
            return Dissolved(f"{leader[-6:]} did not begin")
        except Exception as error:  # noqa: BLE001  whatever it does wrong, it does not lead this peer
            _log.warning("asking %s for a group failed: %r", leader[-6:], error)
            self._following = None
            return None
        finally:
            if stream is not None:
                await stream.aclose()

    def _parse_group(self, message: Any, attempt: Attempt) -> Group:
        order = message.gathered[-1].decode()
        members = tuple(
            Member(str(PeerID.from_base58(peer.decode())), dialable == b"1")
            for peer, dialable in zip(message.ordered_peer_ids, message.gathered[:-1], strict=True)
        )
        peers = [member.peer for member in members]
        if peers != sorted(set(peers)) or self._me not in members or len(members) > _MOST_MEMBERS:
            raise SwarmError("a damaged list of members")
        self._hear_order(order)
        return Group(message.group_id.decode(), attempt.round, attempt.lineage, members, order)

    def _hear_order(self, order: str) -> None:
        """Keep the newest. Raises `OrderError` where it is not the organizer's."""
        if order in ("", self._order):
            return
        known, heard = parse_order(self._order) if self._order else None, parse_order(order)
        if known is not None and heard.content == known.content:  # the run's key was changed, and it signed once more
            if self._guard.trust.is_signed(heard.content, heard.signature, newest=True):
                self._order = order
            return
        read_order(order, self._guard.trust)
        if known is None or heard.number > known.number:
            self._order = order

    async def rpc_join_group(
        self, request: averaging_pb2.JoinRequest, context: P2PContext
    ) -> AsyncIterator[averaging_pb2.MessageFromLeader]:
        answer = averaging_pb2.MessageFromLeader
        peer = str(context.remote_id)
        try:
            wish = json.loads(request.gather)
            wished_round, lineage = int(wish["round"]), str(wish["lineage"])
            self._hear_order(str(wish["order"]))
            if request.schema_hash != self.layout.digest:
                raise ValueError("other tensors")
        except (ValueError, KeyError, TypeError, OrderError):
            yield answer(code=averaging_pb2.PROTOCOL_VIOLATION, group_id=Refusal.LINEAGE.value.encode())
            await asyncio.sleep(LINGER)
            return
        if self._following is not None and self._following != peer:
            yield answer(code=averaging_pb2.NOT_A_LEADER, suggested_leader=self._following.encode())
            await asyncio.sleep(LINGER)
            return
        refusal = self._refuse(peer, wished_round, lineage, dialable=not request.client_mode)
        if refusal is not None:
            yield answer(code=averaging_pb2.NOT_LOOKING_FOR_GROUP, group_id=refusal.value.encode())
            await asyncio.sleep(LINGER)
            return
        roll, ended = self._roll, self._roll_ended
        assert roll is not None
        assert ended is not None
        try:
            while not ended.done():
                yield answer(code=averaging_pb2.ACCEPTED)
                await asyncio.wait({ended}, timeout=_KEEP_ALIVE)
            outcome = ended.result()
            if isinstance(outcome, Group) and peer not in {member.peer for member in outcome.members}:
                yield answer(code=averaging_pb2.NOT_LOOKING_FOR_GROUP, group_id=Refusal.OVER.value.encode())
            elif isinstance(outcome, Group):
                yield answer(
                    code=averaging_pb2.BEGIN_ALLREDUCE,
                    group_id=outcome.id.encode(),
                    ordered_peer_ids=[member.peer.encode() for member in outcome.members],
                    gathered=[
                        *(b"1" if member.dialable else b"0" for member in outcome.members),
                        outcome.order.encode(),
                    ],
                )
            elif self._following is not None:
                yield answer(code=averaging_pb2.NOT_A_LEADER, suggested_leader=self._following.encode())
            else:
                yield answer(code=averaging_pb2.GROUP_DISBANDED)
            await asyncio.sleep(LINGER)
        finally:
            roll.drop(peer)

    def _refuse(self, peer: str, wished_round: int, lineage: str, dialable: bool) -> Refusal | None:
        """Take a peer into the roll call of the round, or say why not."""
        own_round, own_lineage, ready = self._replica
        if not ready or wished_round > own_round + 1:
            return Refusal.NOT_YET
        if wished_round <= own_round or wished_round in self._updates:
            return Refusal.BEHIND  # the second: the result is here, and about to be applied
        if lineage != own_lineage:
            return Refusal.LINEAGE
        if any(not running.agreement.decided for running in self._running.values()):
            return Refusal.OVER
        roll = self._open_roll(wished_round, lineage)
        refusal = roll.join(Member(peer, dialable), wished_round, lineage)
        if refusal is None:
            self._say("called")
        return refusal

    # ---- averaging

    def _register(self, group: Group) -> None:
        """From now on, members may send their parts. What waited is frozen: it is what this peer puts in.

        Where something is frozen already, in a group of this round that failed, it is that and no more: the group may
        have succeeded for others, and then all that is frozen is in the round's result.
        """
        samples = 0
        with self.lock_averaged_tensors:
            if self.frozen_tally.samples == 0:
                samples = self.waiting_tally.samples
                self.frozen.copy_(self.waiting)
                self.frozen_tally.add(samples, self.waiting_tally.oldest)
                self._clear(self.waiting, self.waiting_tally)
        self._say("frozen", group.id, samples)
        self._running[group.id] = _Running(
            AllReduce(
                group,
                self._me.peer,
                self.layout,
                self.frozen,
                self.frozen_tally.samples,
                self._errors,
                self._stub,
            ),
            Agreement(group, self._me.peer, time.monotonic() + self._timeout),
        )
        for old in list(self._running)[:-_GROUPS_KEPT]:
            del self._running[old]

    async def _average(self, group: Group, culprits: list[str]) -> tuple[End, str]:
        running = self._running[group.id]
        allreduce, agreement = running.allreduce, running.agreement
        reason = ""
        run = asyncio.create_task(allreduce.run())
        try:
            while not agreement.decided:
                now = time.monotonic()
                if agreement.status is Status.RUNNING and allreduce.is_whole:
                    running.digest = self._digest(allreduce)
                    agreement.hold(now)
                elif run.done() and not allreduce.is_whole and not reason:
                    error = run.exception()
                    reason = str(error) if error is not None else "parts are missing"
                    if isinstance(error, AllReduceError):
                        if error.culprit != self._me.peer:
                            culprits.append(error.culprit)
                    elif error is not None:
                        _log.error("the all-reduce failed", exc_info=error)
                    final = isinstance(error, AllReduceError) and error.final
                    agreement.stick(unfinished=final or allreduce.is_unfinished)
                await asyncio.gather(*(self._question(running, peer) for peer in agreement.questions(now)))
                if agreement.status is Status.RUNNING and agreement.helpers:
                    await self._repair(running)
                agreement.poll(time.monotonic())
                if not agreement.decided and run.done():
                    await asyncio.sleep(_TICK)
                elif not agreement.decided:
                    await asyncio.wait({run}, timeout=_TICK)
        finally:
            run.cancel()
            if agreement.status is not Status.COMMITTED:
                allreduce.fail(AllReduceError(self._me.peer, "it has given this group up"))
            if not agreement.decided:
                agreement.status = Status.ABANDONED
        if agreement.status is not Status.COMMITTED:
            return End.BROKEN, reason or f"not agreed upon: {agreement.status.value}"
        update = _Update(_header(running), [allreduce.results[i] for i in range(len(self.layout.parts))])
        self._keep(update)
        with self.lock_averaged_tensors:  # the errors of what was sent go into the next round's sums
            for index, lost in allreduce.sent_errors.items():
                part = self.layout.parts[index]
                self.waiting[part.start : part.stop].add_(lost)
            self._clear(self.frozen, self.frozen_tally)
        self._errors.update(allreduce.errors)
        self._say("update", update.header.model_dump())
        return End.COMMITTED, ""

    def _digest(self, allreduce: AllReduce) -> str:
        parts = [allreduce.results[i] for i in range(len(self.layout.parts))]
        return digest_of(parts, allreduce.weights, allreduce.group.order)

    async def _question(self, running: _Running, peer: str) -> None:
        """Ask a member how far it is with the group's result."""
        question = _Question(group=running.agreement.group.id, status=running.agreement.status, digest=running.digest)
        try:
            answer = _Question.model_validate_json(
                (await self._stub(peer).rpc_ask(_message(question), timeout=_ANSWER)).metadata
            )
        except Exception as error:  # noqa: BLE001  no answer, whatever the cause
            _log.info("asking %s about the group failed: %r", peer[-6:], error)
            running.agreement.answered(peer, None)
            return
        running.agreement.answered(peer, self._believed(running, answer))

    def _believed(self, running: _Running, said: _Question) -> Status:
        """A member that holds other bytes does not hold this group's result."""
        holds = said.status in (Status.HELD, Status.COMMITTED)
        if holds and running.digest and said.digest != running.digest:
            _log.error("a member holds other bytes of the same result")
            return Status.ABANDONED
        return said.status

    async def rpc_ask(self, request: averaging_pb2.DownloadData, context: P2PContext) -> averaging_pb2.DownloadData:
        said = _Question.model_validate_json(request.metadata)
        running = self._running.get(said.group)
        if running is None:
            return _message(_Question(group=said.group, status=Status.ABANDONED))
        if str(context.remote_id) not in {member.peer for member in running.agreement.group.members}:
            raise SwarmError("not a member")
        status = running.agreement.asked(self._believed(running, said), time.monotonic())
        return _message(_Question(group=said.group, status=status, digest=running.digest))

    async def _repair(self, running: _Running) -> None:
        """Fetch the parts that are missing from a member that holds them."""
        allreduce, agreement = running.allreduce, running.agreement
        peer = agreement.helpers[0]
        try:
            if not allreduce.weights or len(allreduce.weights) < len(allreduce.group.members):
                header = await self._fetch_header(peer, _Wanted(kind="parts", group=allreduce.group.id))
                allreduce.weights = header.samples
            for index, encoded in await self._fetch_parts(peer, allreduce.group.id, allreduce.missing()):
                allreduce.accept(index, encoded)
        except Exception as error:  # noqa: BLE001  the next helper, or none, is asked in the next turn
            _log.warning("fetching missing parts from %s failed: %r", peer[-6:], error)
            agreement.helpers.remove(peer)
            return
        _log.warning("round %d: missing parts were fetched from %s", allreduce.group.round, peer[-6:])
        running.digest = self._digest(allreduce)
        agreement.hold(time.monotonic())
        await self._question(running, peer)  # tell it: two hold the result now
        if not agreement.decided and agreement._answers.get(peer) is Status.COMMITTED:
            agreement.adopt()

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        header = await asyncio.wait_for(anext(stream), _ANSWER)
        group_id = header.group_id.decode()
        deadline = time.monotonic() + _GROUP_COMES
        while group_id not in self._running and time.monotonic() < deadline:
            await asyncio.sleep(_TICK / 2)
        running = self._running.get(group_id)
        if running is None:
            yield averaging_pb2.AveragingData(code=averaging_pb2.BAD_GROUP_ID)
            await asyncio.sleep(LINGER)
            return
        async for message in running.allreduce.serve(str(context.remote_id), header.weight, stream):
            yield message

    # ---- results of past rounds

    def _keep(self, update: _Update) -> None:
        self._updates[update.header.round] = update
        for old in sorted(self._updates)[:-UPDATES_KEPT]:
            del self._updates[old]

    async def _fetch_header(self, peer: str, wanted: _Wanted) -> UpdateHeader:
        answer = await self._stub(peer).rpc_fetch(_message(wanted), timeout=_CALL)
        return UpdateHeader.model_validate_json(answer.metadata)

    async def _fetch_parts(self, peer: str, group: str, indices: Sequence[int]) -> list[tuple[int, bytes]]:
        """Parts of a group's result, not checked yet. Raises whatever a call can raise."""
        parts: list[tuple[int, bytes]] = []
        left = list(indices)
        while left:
            batch, size = [left.pop(0)], 0
            while left and (size := size + self.layout.parts[batch[-1]].bytes) < _BATCH:
                batch.append(left.pop(0))
            wanted = _Wanted(kind="parts", group=group, indices=batch)
            buffer = (await self._stub(peer).rpc_fetch(_message(wanted), timeout=_CALL)).tensor_part.buffer
            at = 0
            for index in batch:
                parts.append((index, buffer[at : at + self.layout.parts[index].bytes]))
                at += self.layout.parts[index].bytes
            if at != len(buffer):
                raise SwarmError("parts of another length than the ones that were asked for")
        return parts

    async def _fetch_update(self, round_number: int, lineage: str, peer: str) -> _Update:
        header = await self._fetch_header(peer, _Wanted(kind="update", round=round_number))
        if header.round != round_number or header.base != lineage:
            raise SwarmError("it is of another lineage")
        parts = [encoded for _, encoded in await self._fetch_parts(peer, header.group, range(len(self.layout.parts)))]
        for part, encoded in zip(self.layout.parts, parts, strict=True):
            decode(encoded, part)
        if digest_of(parts, header.samples, header.order) != header.digest:
            raise DigestError("its digest is not the one that was announced")
        self._hear_order(header.order)
        return _Update(header, parts)

    async def rpc_fetch(self, request: averaging_pb2.DownloadData, context: P2PContext) -> averaging_pb2.DownloadData:
        wanted = _Wanted.model_validate_json(request.metadata)
        if wanted.kind == "update":
            return _message(self._updates[wanted.round].header)
        if wanted.kind == "parts":
            return self._answer_parts(wanted)
        if wanted.kind == "manifest":
            _, manifest = await self._own_snapshot(wanted.round)
            return _message(manifest)
        folder = next(folder for folder, manifest in self._snapshots if manifest.round == wanted.round)
        return _message(None, read_piece(folder, wanted.name, wanted.index))

    def _answer_parts(self, wanted: _Wanted) -> averaging_pb2.DownloadData:
        for update in self._updates.values():
            if update.header.group == wanted.group:
                return _message(update.header, b"".join(update.parts[index] for index in wanted.indices))
        running = self._running[wanted.group]
        return _message(_header(running), b"".join(running.allreduce.results[index] for index in wanted.indices))

    # ---- snapshots

    async def _own_snapshot(self, wished_round: int) -> tuple[Path, SnapshotManifest]:
        """This peer's snapshot of that round if it has one, or of the round it is at."""
        for folder, manifest in reversed(self._snapshots):
            if manifest.round in (wished_round, self._replica[0]):
                return folder, manifest
        if not self._replica[2]:
            raise SwarmError("this peer has no state yet")
        if self._snapshot_made is None or self._snapshot_made.done():
            self._snapshot_made = asyncio.get_running_loop().create_future()
            self._say("snapshot_wanted")
        await asyncio.wait_for(asyncio.shield(self._snapshot_made), _CALL)
        return self._snapshots[-1]

    async def _fetch_snapshot(self, round_number: int, sources: Sequence[str]) -> None:
        async def manifest_of(peer: str) -> SnapshotManifest:
            wanted = _message(_Wanted(kind="manifest", round=round_number))
            return read_manifest((await self._stub(peer).rpc_fetch(wanted, timeout=_CALL)).metadata)

        answers = await asyncio.gather(*(manifest_of(peer) for peer in sources[:8]), return_exceptions=True)
        manifests = {
            peer: answer for peer, answer in zip(sources, answers, strict=False) if isinstance(answer, SnapshotManifest)
        }
        if not manifests:
            raise SwarmError(f"nobody offers a snapshot: {answers!r}")
        # peers that are at the same round and lineage offer the same state, if not always the same bytes
        common: dict[tuple[int, str, str], dict[str, SnapshotManifest]] = {}
        for peer, manifest in manifests.items():
            common.setdefault((manifest.round, manifest.lineage, str(manifest.sizes)), {})[peer] = manifest
        offers = max(common.values(), key=lambda offers: (len(offers), next(iter(offers.values())).round))
        manifest = next(iter(offers.values()))
        folder = self._folder / f"incoming-{manifest.round}-{manifest.lineage}"
        for old in self._folder.glob("incoming-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        for name in FILES:
            await self._fetch_file(folder, name, offers)
            self._say("weights" if name == "weights" else "snapshot", folder, manifest.model_dump())

    async def _fetch_file(self, folder: Path, name: str, offers: dict[str, SnapshotManifest]) -> None:
        """All pieces of a file, those that are here already left out; then the file."""
        pieces = folder / f"{name}.pieces"
        pieces.mkdir(parents=True, exist_ok=True)
        count = len(next(iter(offers.values())).pieces[name])
        todo = deque(
            index
            for index in range(count)
            if not any(_matches(pieces / str(index), manifest.pieces[name][index]) for manifest in offers.values())
        )
        failures = dict.fromkeys(offers, 0)
        done = count - len(todo)

        async def work(peer: str) -> None:
            nonlocal done
            manifest = offers[peer]
            while todo and failures[peer] < _FAILURES:
                index = todo.popleft()
                wanted = _Wanted(kind="piece", round=manifest.round, name=name, index=index)
                try:
                    answer = await self._stub(peer).rpc_fetch(_message(wanted), timeout=_CALL)
                    (pieces / f".{index}").write_bytes(answer.tensor_part.buffer)
                    if not _matches(pieces / f".{index}", manifest.pieces[name][index]):
                        raise DigestError("a piece with another digest than the one that was announced")
                except Exception as error:  # noqa: BLE001  another peer is asked for this piece
                    _log.warning("piece %d of %s from %s: %r", index, name, peer[-6:], error)
                    failures[peer] += 1
                    todo.append(index)
                    continue
                (pieces / f".{index}").rename(pieces / str(index))
                done += 1
                self._say("loading", name, done, count)

        while todo and any(failed < _FAILURES for failed in failures.values()):
            await asyncio.gather(*(work(peer) for peer in offers for _ in range(_FETCHERS)))
        if todo:
            raise SwarmError("the peers that offered the state stopped answering")
        with (folder / name).open("wb") as file:
            for index in range(count):
                file.write((pieces / str(index)).read_bytes())
        if name == FILES[-1]:
            for each in FILES:
                shutil.rmtree(folder / f"{each}.pieces", ignore_errors=True)

    # ---- what others push

    async def _push(self, peer: str, what: BaseModel, content: bytes = b"") -> bool:
        answer = await self._stub(peer).rpc_push(_message(what, content), timeout=_CALL)
        return bool(answer.metadata == b"ok")

    async def rpc_push(self, request: averaging_pb2.DownloadData, context: P2PContext) -> averaging_pb2.DownloadData:
        peer, content = str(context.remote_id), request.tensor_part.buffer
        kind = json.loads(request.metadata).get("kind")
        if kind == "gradient":
            took = self._take_gift(peer, _Gift.model_validate_json(request.metadata), content)
        else:
            took = self._take_state(peer, _State.model_validate_json(request.metadata), content)
        return averaging_pb2.DownloadData(metadata=b"ok" if took else b"no")

    def _take_gift(self, peer: str, gift: _Gift, content: bytes) -> bool:
        """Parts of a leaver's mean gradient; added to what waits when the last has come."""
        if (gift.round, gift.lineage, True) != self._replica:
            return False
        if gift.first == 0:
            self._incoming[peer] = _Incoming()
        incoming = self._incoming.get(peer)
        if incoming is None or len(incoming.parts) != gift.first:
            return False
        at = 0
        for part in self.layout.parts[gift.first : gift.first + gift.count]:
            decode(content[at : at + part.bytes], part)
            incoming.parts.append(content[at : at + part.bytes])
            at += part.bytes
        if len(incoming.parts) == len(self.layout.parts):
            del self._incoming[peer]
            with self.lock_averaged_tensors:
                for part, encoded in zip(self.layout.parts, incoming.parts, strict=True):
                    self.waiting[part.start : part.stop].add_(decode(encoded, part), alpha=gift.samples)
                self.waiting_tally.add(gift.samples, gift.oldest)
            self._say("given", peer, gift.samples)
        return True

    def _take_state(self, peer: str, state: _State, content: bytes) -> bool:
        """Pieces of the state that this peer could not fetch; said when all have come."""
        if state.manifest is not None:
            state.manifest.check()
            if self._replica[2] and state.manifest.round <= self._replica[0]:
                return False
            folder = self._folder / f"incoming-{state.manifest.round}-pushed"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._incoming[peer] = _Incoming(manifest=state.manifest, folder=folder)
            return True
        incoming = self._incoming.get(peer)
        if incoming is None or incoming.manifest is None or incoming.folder is None:
            return False
        with (incoming.folder / state.name).open("ab") as file:
            if file.tell() != state.index * PIECE:
                return False
            file.write(content)
        if not _matches_bytes(content, incoming.manifest.pieces[state.name][state.index]):
            del self._incoming[peer]
            return False
        incoming.pieces.add((state.name, state.index))
        if len(incoming.pieces) == sum(map(len, incoming.manifest.pieces.values())):
            del self._incoming[peer]
            self._say("pushed_here", incoming.folder, incoming.manifest.model_dump())
        return True

    # ---- helpers

    def _stub(self, peer: str) -> Any:
        return self.get_stub(self._p2p, PeerID.from_base58(peer), namespace=self.prefix)


def _header(running: _Running) -> UpdateHeader:
    group = running.allreduce.group
    return UpdateHeader(
        round=group.round,
        group=group.id,
        base=group.lineage,
        digest=running.digest,
        samples=running.allreduce.weights,
        order=group.order,
    )


def _message(metadata: BaseModel | None, content: bytes = b"") -> averaging_pb2.DownloadData:
    return averaging_pb2.DownloadData(
        metadata=metadata.model_dump_json().encode() if metadata is not None else b"",
        tensor_part=runtime_pb2.Tensor(buffer=content),
    )


def _matches(path: Path, digest: str) -> bool:
    return path.exists() and _matches_bytes(path.read_bytes(), digest)


def _matches_bytes(content: bytes, digest: str) -> bool:
    return hashlib.sha256(content).hexdigest() == digest
