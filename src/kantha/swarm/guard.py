"""The door of a peer: no call of another peer is answered, and none is made, without membership on both sides.

libp2p proves to both ends of a connection which key the other one holds: its peer id. What is left to know is whether
that peer is a member. So before its first call to a peer, and every half minute from then on, a peer greets it: both
show their certificates, and the newest notice that they know, so that what the organizer revokes spreads from peer to
peer. Whoever has not greeted is refused before its call is looked at, whatever the call is.

hivemind gives every process that talks to peers (its DHT's, and the averager) a `P2P` object of its own. Ours goes
between, so that it covers all calls that hivemind has or will have.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar

from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PContext, P2PHandlerError, PeerID
from hivemind.proto.p2pd_pb2 import RPCError  # an answer that hivemind raises as an error at the caller
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kantha.errors import MembershipError
from kantha.swarm.membership import MOST_CERTIFICATE, MOST_NOTICE, Certificate, Membership, Trust

GREETING = 30.0  # seconds after which a peer that is called is greeted again
_ANSWER = 5.0  # seconds for the answer to a greeting
_RECHECK = 60.0  # seconds after which a certificate that was good is checked again
_LINGER = 0.25  # seconds that a stream stays open after its last message: p2pd resets it when it is closed
_MOST_MESSAGE = 16 * 2**20  # bytes of one message in a stream
_STRANGER = "not greeted"  # in a refusal: show your certificate, and ask again
_log = logging.getLogger(__name__)
answers_a_peer: ContextVar[bool] = ContextVar("answers_a_peer", default=False)


class _Greeting(BaseModel):
    model_config = ConfigDict(extra="forbid")
    certificate: Certificate
    notice: str = Field("", max_length=MOST_NOTICE)


class Guard:
    """What one process knows of who is a member, this peer included. Every process of a peer has its own copy."""

    def __init__(self, trust: Trust, certificate: Certificate) -> None:
        """
        :param certificate: this peer's own
        :raises MembershipError: when it is not good, as other peers would find
        """
        self.trust = trust
        trust.verify(certificate, certificate.membership.peer_id)
        self.certificate = certificate
        # who greeted: its certificate, the notice that it was checked against, and when, time.time()
        self._members: dict[str, tuple[Certificate, int, float]] = {}

    @property
    def peer_id(self) -> str:
        return self.certificate.membership.peer_id

    def show(self) -> bytes:
        """A greeting of this peer."""
        return _Greeting(certificate=self.certificate, notice=self.trust.notice).model_dump_json().encode()

    def meet(self, peer_id: str, greeting: bytes) -> None:
        """Take in a greeting. Raises `MembershipError` where the peer is no member."""
        if len(greeting) > MOST_CERTIFICATE + 2 * MOST_NOTICE:
            raise MembershipError("the greeting is too long")
        try:
            said = _Greeting.model_validate_json(greeting)
        except ValidationError:
            raise MembershipError("the greeting is damaged") from None
        if said.notice:
            self.trust.take(said.notice)  # first: the peer's certificate may be by a key that only this notice names
        self.trust.verify(said.certificate, peer_id)
        self._members[peer_id] = (said.certificate, self.trust.number, time.time())

    def check(self, peer_id: str) -> None:
        """Raises `MembershipError` unless the peer greeted, and its certificate is still good."""
        known = self._members.get(peer_id)
        if known is None:
            raise MembershipError(_STRANGER)
        certificate, number, checked = known
        if number == self.trust.number and 0 <= time.time() - checked < _RECHECK:
            return
        try:
            self.trust.verify(certificate, peer_id)
        except MembershipError:
            del self._members[peer_id]
            raise
        self._members[peer_id] = (certificate, self.trust.number, time.time())

    def read(self, certificate: str, peer_id: str) -> Membership:
        """The membership that a record in the DHT shows. Raises `MembershipError` where it is none of this peer's."""
        try:
            shown = Certificate.model_validate_json(certificate) if len(certificate) <= MOST_CERTIFICATE else None
        except ValidationError:
            shown = None
        if shown is None:
            raise MembershipError("the record shows no membership certificate")
        known = self._members.get(peer_id)
        if known is None or known[0] != shown:
            return self.trust.verify(shown, peer_id)
        self.check(peer_id)
        return shown.membership


