"""What a volunteer sees: a live panel in a terminal, plain lines elsewhere."""

import threading
import time
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from kantha.errors import printable
from kantha.swarm.reports import FailedRound
from kantha.swarm.rounds_engine import RoundsEngine
from kantha.volunteer.membership import News
from kantha.volunteer.session import Session

_PLAIN_SECONDS = 30.0  # between two plain lines while no round ends


class VolunteerConsole:
    """A context manager around the training loop."""

    def __init__(
        self,
        run_name: str,
        url: str,
        username: str,
        session: Session,
        engine: RoundsEngine,
        news: News,
        console: Console,
        stop: threading.Event,
    ) -> None:
        self._title = run_name
        self._url = url
        self._username = username
        self._session = session
        self._engine = engine
        self._news = news
        self._console = console
        self._stop = stop
        self._waits_for = ""
        self._said = time.monotonic()
        self._failed: list[FailedRound] = []  # that were told
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "VolunteerConsole":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def tick(self, round_ended: bool, waits_for: str = "") -> None:
        """Called after every batch; prints a line where there is no live panel and there is something to say.

        :param waits_for: what is missing to compute on
        """
        self._waits_for = waits_for
        session = self._session
        for announcement in self._news.fresh():
            when = time.strftime("%H:%M", time.localtime(announcement.time))
            self.say(f"📢 {printable(announcement.text)} (the moderators, {when})")
        for failed in [failed for failed in list(self._engine.failures) if failed not in self._failed]:
            self._failed.append(failed)
            reason = printable(failed.reason)  # it may have been a stranger's word
            self.say(f"round {failed.round} failed ({reason}); it is tried again, and nothing is lost")
        if round_ended and (result := session.last_round) is not None and not self._console.is_terminal:
            with_whom = "alone" if result.peers == 1 else f"{result.peers} peers"
            loss = f", loss {session.loss:.3f}" if session.loss is not None else ""
            self.say(
                f"round {result.round}: {result.samples} samples of mine{loss}, {with_whom} "
                f"({session.counted} samples so far{session.pace}, swarm {self._engine.progress()[1]:.1f} samples/s)"
            )
        elif not self._console.is_terminal and time.monotonic() - self._said > _PLAIN_SECONDS:
            self.say(f"{session.state}: {self._next_event()}")

    def _next_event(self) -> str:
        waiting = f"waiting for {self._waits_for}; " if self._waits_for else ""
        return waiting + self._session.next_event()

    def say(self, line: str) -> None:
        """Print a line, above the live panel where there is one."""
        self._said = time.monotonic()
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> RenderableType:
        session, (samples, speed), target = self._session, self._engine.progress(), self._engine.target
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", justify="right")
        facts.add_column()
        facts.add_row("round", str(session.round))
        facts.add_row("my samples", f"{session.counted + session.samples}  ({session.samples} not in a round yet)")
        facts.add_row("my speed", f"{session.speed:.1f} samples/s, {session.tokens_per_second:.0f} tokens/s")
        used = session.utilisation
        facts.add_row("device", session.device if used is None else f"{session.device}, {used:.0%} of its peak")
        facts.add_row("swarm", f"{session.peers} volunteer{'s' * (session.peers != 1)}, {speed:.1f} samples/s")
        share = session.computing_share
        facts.add_row("computing", "–" if share is None else f"{share:.0%} of the time")
        facts.add_row("loss", "–" if session.loss is None else f"{session.loss:.3f}")
        if not session.coordinator_here:
            facts.add_row("", "the coordinator does not answer; training goes on without it")
        leaving = "leaving, once this is done: " if self._stop.is_set() else ""
        facts.add_row("next", leaving + self._next_event())
        facts.add_row("this round", ProgressBar(total=target, completed=min(samples, target), width=40))
        facts.add_row("", f"{samples:.0f} of {target} samples")
        facts.add_row("page", escape(self._url))
        facts.add_row("", "Ctrl-C leaves")
        return Panel(facts, title=escape(f"{self._title} · {self._username}"), expand=False)


def download_progress(console: Console) -> Progress:
    """A bar for a download; draws nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def state_progress(console: Console) -> Progress:
    """A bar for the pieces of the swarm's state; draws nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
