"""Milestones of made-up ledgers, in a real database."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from kantha.coordinator import milestones as module
from kantha.coordinator.contributions import PeerDay, Round, Tally, Totals, day_number
from kantha.coordinator.database import Database, Table
from kantha.coordinator.ledger import Ledger, Member
from kantha.coordinator.milestones import Milestone, Milestones
from kantha.coordinator.status import HeldoutStatus
from kantha.errors import StorageError
from kantha.spec import ScheduleState

START = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
DAY = 86_400.0


@dataclass
class Poll:
    slug: str
    title: str
    opens: float
    closes: float


class Books:
    """A ledger whose round N ended N minutes after the start."""

    def __init__(self, path: Path) -> None:
        database = Database(path)
        database.migrate()
        with database.session() as session:  # also those that have no migration yet
            Table.metadata.create_all(session.connection())
        self.ledger = Ledger(database)
        self._samples: list[int] = []
        self._people = 0

    def add_rounds(self, *samples: int) -> None:
        with self.ledger.database.session() as session:
            for count in samples:
                self._samples.append(count)
                number = len(self._samples)
                session.add(_row(Round, round=number, samples=count, finished=START + 60 * number))
            totals = session.scalars(select(Totals)).one()
            totals.samples, totals.rounds = sum(self._samples), len(self._samples)

    def add_heldout(self, losses: dict[int, float]) -> None:
        for number, loss in losses.items():
            scores = {"mlm_accuracy": 0.1, "sop_loss": 0.0, "sop_accuracy": 0.5, "masked": 1, "pairs": 1}
            self.ledger.add_heldout(HeldoutStatus(round=number, loss=loss, mlm_loss=loss, **scores))

    def add_people(self, *days: date) -> None:
        """New ones who had 5 samples on such a day each."""
        with self.ledger.database.session() as session:
            for day in days:
                self._people += 1
                peer = f"peer {self._people}"
                member = {"username": peer, "service": "local", "joined": 0.0, "expires": 0}
                session.add(Member(peer_id=peer, person=self._people, **member))
                session.add(_row(Tally, peer_id=peer, samples=5))
                session.add(_row(PeerDay, peer_id=peer, day=day_number(day), samples=5))

    def add_day(self, day: date, *samples: int) -> None:
        """Of people whom the ledger has not counted."""
        with self.ledger.database.session() as session:
            for number, count in enumerate(samples):
                session.add(_row(PeerDay, peer_id=f"other {number}", day=day_number(day), samples=count))


def _row(table: type[Table], **values: object) -> Table:
    """With 0 in all other columns that need something."""
    columns = table.__table__.columns
    return table(**{column.name: 0 for column in columns if not column.nullable} | values)


@dataclass
class Looker:
    """The milestones of one ledger, and what was told."""

    books: Books
    goal: int | None = None
    now: float = START + 3600
    told: list[str] = field(default_factory=list)
    polls: tuple[Poll, ...] = ()

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.milestones = Milestones(
            self.books.ledger, self.goal, self.told.append, lambda: self.polls, lambda: self.now
        )

    def look(self, schedule: ScheduleState | None = None) -> list[str]:
        """Returns what is new, in the order in which it was told."""
        before = len(self.told)
        self.milestones.look(schedule or ScheduleState())
        return self.told[before:]

    def key(self, key: str) -> Milestone:
        return next(each for each in self.milestones.newest(100) if each.key == key)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", -1.0)


@pytest.fixture
def looker(tmp_path: Path) -> Iterator[Looker]:
    books = Books(tmp_path / "ledger.sqlite")
    yield Looker(books)
    books.ledger.close()


def test_samples_and_rounds_are_told_once_with_the_round_that_reached_them(looker: Looker) -> None:
    assert looker.look() == []
    looker.books.add_rounds(400)
    assert looker.look() == ["The first round is finished: the model has begun to learn."]
    looker.books.add_rounds(500, 200)
    assert looker.look() == ["The model has seen 1,000 samples."]
    reached = looker.key("samples 1000")
    assert (reached.round, reached.time) == (3, START + 180)
    looker.books.add_rounds(200_000)
    assert looker.look() == ["The model has seen 10,000 samples.", "The model has seen 100,000 samples."]
    assert looker.look() == []
    looker.restart()
    assert looker.look() == []


def test_parts_of_the_goal_are_told(looker: Looker) -> None:
    looker.goal = 399
    looker.restart()
    looker.books.add_rounds(3)
    assert len(looker.look()) == 1
    looker.books.add_rounds(1, 200)
    assert looker.look() == [f"{percent} % of the goal is reached." for percent in (1, 10, 25, 50)]
    assert looker.key("goal 1").round == 2
    looker.books.add_rounds(195)
    assert looker.look() == ["75 % of the goal is reached.", "100 % of the goal is reached."]


def test_the_heldout_loss_is_told_where_it_falls_below_a_whole_number(looker: Looker) -> None:
    looker.books.add_heldout({0: 10.97})
    assert looker.look() == []
    looker.books.add_heldout({5: 10.0})
    assert looker.look() == []
    looker.books.add_rounds(*[1] * 10)
    looker.look()
    looker.books.add_heldout({10: 8.5})
    assert sorted(looker.look()) == [f"The loss on held-out text is below {loss}." for loss in (10, 9)]
    assert (looker.key("loss 9").round, looker.key("loss 9").time) == (10, START + 600)
    looker.books.add_heldout({15: float("inf"), 20: 9.5, 25: 8.9})
    assert looker.look() == []


def test_people_are_counted_when_so_many_have_helped(looker: Looker) -> None:
    today = datetime.fromtimestamp(looker.now, UTC).date()
    looker.books.add_people(*(today - timedelta(days=ago) for ago in range(19, 10, -1)))
    looker.books.add_day(today - timedelta(days=90), 5)  # somebody who left for good
    assert looker.look() == []
    looker.books.add_people(today - timedelta(days=10))
    assert looker.look() == []  # it was ten days ago
    assert looker.key("people 10").time == datetime(2026, 2, 20, tzinfo=UTC).timestamp()
    looker.books.add_people(*[today] * 90)
    assert looker.look() == ["100 people have helped so far."]
    assert looker.key("people 100").time == looker.now


def test_a_day_that_is_over_may_be_the_best_one(looker: Looker) -> None:
    first = date(2026, 2, 24)
    for day, samples in enumerate([100, 300, 200, 300, 302, 900]):
        looker.books.add_day(first + timedelta(days=day), samples // 2, samples // 2)
    looker.now = datetime(2026, 3, 1, 0, 5, tzinfo=UTC).timestamp()  # reports of the 28th may still come
    assert looker.look() == []
    looker.now += 600
    assert looker.look() == ["The best day so far: 302 samples."]
    looker.now += DAY
    assert looker.look() == ["The best day so far: 900 samples."]
    assert looker.key("record 2026-03-01").time == datetime(2026, 3, 2, tzinfo=UTC).timestamp()


def test_annealing_and_its_end_are_told_and_so_is_another_one(looker: Looker) -> None:
    looker.look(ScheduleState(samples=100, order=1, anneal_from=100, anneal_samples=1000))
    looker.look(ScheduleState(samples=100, order=2))  # taken back
    looker.look(ScheduleState(samples=300, order=3, anneal_from=300, anneal_samples=50))
    looker.look(ScheduleState(samples=350, order=3, anneal_from=300, anneal_samples=50))
    begun = "The annealing has begun: from here on the learning rate falls to zero."
    assert looker.told == [
        begun,
        begun,
        "The run is finished, its model is annealed. Thanks to everybody who helped!",
    ]


def test_polls_are_told_when_they_open_and_close(looker: Looker) -> None:
    poll = Poll("name", "Its name, \u202eএর নাম", looker.now - 10, looker.now + 100)
    looker.polls = (poll,)
    assert looker.look() == ["A poll is open: Its name, ?এর নাম"]
    looker.now += 101
    assert looker.look() == ["A poll is closed, and its result is final: Its name, ?এর নাম"]
    assert looker.look() == []


def test_a_run_that_went_on_without_milestones_gets_its_old_ones_silently(looker: Looker) -> None:
    looker.books.add_rounds(*[100] * 3000)  # for two days
    looker.now = START + 60 * 3000
    looker.look()
    assert looker.told == []
    found = {each.key: each for each in looker.milestones.newest(100)}
    assert found.keys() == {"round 1", "samples 1000", "samples 10000", "samples 100000"}
    assert found["samples 10000"].time == START + 60 * 100
    assert [each.key for each in looker.milestones.newest(2)] == ["samples 100000", "samples 10000"]


def test_what_could_not_be_entered_is_entered_and_told_later(looker: Looker, monkeypatch: pytest.MonkeyPatch) -> None:
    looker.books.add_heldout({0: 9.5, 5: 8.5})
    looker.books.add_rounds(*[1] * 5)

    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as full:
        full.setattr(Milestones, "_enter", refuse)
        with pytest.raises(StorageError):
            looker.look()
    assert looker.told == []
    assert len(looker.look()) == 2