class _GuardedP2P(P2P):
    """hivemind's P2P with the guard before every call, in and out. The names with an underscore are hivemind's."""

    guard: ClassVar[Guard]
    greeting: ClassVar[str]  # name of the call that greets this process

    def __init__(self) -> None:
        super().__init__()
        self._greeted: dict[PeerID, float] = {}  # when a peer was greeted last, time.monotonic()
        self._greetings: dict[PeerID, asyncio.Task[None]] = {}  # under way

    @classmethod
    async def create(cls, *args: Any, **kwargs: Any) -> "_GuardedP2P":
        return await cls._open(await super().create(*args, **kwargs))

    @classmethod
    async def replicate(cls, daemon_listen_maddr: Any) -> "_GuardedP2P":
        return await cls._open(await super().replicate(daemon_listen_maddr))

    @staticmethod
    async def _open(self: Any) -> "_GuardedP2P":
        await self._client.add_unary_handler(self.greeting, self._be_greeted)
        return self

    # ---- greetings

    async def _be_greeted(self, greeting: bytes, peer: PeerID) -> bytes:
        self.guard.meet(str(peer), greeting)
        return self.guard.show()

    async def _greet(self, peer: PeerID) -> None:
        """Unless it was just done. Raises what the call raises, and `MembershipError` where the peer is no member."""
        if time.monotonic() - self._greeted.get(peer, -GREETING) < GREETING:
            self.guard.check(str(peer))
            return
        task = self._greetings.get(peer)
        if task is None:
            task = self._greetings[peer] = asyncio.create_task(self._exchange(peer))
            task.add_done_callback(partial(self._end_greeting, peer))
        await asyncio.shield(task)  # several calls to one peer wait for one greeting

    def _end_greeting(self, peer: PeerID, task: asyncio.Task[None]) -> None:
        self._greetings.pop(peer, None)
        if not task.cancelled():
            task.exception()  # whoever still waits is told; where nobody does, asyncio would log that it was never told

    async def _exchange(self, peer: PeerID) -> None:
        answer = await asyncio.wait_for(
            self._client.call_unary_handler(peer, self.greeting, self.guard.show()), _ANSWER
        )
        self.guard.meet(str(peer), answer)
        self._greeted[peer] = time.monotonic()

    def _is_forgotten(self, peer: PeerID, error: Exception) -> bool:
        """Whether a peer does not know this one any more, as after a restart: it has to be greeted again."""
        if _STRANGER not in str(error) or peer not in self._greeted:
            return False
        self._greeted.pop(peer)
        return True

    # ---- calls out

    async def _call_unary_protobuf_handler(self, peer_id: PeerID, *call: Any) -> Any:
        await self._greet(peer_id)
        try:
            return await super()._call_unary_protobuf_handler(peer_id, *call)
        except P2PHandlerError as error:
            if not self._is_forgotten(peer_id, error):
                raise
        await self._greet(peer_id)
        return await super()._call_unary_protobuf_handler(peer_id, *call)

    async def call_binary_stream_handler(self, peer_id: PeerID, handler_name: str) -> Any:
        await self._greet(peer_id)
        return await super().call_binary_stream_handler(peer_id, handler_name)

    async def iterate_protobuf_handler(self, peer_id: PeerID, name: str, input: Any, output_type: Any) -> Any:
        answers = await super().iterate_protobuf_handler(peer_id, name, input, output_type)
        return self._answers(answers, peer_id, name, input, output_type)

    async def _answers(self, answers: Any, peer_id: PeerID, name: str, input: Any, output_type: Any) -> Any:
        try:
            try:
                first = await anext(answers)
            except P2PHandlerError as error:
                # what was streamed to it is gone; only what is at hand can be asked again
                if not self._is_forgotten(peer_id, error) or isinstance(input, AsyncIterable):
                    raise
                answers = await super().iterate_protobuf_handler(peer_id, name, input, output_type)
                first = await anext(answers)
            except StopAsyncIteration:
                return
            yield first
            async for answer in answers:
                yield answer
        finally:
            await answers.aclose()

    # ---- calls in

    async def _add_protobuf_unary_handler(
        self, handle_name: str, handler: Callable[[Any, P2PContext], Awaitable[Any]], *args: Any, **kwargs: Any
    ) -> None:
        async def guarded(request: Any, context: P2PContext) -> Any:
            self.guard.check(str(context.remote_id))  # hivemind tells the caller what was raised
            node = getattr(request, "peer", None)  # of the DHT's calls; it looks at it in a task that nobody awaits
            if node is not None and len(node.node_id) not in (0, DHTID.HASH_NBYTES):
                raise ValueError("the id of a node has another length")
            answers_a_peer.set(True)  # hivemind makes a task, so a context, of every call
            return await handler(request, context)

        await super()._add_protobuf_unary_handler(handle_name, guarded, *args, **kwargs)

    async def _add_protobuf_stream_handler(self, name: str, handler: Any, *args: Any, **kwargs: Any) -> None:
        async def told(requests: Any, context: P2PContext) -> AsyncIterator[Any]:
            try:
                async for answer in handler(requests, context):
                    yield answer
            except Exception as error:  # noqa: BLE001  whatever a peer's call caused, it is told, and that is all
                _log.warning("a call of %s failed: %s: %r", str(context.remote_id)[-6:], name, error)
                yield RPCError(message=repr(error)[:200])

        await super()._add_protobuf_stream_handler(name, told, *args, **kwargs)

    async def add_binary_stream_handler(self, name: str, handler: Any, balanced: bool = False) -> None:
        async def guarded(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                self.guard.check(str(info.peer_id))
            except MembershipError as error:
                with contextlib.closing(writer), contextlib.suppress(OSError):
                    await P2P.send_protobuf(RPCError(message=repr(error)), writer)
                    await asyncio.sleep(_LINGER)
                return
            await handler(info, _BoundedReader(reader), writer)

        await super().add_binary_stream_handler(name, guarded, balanced)


class _BoundedReader:
    """A peer says how long its message is, and hivemind reads that much into memory: not more than any good one has."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader

    async def readexactly(self, count: int) -> bytes:
        if count > _MOST_MESSAGE:
            raise asyncio.IncompleteReadError(b"", count)  # hivemind takes that for the end of the connection
        return await self._reader.readexactly(count)


def guarded_p2p(guard: Guard, greeting: str) -> type[P2P]:
    """hivemind's P2P for one process of this peer.

    :param greeting: name of the call that greets this process, the same in all peers
    """
    return type("GuardedP2P", (_GuardedP2P,), {"guard": guard, "greeting": greeting})
