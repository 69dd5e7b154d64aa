"""Who gave how much: people and teams by samples, hours and days in a row, over the last days or the whole run.

What everybody sees has public names only. Who is hidden, or has left for good, is in the sums, and so is everybody.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from itertools import chain
from typing import TypeVar

from kantha.coordinator.allowlist import Allowlist, Profile
from kantha.coordinator.certificate import Contribution
from kantha.coordinator.ledger import Activity, Ledger, PersonMachine, PersonSession
from kantha.spec import RunSpec

_KEPT_SECONDS = 5.0  # that sums over people are good for
_PAST_SECONDS = 60.0  # and those over days that are over
_MOST_DAYS_LATER = timedelta(days=30)  # until rows of days are counted anew instead of on
_SESSIONS = 30  # the newest, of one person
_RECENT = 86_400.0  # seconds of "the last day"

_Value = TypeVar("_Value")


class Window(StrEnum):
    """Over which days."""

    TODAY = "today"
    WEEK = "week"
    MONTH = "month"
    ALL = "all"

    @property
    def days(self) -> int | None:
        """UTC, with today; None: the whole run."""
        return {Window.TODAY: 1, Window.WEEK: 7, Window.MONTH: 30, Window.ALL: None}[self]


class By(StrEnum):
    """In which order."""

    SAMPLES = "samples"
    HOURS = "hours"
    STREAK = "streak"


@dataclass(frozen=True)
class Sums:
    """What some people did together."""

    people: int = 0
    samples: int = 0
    seconds: float = 0.0  # spent computing

    @staticmethod
    def of(entries: Iterable[Activity]) -> "Sums":
        listed = list(entries)
        return Sums(len(listed), sum(entry.samples for entry in listed), sum(entry.seconds for entry in listed))


@dataclass(frozen=True)
class Place:
    """One line of the board: a person, or a team."""

    rank: int
    number: int  # of the person, or of the team
    name: str
    samples: int
    seconds: float
    streak: int = 0  # days in a row, up to today or yesterday
    people: int = 1
    team: str = ""
    team_number: int = 0


@dataclass(frozen=True)
class Board:
    """All who are shown, best first."""

    window: Window
    by: By
    places: Sequence[Place]
    hidden: Sums  # who is not shown; on a board of teams: who is in none
    total: Sums

    def place_of(self, number: int) -> Place | None:
        return next((place for place in self.places if place.number == number), None)


@dataclass(frozen=True)
class Day:
    date: date
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Career:
    """All that one person did."""

    profile: Profile
    samples: int
    seconds: float
    rounds: int
    share_of_last_day: float | None  # of all samples of the last 24 hours; None: nobody made any
    streak: int
    longest: int  # most days in a row, ever
    days: Sequence[Day] = field(repr=False)  # with samples, oldest first
    machines: Sequence[PersonMachine] = ()
    sessions: Sequence[PersonSession] = ()


class Leaderboard:
    """Safe to use from several threads. All methods raise `StorageError` where the disk or the server refuses."""

    def __init__(
        self, ledger: Ledger, allowlist: Allowlist, spec: RunSpec, now: Callable[[], float] = time.time
    ) -> None:
        self._ledger = ledger
        self._allowlist = allowlist
        self._spec = spec
        self._now = now
        self._rows: dict[int, int] = {}  # days in a row up to this day, by person
        self._rows_end: date | None = None
        self._kept: dict[object, tuple[float, object]] = {}
        self._lock = threading.RLock()  # held while something is made: many ask for the same at once

    def people(self, window: Window, by: By, team: int | None = None) -> Board:
        """:param team: only the people of this one"""
        return self._keep((window, by, team), _KEPT_SECONDS, lambda: self._people(window, by, team))

    def teams(self, window: Window, by: By) -> Board:
        return self._keep((window, by), _KEPT_SECONDS, lambda: self._teams(window, by))

    def career(self, number: int) -> Career | None:
        """None: nobody has this number, or not any longer."""
        profile = self._allowlist.profile_of(number)  # asked each time: who is hidden is so at once
        if profile is None:
            return None
        career = self._keep(("career", number), _KEPT_SECONDS, lambda: self._career(profile))
        return replace(career, profile=profile)

    def _career(self, profile: Profile) -> Career:
        number, today = profile.number, self._today()
        days = [
            Day(entry.day, entry.samples, entry.seconds)
            for entry in self._ledger.activity_between(date(1970, 1, 1), today, number)
            if entry.samples > 0
        ]
        recent = self._keep("recent", _KEPT_SECONDS, lambda: self._ledger.recent(_RECENT))
        all_recent = sum(recent.values())
        did = next((entry for entry in self._contributors(Window.ALL) if entry.person == number), None)
        streak, longest = _days_in_a_row([day.date for day in days], today)
        return Career(
            profile=profile,
            samples=did.samples if did is not None else 0,
            seconds=did.seconds if did is not None else 0.0,
            rounds=did.rounds if did is not None else 0,
            share_of_last_day=recent.get(number, 0) / all_recent if all_recent else None,
            streak=streak,
            longest=longest,
            days=days,
            machines=self._ledger.person_machines(number),
            sessions=self._ledger.person_sessions(number, _SESSIONS),
        )

    def contribution(self, career: Career) -> Contribution | None:
        """What the run may sign; None: nothing was done yet, or its owner is not shown."""
        name = career.profile.name
        if name is None or career.samples < 1 or not career.days:
            return None
        return Contribution(
            run=self._spec.fingerprint,
            run_name=self._spec.name,
            person=career.profile.number,
            name=name,
            samples=career.samples,
            seconds=int(career.seconds),
            rounds=career.rounds,
            first_day=career.days[0].date,
            last_day=career.days[-1].date,
        )

    # ---- boards

    def _people(self, window: Window, by: By, team: int | None) -> Board:
        names, teams = self._allowlist.shown(), self._allowlist.teams_of_people()
        entries = [
            entry
            for entry in self._contributors(window)
            if team is None or (entry.person in teams and teams[entry.person].number == team)
        ]
        streaks = self._streaks()
        shown = []
        for entry in entries:
            if entry.person is None or entry.person not in names:
                continue
            of = teams.get(entry.person)
            shown.append(
                Place(
                    rank=0,
                    number=entry.person,
                    name=names[entry.person],
                    samples=entry.samples,
                    seconds=entry.seconds,
                    streak=streaks.get(entry.person, 0),
                    team=of.name if of is not None else "",
                    team_number=of.number if of is not None else 0,
                )
            )
        hidden = Sums.of(entry for entry in entries if entry.person not in names)
        return Board(window, by, _ranked(shown, by), hidden, Sums.of(entries))

    def _teams(self, window: Window, by: By) -> Board:
        teams, streaks = self._allowlist.teams_of_people(), self._streaks()
        entries = self._contributors(window)
        places: dict[int, Place] = {}
        for entry in entries:
            team = teams.get(entry.person) if entry.person is not None else None
            if team is None or entry.person is None:
                continue
            known = places.get(team.number, Place(0, team.number, team.name, 0, 0.0, people=0))
            places[team.number] = replace(
                known,
                samples=known.samples + entry.samples,
                seconds=known.seconds + entry.seconds,
                streak=max(known.streak, streaks.get(entry.person, 0)),
                people=known.people + 1,
            )
        alone = Sums.of(entry for entry in entries if entry.person not in teams)
        return Board(window, by, _ranked(places.values(), by), alone, Sums.of(entries))

    def _contributors(self, window: Window) -> list[Activity]:
        if window.days is None:
            return self._keep("all", _KEPT_SECONDS, self._ledger.contributors)
        today = self._today()
        now = self._keep(("day", today), _KEPT_SECONDS, lambda: self._ledger.contributors(today, today))
        if window.days == 1:
            return now
        first, last = today - timedelta(days=window.days - 1), today - timedelta(days=1)
        before = self._keep(("days", first), _PAST_SECONDS, lambda: self._ledger.contributors(first, last))
        return _added(before, now)

    def _streaks(self) -> dict[int, int]:
        """Days in a row up to today or yesterday, by person."""
        with self._lock:
            today = self._today()
            yesterday = today - timedelta(days=1)
            if self._rows_end is None or not timedelta() <= yesterday - self._rows_end <= _MOST_DAYS_LATER:
                # this reads as many days as the longest row has: once is enough
                active = self._active_on(yesterday)
                rows = self._ledger.streaks(yesterday)
                self._rows = {person: days for person, days in rows.items() if person in active}
                self._rows_end = yesterday
            while self._rows_end < yesterday:
                self._rows_end += timedelta(days=1)
                self._rows = {person: 1 + self._rows.get(person, 0) for person in self._active_on(self._rows_end)}
            streaks = dict(self._rows)
            for entry in self._contributors(Window.TODAY):
                if entry.person is not None:
                    streaks[entry.person] = 1 + streaks.get(entry.person, 0)
            return streaks

    def _active_on(self, day: date) -> set[int]:
        return {entry.person for entry in self._ledger.contributors(day, day) if entry.person is not None}

    def _today(self) -> date:
        return datetime.fromtimestamp(self._now(), UTC).date()

    def _keep(self, key: object, seconds: float, make: Callable[[], _Value]) -> _Value:
        with self._lock:
            now = time.monotonic()
            known = self._kept.get(key)
            if known is not None and now - known[0] < seconds:
                return known[1]  # type: ignore[return-value]  # what was kept under this key
            value = make()
            self._kept = {other: kept for other, kept in self._kept.items() if now - kept[0] < _PAST_SECONDS}
            self._kept[key] = (now, value)
            return value


def _added(*parts: Iterable[Activity]) -> list[Activity]:
    """What each person did in all of them."""
    sums: dict[int | None, Activity] = {}
    for entry in chain(*parts):
        known = sums.get(entry.person)
        if known is not None:
            entry = Activity(
                entry.person,
                max(known.day, entry.day),
                known.samples + entry.samples,
                known.seconds + entry.seconds,
                known.rounds + entry.rounds,
            )
        sums[entry.person] = entry
    return list(sums.values())


def _ranked(places: Iterable[Place], by: By) -> list[Place]:
    """Best first; who is level shares the rank, and the next one does not."""

    def figure(place: Place) -> float:
        return {By.SAMPLES: place.samples, By.HOURS: place.seconds, By.STREAK: place.streak}[by]

    ranked: list[Place] = []
    for position, place in enumerate(sorted(places, key=lambda each: (-figure(each), -each.samples, each.name)), 1):
        is_level = bool(ranked) and figure(ranked[-1]) == figure(place)
        ranked.append(replace(place, rank=ranked[-1].rank if is_level else position))
    return ranked


def _days_in_a_row(days: Sequence[date], today: date) -> tuple[int, int]:
    """Those up to today, which is not over, and the most there ever were.

    :param days: ascending
    """
    longest = run = 0
    before: date | None = None
    for day in days:
        run = run + 1 if before is not None and day - before == timedelta(days=1) else 1
        longest, before = max(longest, run), day
    is_going_on = before is not None and today - before <= timedelta(days=1)
    return run if is_going_on else 0, longest
