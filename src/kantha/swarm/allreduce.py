"""One all-reduce: every reducer averages a share of the parts, and sends all members the same bytes.

Butterfly all-reduce as in Moshpit SGD (Ryabinin et al. 2021, arXiv 2103.03239, section 2.1), with the gradient's
compression error kept at both ends and added the next time (DoubleSqueeze: Tang et al. 2019, arXiv 1905.05957). It ends
whole or not at all: a part that a member does not deliver is never made up by the others.

A member opens one stream to each reducer: its weight, then its share of that reducer's parts; the answers are the
weights of all, then the averaged parts, as they are done.
"""

import asyncio
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, AsyncIterator  # noqa: UP035  hivemind finds streaming calls by the typing one only

import torch
from hivemind.proto import averaging_pb2, runtime_pb2
from hivemind.utils.asyncio import aiter_with_timeout

from kantha.swarm.groups import Group
from kantha.swarm.parts import CodecError, Layout, decode, encode

STALL = 10.0  # seconds without the next part, after which a reducer gives a sender up
REPLY = 20.0  # the same for a member that waits for a reducer, which may itself be waiting for another
LINGER = 0.25  # seconds that a streamed answer stays open after its last message: p2pd resets it when it is closed
MAX_WEIGHT = 1e9  # samples
_Data = averaging_pb2.AveragingData


class AllReduceError(Exception):
    """It did not become whole; `culprit` is the peer that broke it, as far as this one can tell.

    `final`: a reducer could not finish its parts, so nobody can hold the result. Else only this member lacks something.
    """

    def __init__(self, culprit: str, reason: str, *, final: bool = True) -> None:
        super().__init__(f"{reason} ({culprit[-6:]})")
        self.culprit, self.reason, self.final = culprit, reason, final


