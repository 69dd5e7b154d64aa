"""Tells a chat that somebody asks to join, and milestones: Discord, Slack, Telegram, mail, … through Apprise.

Its addresses contain secrets: they come from the environment or a file that only the organizer reads, and are said
nowhere.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kantha.errors import RunDirectoryError

ADDRESSES = "KANTHA_NOTIFY"
ADDRESSES_FILE = "notify.txt"
_GATHER_SECONDS = 30.0  # that news are gathered for one message
_JOIN_SECONDS = 10.0
_MOST_NAMES = 20  # in one message


@dataclass(frozen=True)
class _Request:
    """To join."""

    username: str


_News = _Request | str  # or a milestone, in a sentence


class Notifier:
    """Sends from a thread of its own, once it is started. Without addresses it does nothing."""

    def __init__(
        self, keys: Path, address: str, run: str, say: Callable[[str], None], gather: float = _GATHER_SECONDS
    ) -> None:
        """
        :param keys: the run's folder of secrets; its notify.txt has an address a line
        :param address: of the run's page, without a slash at its end
        :param run: its name
        :param gather: seconds that news are gathered for one message
        :raises RunDirectoryError: when that file cannot be used
        """
        self._addresses = [*os.environ.get(ADDRESSES, "").split(), *_addresses(keys / ADDRESSES_FILE)]
        self._address, self._run, self._say, self._gather = address, run, say, gather
        self._waiting: queue.SimpleQueue[_News | None] = queue.SimpleQueue()  # None: there is no more
        self._stop = threading.Event()
        self._said_failure = False
        # a daemon: a second Ctrl-C must end the program even while a chat does not answer
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)

    def start(self) -> None:
        """After the swarm's processes were forked."""
        if self._addresses:
            self._thread.start()

    def tell(self, username: str) -> None:
        """Somebody asks to join; returns at once."""
        if self._addresses:
            self._waiting.put(_Request(username))

    def announce(self, sentence: str) -> None:
        """A milestone was reached; returns at once."""
        if self._addresses:
            self._waiting.put(sentence)

    def close(self) -> None:
        """What waits is sent now."""
        self._stop.set()
        self._waiting.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=_JOIN_SECONDS)

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            self._stop.wait(self._gather)
            news: list[_News | None] = [first]
            while news[-1] is not None and not self._waiting.empty():
                news.append(self._waiting.get())
            for title, body in self._messages(news):
                reason = self._send(title, body)
                if reason and not self._said_failure:
                    self._say(f"a chat could not be told the news ({reason}); look at {ADDRESSES}")
                self._said_failure = bool(reason)
            if news[-1] is None:
                return

    def _messages(self, news: list[_News | None]) -> Iterator[tuple[str, str]]:
        """Title and text of each."""
        names = [each.username for each in news if isinstance(each, _Request)]
        if names:
            who = ", ".join(names[:_MOST_NAMES]) + (" …" if len(names) > _MOST_NAMES else "")
            asks = "asks" if len(names) == 1 else "ask"
            yield (
                f"{self._run}: {len(names)} {asks} to join",
                f"{who} {asks} to join {self._run}. Decide at {self._address}/desk",
            )
        sentences = [each for each in news if isinstance(each, str)]
        if sentences:
            yield f"{self._run}: {sentences[-1]}", "\n".join([*sentences, self._address])

    def _send(self, title: str, body: str) -> str:
        """Returns what went wrong, without the addresses."""
        from apprise import Apprise, AppriseAsset  # takes half a second, and few runs use it

        log = logging.getLogger("apprise")  # which tells addresses
        log.propagate, log.handlers, log.disabled = False, [logging.NullHandler()], True
        began = time.monotonic()
        failed = 0
        for address in self._addresses:
            chat = Apprise(asset=AppriseAsset(app_id="Kantha", app_desc="Kantha", async_mode=False))
            try:
                failed += not (chat.add(address) and chat.notify(title=title, body=body))
            except Exception:  # noqa: BLE001  a hundred services, each with errors of its own, whose words hold addresses
                failed += 1
        return (
            f"{failed} of {len(self._addresses)} addresses failed after {time.monotonic() - began:.0f} s"
            if failed
            else ""
        )


def _addresses(path: Path) -> list[str]:
    """One a line; empty lines and lines that begin with # are no matter."""
    try:
        if path.stat().st_mode & 0o077:
            raise RunDirectoryError(f"{path}: others can read it, and it has secrets; `chmod 600 {path}`")
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path}: cannot be read ({type(error).__name__}); make it a text file") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
