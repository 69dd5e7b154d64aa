"""Milestones of a run, decided from its ledger: each is entered once, and told once.

They are looked for every few seconds, all at once, from sums that the ledger keeps; what was reached is found in the
rounds themselves, so that a milestone has the round and the time at which it was reached, also in a run that was going
on before there were milestones, or while nobody looked.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import BigInteger, String, func, select
from sqlalchemy.orm import Mapped, mapped_column

from kantha.coordinator.contributions import PeerDay, Round, date_of, day_of
from kantha.coordinator.database import Table
from kantha.coordinator.ledger import Ledger, Member
from kantha.coordinator.status import HeldoutStatus
from kantha.errors import StorageError, printable
from kantha.spec import ScheduleState

GOAL_PERCENTS = (1, 10, 25, 50, 75, 100)
PEOPLE = (10, 100, 1_000)
FIRST_SAMPLES = 1_000  # the first power of ten that is a milestone
DAYS_BEFORE_RECORD = 3  # days with samples before one can be the best
NEWS_SECONDS = 24 * 3600.0  # what is older is entered, and told to nobody
_LOOK_SECONDS = 5.0
_DAY_SETTLES = 600.0  # seconds after midnight, UTC, until which reports of the day before come


def N_(message: str) -> str:
    """Marks a text that is translated later, where it is shown; pybabel looks for this name."""
    return message


SENTENCES = {
    "round": N_("The first round is finished: the model has begun to learn."),
    "goal": N_("%(number)s %% of the goal is reached."),
    "samples": N_("The model has seen %(number)s samples."),
    "people": N_("%(number)s people have helped so far."),
    "loss": N_("The loss on held-out text is below %(number)s."),
    "record": N_("The best day so far: %(number)s samples."),
    "annealing": N_("The annealing has begun: from here on the learning rate falls to zero."),
    "finished": N_("The run is finished, its model is annealed. Thanks to everybody who helped!"),
    "poll opened": N_("A poll is open: %(text)s"),
    "poll closed": N_("A poll is closed, and its result is final: %(text)s"),
}
_MOST_TEXT = 200  # characters


class _Row(Table):
    __tablename__ = "milestones"
    key: Mapped[str] = mapped_column(String(100), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    number: Mapped[int] = mapped_column(BigInteger)
    text: Mapped[str] = mapped_column(String(_MOST_TEXT))
    round: Mapped[int | None]
    time: Mapped[float] = mapped_column(index=True)


@dataclass(frozen=True)
class Milestone:
    key: str  # the same for the same milestone, for ever
    kind: str  # a key of SENTENCES
    number: int
    text: str  # a poll's title
    round: int | None  # in which it was reached; None: in none
    time: float  # seconds since 1970

    def sentence(self, translate: Callable[[str], str] = str, number: Callable[[float], str] = "{:,}".format) -> str:
        """For people, in English where nothing else is asked for.

        :param number: writes numbers
        """
        return translate(SENTENCES[self.kind]) % {"number": number(self.number), "text": self.text}


class HasTimes(Protocol):
    """What is looked at of a poll; times in seconds since 1970."""

    @property
    def slug(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def opens(self) -> float: ...
    @property
    def closes(self) -> float: ...


class Milestones:
    """Those of one run. Safe to use from several threads. All methods raise `StorageError` where the disk refuses."""

    def __init__(
        self,
        ledger: Ledger,
        goal_samples: int | None,
        tell: Callable[[str], None],
        polls: Callable[[], Iterable[HasTimes]] = tuple,
        now: Callable[[], float] = time.time,
    ) -> None:
        """
        :param goal_samples: None: the run has no goal
        :param tell: told each new one in a sentence, once
        :param polls: all polls of the run
        """
        self._database, self._ledger, self._goal = ledger.database, ledger, goal_samples
        self._tell, self._polls, self._now = tell, polls, now
        self._known: set[str] | None = None  # keys
        self._look_after = -math.inf  # time.monotonic()
        self._heldout: list[HeldoutStatus] = []  # as it was looked at last
        self._days_seen = -1  # the last day that was looked at, since 1970

    def newest(self, count: int) -> list[Milestone]:
        """The newest first."""
        query = select(_Row).order_by(_Row.time.desc(), _Row.key.desc()).limit(count)
        with self._database.reading() as session:
            return [_milestone(row) for row in session.scalars(query)]

    def look(self, schedule: ScheduleState) -> None:
        """Enter what was reached since the last look, and tell it; at most every few seconds, else nothing is done.

        :param schedule: the swarm's, now
        """
        if time.monotonic() < self._look_after:
            return
        if self._known is None:
            with self._database.reading() as session:
                self._known = set(session.scalars(select(_Row.key)))
        known = self._known
        try:
            self._enter([each for each in self._reached(schedule, known) if each.key not in known], known)
        except StorageError:  # what was seen is not entered: the next look is at all of it
            self._known, self._heldout, self._days_seen = None, [], -1
            raise
        self._look_after = time.monotonic() + _LOOK_SECONDS

    def _enter(self, reached: list[Milestone], known: set[str]) -> None:
        """The transaction that enters one decides who tells it."""
        new = []
        with self._database.session() as session:
            for each in reached:
                if session.get(_Row, each.key) is None:
                    session.add(_Row(**vars(each)))
                    new.append(each)
        known.update(each.key for each in reached)
        for each in sorted(new, key=lambda each: each.time):
            if each.time > self._now() - NEWS_SECONDS:
                self._tell(each.sentence())

    def _reached(self, schedule: ScheduleState, known: set[str]) -> Iterator[Milestone]:
        """All that were reached, but perhaps those that are known."""
        now = self._now()
        totals = self._ledger.totals()
        yield from self._by_samples(totals.samples, known)
        yield from self._by_people(totals.people, known)
        if self._ledger.heldout(1) != self._heldout[-1:]:
            self._heldout = self._ledger.heldout()
            yield from self._by_loss(self._heldout, known)
        yield from self._records()
        if schedule.annealed is not None:
            yield Milestone(f"annealing {schedule.order}", "annealing", 0, "", None, now)
        if schedule.is_finished:
            yield Milestone("finished", "finished", 0, "", None, now)
        for poll in self._polls():
            for kind, when in (("poll opened", poll.opens), ("poll closed", poll.closes)):
                if when <= now:
                    yield Milestone(f"{kind} {poll.slug}", kind, 0, printable(poll.title, _MOST_TEXT), None, when)

    def _by_samples(self, samples: int, known: set[str]) -> Iterator[Milestone]:
        """The first round, powers of ten, and parts of the goal."""
        marks = [(1, "round 1", "round", 1)]
        power = FIRST_SAMPLES
        while power <= samples:
            marks.append((power, f"samples {power}", "samples", power))
            power *= 10
        for percent in GOAL_PERCENTS if self._goal else ():
            marks.append((-(-percent * (self._goal or 0) // 100), f"goal {percent}", "goal", percent))
        missing = sorted(mark for mark in marks if mark[0] <= samples and mark[1] not in known)
        if not missing:
            return
        query = select(Round.round, Round.samples, Round.finished).where(Round.samples > 0).order_by(Round.round)
        with self._database.reading() as session:
            rounds = session.execute(query).all()
        seen = 0
        for reached, count, finished in rounds:
            seen += count
            while missing and missing[0][0] <= seen:
                _, key, kind, number = missing.pop(0)
                yield Milestone(key, kind, number, "", reached, finished)

    def _by_people(self, people: int, known: set[str]) -> Iterator[Milestone]:
        missing = [count for count in PEOPLE if count <= people and f"people {count}" not in known]
        if not missing:
            return
        query = (
            select(func.min(PeerDay.day))
            .join(Member, Member.peer_id == PeerDay.peer_id)
            .where(PeerDay.samples > 0, Member.person.is_not(None))
            .group_by(Member.person)
        )
        with self._database.reading() as session:
            days = sorted(session.scalars(query))
        for count in missing:
            when = self._now() if count > len(days) else min(self._now(), _end_of(days[count - 1]))
            yield Milestone(f"people {count}", "people", count, "", None, when)

    def _by_loss(self, heldout: list[HeldoutStatus], known: set[str]) -> Iterator[Milestone]:
        """Whole numbers between the loss of the first weights and the lowest; held-out text, since the loss of a round
        is that of its own samples, which one volunteer's may pull down."""
        finite = [entry for entry in heldout if math.isfinite(entry.loss)]
        if not finite:
            return
        lowest = min(entry.loss for entry in finite)
        marks = range(math.floor(finite[0].loss), math.floor(lowest), -1)
        missing = [mark for mark in marks if f"loss {mark}" not in known]
        if not missing:
            return
        reached = {mark: next(entry.round for entry in finite if entry.loss < mark) for mark in missing}
        finished = self._finished(set(reached.values()))
        for mark, number in reached.items():
            yield Milestone(f"loss {mark}", "loss", mark, "", number, finished.get(number, self._now()))

    def _finished(self, numbers: set[int]) -> dict[int, float]:
        """When these rounds were finished."""
        query = select(Round.round, Round.finished).where(Round.round.in_(numbers))
        with self._database.reading() as session:
            return dict(session.execute(query).all())

    def _records(self) -> Iterator[Milestone]:
        """Days of which each had more samples than any before."""
        last = day_of(self._now() - _DAY_SETTLES) - 1
        if self._days_seen >= last:
            return
        query = (
            select(PeerDay.day, func.sum(PeerDay.samples))
            .where(PeerDay.day <= last, PeerDay.samples > 0)
            .group_by(PeerDay.day)
            .order_by(PeerDay.day)
        )
        with self._database.reading() as session:
            days = session.execute(query).all()
        self._days_seen = last
        best = 0
        for number, (day, samples) in enumerate(days):
            if samples > best and number >= DAYS_BEFORE_RECORD:
                yield Milestone(f"record {date_of(day)}", "record", int(samples), "", None, _end_of(day))
            best = max(best, samples)


def _milestone(row: _Row) -> Milestone:
    return Milestone(row.key, row.kind, row.number, row.text, row.round, row.time)


def _end_of(day: int) -> float:
    """Seconds since 1970.

    :param day: since 1970, UTC
    """
    return (day + 1) * 86_400.0
