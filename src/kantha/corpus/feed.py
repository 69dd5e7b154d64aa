"""Batches made ahead by a thread, so that the device never waits for text."""

import contextlib
import queue
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from kantha.corpus.examples import Batch, ExampleStream

_LOOK = 0.2  # seconds between two looks whether to stop


class Feed:
    """A context manager: the batches of a stream, some of them made before they are asked for."""

    def __init__(self, stream: ExampleStream, size: int, ahead: int = 16) -> None:
        """
        :param size: examples of a batch; it may be set anew, for the batches that are made from then on
        :param ahead: batches that are made before they are asked for, at most
        """
        self.state: Mapping[str, Any] = stream.state()  # after the batch that was taken last
        self.size = size
        self._stream = stream
        self._made: queue.Queue[tuple[Batch, Mapping[str, Any]] | Exception] = queue.Queue(ahead)
        self._next: tuple[Batch, Mapping[str, Any]] | Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._make, name="feed", daemon=True)

    def __enter__(self) -> "Feed":
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=10.0)  # a download may take longer; the thread ends with the program then

    def wait(self, seconds: float) -> bool:
        """Whether there is a batch to take, or an error to raise, at most so many seconds later."""
        if self._next is None:
            with contextlib.suppress(queue.Empty):
                self._next = self._made.get(timeout=seconds)
        return self._next is not None

    def next_batch(self) -> Batch:
        """Waits as long as the source takes. Raises what `ExampleStream.next_batch` does; the feed is over then."""
        made, self._next = self._next or self._made.get(), None
        if isinstance(made, Exception):
            raise made
        batch, self.state = made
        return batch

    def _make(self) -> None:
        made: tuple[Batch, Mapping[str, Any]] | Exception
        while not self._stop.is_set():
            try:
                made = (self._stream.next_batch(self.size), self._stream.state())
            except Exception as error:  # noqa: BLE001  raised again by `next_batch`, in the thread that asks
                made = error
            while not self._stop.is_set():
                try:
                    self._made.put(made, timeout=_LOOK)
                    break
                except queue.Full:
                    continue
            if isinstance(made, Exception):
                return