class AllReduce:
    """One member's side. Made when the group forms; `serve` answers others from then on, `run` asks them."""

    def __init__(
        self,
        group: Group,
        me: str,
        layout: Layout,
        values: torch.Tensor,
        weight: float,
        errors: Mapping[int, torch.Tensor],
        stub: Callable[[str], Any],
    ) -> None:
        """
        :param values: flat fp32 vector of sums over samples; not changed while this object is used
        :param weight: samples in the sums; 0: this member only reduces and listens
        :param errors: of earlier averages of this reducer, by part, to be made up for
        :param stub: how a peer's `rpc_aggregate_part` is called
        """
        self.group = group
        self.weights: dict[str, float] = {}  # samples of each member
        self.results: dict[int, bytes] = {}
        self.errors: dict[int, torch.Tensor] = {}  # of this reducer's averages, for the next time
        self.sent_errors: dict[int, torch.Tensor] = {}  # of what this member sent, by part; in sums over samples
        self._me, self._layout, self._values, self._weight, self._stub = me, layout, values, weight, stub
        self._old_errors = errors
        shares = dict(zip(group.reducers, layout.shares(len(group.reducers)), strict=True))
        self._shares = shares
        self._mine = shares.get(me, range(0))
        loop = asyncio.get_running_loop()
        self._averaged: dict[int, asyncio.Future[bytes]] = {index: loop.create_future() for index in self._mine}
        self._sums: dict[int, torch.Tensor] = {}
        self._counts = dict.fromkeys(self._mine, 0)
        self._served: set[str] = set()
        self._all_here = asyncio.Event()
        self.failure: AllReduceError | None = None

    @property
    def is_whole(self) -> bool:
        return len(self.results) == len(self._layout.parts)

    @property
    def is_unfinished(self) -> bool:
        """Whether this member reduces and could not average all its parts."""
        return any(index not in self.results for index in self._mine)

    def missing(self) -> list[int]:
        return [index for index in range(len(self._layout.parts)) if index not in self.results]

    def accept(self, index: int, encoded: bytes) -> None:
        """Take an averaged part that was fetched from elsewhere. Raises `CodecError`."""
        decode(encoded, self._layout.parts[index])
        self.results[index] = encoded

    async def run(self) -> None:
        """Take part until all is done that can be done. Raises `AllReduceError` where that is not everything."""
        work = [self._exchange(peer, share) for peer, share in self._shares.items() if peer != self._me and share]
        if self._mine:
            work.append(self._reduce())
        tasks = [asyncio.create_task(each) for each in work]
        failure: AllReduceError | None = None
        try:
            for task in asyncio.as_completed(tasks):
                try:
                    await task
                except AllReduceError as error:
                    failure = failure or error
                    if error.final:
                        self.fail(error)
                        raise
        finally:
            for unfinished in tasks:
                unfinished.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if failure is not None:
            raise failure

    # ---- as a member

    async def _exchange(self, peer: str, share: range) -> None:
        """Send this member's part of a reducer's share, and take the averages."""
        expected = iter(share)
        try:
            stream = await asyncio.wait_for(self._stub(peer).rpc_aggregate_part(self._send(share)), REPLY)
            try:
                answers = aiter_with_timeout(stream, REPLY)
                self._hear_weights(peer, await anext(answers))
                async for message in answers:
                    self._check_code(peer, message)
                    self.accept(next(expected), message.tensor_part.buffer)
            finally:
                await stream.aclose()
            if any(index not in self.results for index in share):
                raise AllReduceError(peer, "its averages ended too soon", final=False)
        except AllReduceError:
            raise
        except TimeoutError:
            raise AllReduceError(peer, f"it sent nothing for {REPLY:.0f} s", final=False) from None
        except CodecError as error:
            raise AllReduceError(peer, f"it sent {error}", final=False) from None
        except (StopIteration, StopAsyncIteration):
            raise AllReduceError(peer, "it sent too much, or nothing", final=False) from None
        except Exception as error:  # noqa: BLE001  whatever libp2p raises, this reducer's averages are missing
            raise AllReduceError(peer, f"it cannot be reached: {error!r}", final=False) from None

    async def _send(self, share: range) -> AsyncIterator[Any]:
        yield _Data(group_id=self.group.id.encode(), weight=self._weight)
        if self._weight > 0:
            for index in share:
                part = self._layout.parts[index]
                sums = self._values[part.start : part.stop]
                try:
                    encoded, decoded = encode(sums / self._weight, part)
                except CodecError as error:
                    self.fail(AllReduceError(self._me, str(error)))
                    return  # the reducer sees that parts are missing
                self.sent_errors[index] = sums - decoded * self._weight
                yield _Data(tensor_part=runtime_pb2.Tensor(buffer=encoded))

    def _check_code(self, peer: str, message: Any) -> None:
        if message.code != averaging_pb2.AVERAGED_PART:
            reason = message.group_id.decode(errors="replace")[:200] or averaging_pb2.MessageCode.Name(message.code)
            raise AllReduceError(message.peer_id.decode(errors="replace")[:80] or peer, reason)

    def _hear_weights(self, peer: str, message: Any) -> None:
        """The reducer's first answer: who averages with which weight."""
        self._check_code(peer, message)
        try:
            weights = json.loads(message.group_id)
            good = weights.keys() == {member.peer for member in self.group.members} and all(
                isinstance(weight, float | int) and 0 <= weight <= MAX_WEIGHT for weight in weights.values()
            )
        except (ValueError, AttributeError):
            good = False
        if not good or any(self.weights.get(member, weight) != weight for member, weight in weights.items()):
            raise AllReduceError(peer, "its list of weights is damaged or another than the others'", final=False)
        if not self._mine:
            self.weights = weights

    # ---- as a reducer

    async def _reduce(self) -> None:
        """Put in this member's own values, and wait for the others'."""
        self._arrive(self._me, self._weight)
        if self._weight > 0:
            for index in self._mine:
                part = self._layout.parts[index]
                self._add(index, self._values[part.start : part.stop])
                await asyncio.sleep(0)
        try:
            await asyncio.wait_for(self._all_here.wait(), STALL)
        except TimeoutError:
            absent = next(member.peer for member in self.group.members if member.peer not in self.weights)
            self.fail(AllReduceError(absent, f"it did not come within {STALL:.0f} s"))
        for future in self._averaged.values():
            await asyncio.shield(future)

    async def serve(self, sender: str, weight: float, stream: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Answers to a member that sent its weight, and now sends its parts."""
        if sender in self._served or sender not in {member.peer for member in self.group.members}:
            yield _Data(code=averaging_pb2.PROTOCOL_VIOLATION)
            return
        self._served.add(sender)
        receiving = asyncio.create_task(self._receive(sender, weight, stream))
        try:
            await self._wait_for_all()
            yield _Data(code=averaging_pb2.AVERAGED_PART, group_id=json.dumps(self.weights).encode())
            for index in self._mine:
                encoded = await asyncio.shield(self._averaged[index])
                message = _Data(code=averaging_pb2.AVERAGED_PART, tensor_part=runtime_pb2.Tensor(buffer=encoded))
                yield message
            await asyncio.sleep(LINGER)
        except AllReduceError as error:
            yield _Data(
                code=averaging_pb2.CANCELLED, peer_id=error.culprit.encode(), group_id=error.reason.encode()[:200]
            )
            await asyncio.sleep(LINGER)
        finally:
            if not receiving.done():  # the member closed its stream before it had sent all
                receiving.cancel()
                self.fail(AllReduceError(sender, "its connection broke"))

    async def _wait_for_all(self) -> None:
        await self._all_here.wait()
        if self.failure is not None:
            raise self.failure

    async def _receive(self, sender: str, weight: float, stream: AsyncIterator[Any]) -> None:
        try:
            if not (math.isfinite(weight) and 0 <= weight <= MAX_WEIGHT):
                raise CodecError("a weight that is none")
            self._arrive(sender, weight)
            if weight > 0:
                for index in self._mine:
                    message = await asyncio.wait_for(anext(stream), STALL)
                    self._add(index, decode(message.tensor_part.buffer, self._layout.parts[index]) * weight)
        except TimeoutError:
            self.fail(AllReduceError(sender, f"it sent nothing for {STALL:.0f} s"))
        except StopAsyncIteration:
            self.fail(AllReduceError(sender, "its parts ended too soon"))
        except CodecError as error:
            self.fail(AllReduceError(sender, f"it sent {error}"))

    def _arrive(self, sender: str, weight: float) -> None:
        self.weights[sender] = weight
        if len(self.weights) == len(self.group.members):
            if sum(self.weights.values()) <= 0:
                self.fail(AllReduceError(self._me, "nobody in the group has samples"))
                return
            self._all_here.set()
            for index in self._mine:
                self._finish_if_complete(index)

    def _add(self, index: int, sums: torch.Tensor) -> None:
        if index in self._sums:
            self._sums[index] += sums
        else:
            self._sums[index] = sums.clone()
        self._counts[index] += 1
        self._finish_if_complete(index)

    def _finish_if_complete(self, index: int) -> None:
        senders = sum(weight > 0 for weight in self.weights.values())
        future = self._averaged[index]
        if not self._all_here.is_set() or self._counts[index] < senders or future.done():
            return
        total, part = sum(self.weights.values()), self._layout.parts[index]
        sums = self._sums.pop(index)
        if index in self._old_errors:
            sums += self._old_errors[index]
        average = sums / total
        try:
            encoded, decoded = encode(average, part)
        except CodecError as error:
            self.fail(AllReduceError(self._me, str(error)))
            return
        self.errors[index] = (average - decoded) * total
        self.results[index] = encoded
        future.set_result(encoded)

    def fail(self, error: AllReduceError) -> None:
        """What is not averaged yet never will be."""
        if all(future.done() for future in self._averaged.values()):
            return  # this reducer has done its work
        self.failure = self.failure or error
        self._all_here.set()
        for future in self._averaged.values():
            if not future.done():
                future.set_exception(self.failure)
                future.exception()  # it is read by whoever waits; if nobody does, asyncio must not complain
