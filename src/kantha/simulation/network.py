"""A virtual clock and a virtual network: events in a heap, hosts that crash and freeze, links with a speed and a delay.

Nothing here sleeps. A coroutine of a host goes on when what it awaits has happened; that of a crashed host never does,
and that of a frozen one (as after SIGSTOP) only when its host thaws. Equal seeds give equal runs.
"""

import heapq
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Generic, TypeVar

T = TypeVar("T")

REFUSED = 0.3  # seconds until a call to a machine whose program has ended fails, at most
PIECES = 8  # that a long transfer is cut into, so that others get their share of a link


class Loop:
    """Events by time; `now` is the true time, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None], Host | None]] = []
        self._count = 0

    def at(self, when: float, action: Callable[[], None], host: "Host | None" = None) -> None:
        """Run `action` at `when`; one that belongs to a host dies with it, and waits while it is frozen."""
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, action, host))

    def run(self, until: float) -> None:
        while self._heap and self._heap[0][0] <= until:
            when, _, action, host = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            if host is None:
                action()
            elif host.frozen:
                host.backlog.append(action)
            elif host.alive:
                action()
        self.now = until


class Future(Generic[T]):
    """A value that a coroutine can await."""

    __slots__ = ("_value", "_waiting", "done")

    def __init__(self) -> None:
        self.done = False
        self._value: T | None = None
        self._waiting: list[Callable[[], None]] = []

    @property
    def value(self) -> T | None:
        """What it is, once it is done."""
        return self._value

    def set(self, value: T) -> None:
        if not self.done:
            self.done, self._value = True, value
            for wake in self._waiting:
                wake()

    def then(self, wake: Callable[[], None]) -> None:
        if self.done:
            wake()
        else:
            self._waiting.append(wake)

    def __await__(self) -> "Generator[Future[T], None, T]":
        if not self.done:
            yield self
        return self._value  # type: ignore[return-value]


@dataclass(eq=False)
class Host:
    """One program on one machine. After a crash a new one takes its place."""

    name: str
    up: float = 1e7  # bytes a second
    down: float = 1e7
    latency: float = 0.03  # seconds to the middle of the internet
    alive: bool = True
    frozen: bool = False
    cut: bool = False  # no link
    slow: bool = False  # its link has a tenth of its speed, for a while
    side: int = 0  # of a partition
    up_free: float = 0.0  # when what is queued on the link has left it
    down_free: float = 0.0
    sent: float = 0.0  # bytes
    received: float = 0.0
    backlog: list[Callable[[], None]] = field(default_factory=list)


class Network:
    """Who reaches whom, and how long it takes."""

    def __init__(self, loop: Loop, random: Random) -> None:
        self.loop = loop
        self.loss = 0.0  # share of messages that are lost, so that a call ends by its timeout
        self._random = random

    def connected(self, a: Host, b: Host) -> bool:
        return not a.cut and not b.cut and a.side == b.side

    def flows(self, source: Host, target: Host) -> bool:
        """Whether bytes that `source` has to send get through now."""
        return source.alive and not source.frozen and self.connected(source, target)

    def start(self, host: Host, begin: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine of a host, from the next event on."""
        task: Coroutine[Any, Any, None] | None = None

        def step() -> None:
            nonlocal task
            if task is None:
                task = begin()
            try:
                awaited = task.send(None)
            except StopIteration:
                return
            awaited.then(lambda: self.loop.at(self.loop.now, step, host))

        self.loop.at(self.loop.now, step, host)

    def sleep(self, host: Host, seconds: float) -> Future[None]:
        future: Future[None] = Future()
        self.loop.at(self.loop.now + seconds, lambda: future.set(None), host)
        return future

    def within(self, host: Host, future: Future[Any], seconds: float) -> Future[None]:
        """Done when `future` is, or after `seconds`."""
        either: Future[None] = Future()
        future.then(lambda: either.set(None))
        self.loop.at(self.loop.now + seconds, lambda: either.set(None), host)
        return either

    def call(
        self, source: Host, target: Host | None, answer: Callable[[], T], timeout: float = 5.0
    ) -> Future[T | None]:
        """Ask `target`, which runs `answer`; None: the call failed, and nobody knows whether `answer` has run."""
        reply: Future[T | None] = Future()
        now = self.loop.now
        if target is None or not target.alive:
            wait = timeout if target is None or target.cut or source.cut else self._random.uniform(0.05, REFUSED)
            self.loop.at(now + min(wait, timeout), lambda: reply.set(None), source)
            return reply
        self.loop.at(now + timeout, lambda: reply.set(None), source)
        if not self.connected(source, target) or self._lost():
            return reply
        delay = source.latency + target.latency

        def arrive() -> None:
            result = answer()
            if self.connected(source, target) and not self._lost():
                self.loop.at(self.loop.now + delay, lambda: reply.set(result), source)

        self.loop.at(now + delay * self._random.uniform(0.8, 1.5), arrive, target)
        return reply

    def tell(self, source: Host, target: Host, action: Callable[[], None]) -> None:
        """A message on a connection that is open. It waits some seconds for a link that is cut; a lost one breaks the
        connection, and nobody hears of it."""
        if self._lost():
            return
        self._deliver(source, target, action, self.loop.now + (source.latency + target.latency), patience=10.0)

    def transfer(self, source: Host, target: Host, size: float) -> Future[bool]:
        """Send `size` bytes; True when `target` has them, False when the connection broke.

        Links serve one transfer after the other: with long ones in pieces that is near enough to a fair share.
        """
        done: Future[bool] = Future()
        if not target.alive:
            return done
        now, delay = self.loop.now, source.latency + target.latency
        begin = max(now, source.up_free)
        source.up_free = begin + size / source.up
        arrived = max(source.up_free + delay, max(begin + delay, target.down_free) + size / target.down)
        target.down_free = max(target.down_free, arrived - delay)
        broken = self._lost()

        def sent() -> None:
            source.sent += size
            when = max(arrived, self.loop.now)
            self._deliver(source, target, received, when, patience=15.0, failed=lambda: end(False))

        def received() -> None:
            target.received += size
            end(not broken)

        def end(whole: bool) -> None:
            done.set(whole)

        self.loop.at(arrived - delay, sent, source)
        return done

    async def download(self, target: Host, source: Host, size: float, stalled: float = 10.0) -> bool:
        """Fetch `size` bytes in pieces; False when none came for `stalled` seconds, or the other program ended."""
        for _ in range(PIECES):
            piece = self.transfer(source, target, size / PIECES)
            silent_since = self.loop.now
            while not piece.done:
                await self.within(target, piece, 1.0)
                if not source.alive:
                    return False
                if self.flows(source, target):
                    silent_since = self.loop.now
                elif self.loop.now - silent_since > stalled:
                    return False
            if not await piece:
                return False
        return True

    def _lost(self) -> bool:
        return self.loss > 0 and self._random.random() < self.loss

    def _deliver(
        self,
        source: Host,
        target: Host,
        action: Callable[[], None],
        when: float,
        patience: float,
        failed: Callable[[], None] | None = None,
    ) -> None:
        until = when + patience

        def arrive() -> None:
            if self.connected(source, target):
                action()
            elif self.loop.now < until:
                self.loop.at(self.loop.now + 0.5, arrive, target)
            elif failed is not None:
                failed()

        self.loop.at(when, arrive, target)
