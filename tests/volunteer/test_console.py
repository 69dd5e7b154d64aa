"""The lines that a volunteer reads where there is no terminal."""

import io
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from kantha.spec import ScheduleState
from kantha.swarm.membership import Announcement, RunKey, Trust
from kantha.swarm.reports import FailedRound, Roster
from kantha.swarm.rounds import Phase
from kantha.swarm.rounds_engine import RoundResult
from kantha.training import Gradients
from kantha.volunteer.console import VolunteerConsole
from kantha.volunteer.folders import PeerFolder
from kantha.volunteer.membership import News
from kantha.volunteer.session import Session

RUN = "0f" * 32


@pytest.fixture
def engine() -> SimpleNamespace:
    """What session and console ask of an engine."""
    return SimpleNamespace(
        round=7,
        phase=Phase.COMPUTING,
        target=100,
        progress=lambda: (40.0, 3.0),
        samples_per_second=1.5,
        roster=Roster(),
        failures=deque[FailedRound](maxlen=8),
        schedule_state=ScheduleState(),
    )


def lines(engine: SimpleNamespace, session: Session, *ticks: bool, news: News | None = None) -> list[str]:
    said = io.StringIO()
    screen = VolunteerConsole(
        "tiny",
        "http://127.0.0.1:1",
        "Asha",
        session,
        engine,  # type: ignore[arg-type]
        news or News(Trust(RUN, "0f" * 32), PeerFolder(RUN, "Asha")),
        Console(file=said, width=400),
        threading.Event(),
    )
    for round_ended in ticks:
        screen.tick(round_ended)
    return said.getvalue().splitlines()


def test_a_failed_round_is_told_once_and_cannot_play_with_the_terminal(engine: SimpleNamespace) -> None:
    """Its reason may be the word of another peer."""
    engine.failures.append(FailedRound(round=8, reason="\x1b[2J[bold]gone\nround 9: all is well"))
    told = lines(engine, Session("CPU", engine), False, False)  # type: ignore[arg-type]
    assert told == [
        "round 8 failed (?[2J[bold]gone?round 9: all is well); it is tried again, and nothing is lost",
    ]


def test_a_round_that_ended_is_a_line(engine: SimpleNamespace) -> None:
    session = Session("CPU", engine)  # type: ignore[arg-type]
    session.computed(Gradients([], 10, 5.0, 0.5, 300, 1e9), seconds=9.9, waited=0.1)
    session.ended(RoundResult(round=8, lineage="x", samples=10, peers=3, lost=0))
    assert lines(engine, session, True) == [
        "round 8: 10 samples of mine, loss 5.500, 3 peers (10 samples so far, 1.0 samples/s, 30 tokens/s, "
        "computing 99% of the time, swarm 3.0 samples/s)"
    ]


def test_an_announcement_is_told_once_also_when_the_program_starts_again(
    engine: SimpleNamespace, tmp_path: Path
) -> None:
    key, now = RunKey.generate(tmp_path / "run.pem"), int(time.time())
    trust, session = Trust(RUN, key.public_key), Session("CPU", engine)  # type: ignore[arg-type]
    folder = PeerFolder(RUN, "Asha")
    name = Announcement(id=1, text="[bold]Vote for the name[/bold] until Friday: /name", time=now, until=now + 60)
    meeting = Announcement(id=2, text="আজ রাত আটটায় সভা", time=now, until=now + 60)
    over = Announcement(id=3, text="Yesterday's", time=now - 99, until=now - 1)
    notice = key.notify(RUN, {}, announcements=[name, over])
    trust.take(notice.model_dump_json())
    [told] = lines(engine, session, False, False, news=News(trust, folder))
    assert "[bold]Vote for the name[/bold] until Friday: /name" in told
    assert "moderators" in told
    trust.take(key.notify(RUN, {}, after=notice.number, announcements=[name, meeting]).model_dump_json())
    [told] = lines(engine, session, False, news=News(trust, folder))  # another program, in the same folder
    assert "আজ রাত আটটায় সভা" in told
    (folder.path / "announced.json").write_text("{", encoding="utf-8")
    assert len(lines(engine, session, False, news=News(trust, folder))) == 2, (
        "a damaged note costs a repetition, no more"
    )


def test_a_pause_is_the_next_event(engine: SimpleNamespace) -> None:
    session = Session("CPU", engine)  # type: ignore[arg-type]
    session.paused = "the text is being mended"
    assert (session.state, session.speed) == ("paused", 0.0)
    assert "the text is being mended" in session.next_event()
