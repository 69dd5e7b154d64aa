"""Who gave how much: sums that are right whoever is shown, days in a row, and what is signed of it."""

import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from giving import DAY, give, on_days

from kantha.coordinator.allowlist import Allowlist, Shown
from kantha.coordinator.database import Database
from kantha.coordinator.leaderboard import Board, By, Leaderboard, Place, Window
from kantha.coordinator.ledger import Ledger
from kantha.spec import RunSpec


class Books:
    """Of one run, with a clock that can be put ahead."""

    def __init__(self, database: Database, spec: RunSpec) -> None:
        self.later = 0.0  # seconds
        self.ledger = Ledger(database)
        self.allowlist = Allowlist(database)
        self.spec = spec

    def fresh(self) -> Leaderboard:
        """One that has kept nothing."""
        return Leaderboard(self.ledger, self.allowlist, self.spec, lambda: time.time() + self.later)

    def give(self, name: str, *gifts: tuple[float, int], machine: int = 0) -> int:
        return give(self.ledger, self.allowlist, name, *gifts, machine=machine)


@pytest.fixture
def books(tmp_path: Path, tiny_spec: RunSpec) -> Iterator[Books]:
    database = Database(tmp_path / "ledger.sqlite")
    yield Books(database, tiny_spec)
    database.close()


@pytest.fixture
def books_anywhere(database: Database, tiny_spec: RunSpec) -> Books:
    """In SQLite, and in PostgreSQL."""
    return Books(database, tiny_spec)


def names(board: Board) -> list[str]:
    return [place.name for place in board.places]


def place(board: Board, name: str) -> Place:
    return next(each for each in board.places if each.name == name)


def test_the_sums_are_everybodys_whoever_is_shown(books_anywhere: Books) -> None:
    books = books_anywhere
    books.give("asha", (0, 100), (40, 7))
    books.give("asha", (0, 50), machine=1)
    books.give("rafiq", (0, 30))
    books.give("mitu", (0, 20), (1, 1))
    books.give("kobi", (0, 5))
    books.allowlist.show_as("rafiq", Shown.NICKNAME, "Rooster")
    books.allowlist.show_as("mitu", Shown.HIDDEN)
    books.allowlist.forget("kobi")
    board = books.fresh().people(Window.ALL, By.SAMPLES)
    assert set(names(board)) == {"asha", "Rooster"}
    assert place(board, "asha").samples == 157
    assert (board.hidden.people, board.hidden.samples) == (2, 26)
    assert board.total.samples == 213 == books.ledger.totals().samples
    assert board.total.seconds == 7 * 3600
    assert board.total.samples == board.hidden.samples + sum(each.samples for each in board.places)


def test_a_window_has_its_days_and_no_more(books: Books) -> None:
    for days in (0, 1, 6, 7, 29, 30, 400):
        books.give(f"v{days}", (days, 10))
    board = books.fresh()
    assert set(names(board.people(Window.TODAY, By.SAMPLES))) == {"v0"}
    assert set(names(board.people(Window.WEEK, By.SAMPLES))) == {"v0", "v1", "v6"}
    assert set(names(board.people(Window.MONTH, By.SAMPLES))) == {"v0", "v1", "v6", "v7", "v29"}
    assert len(board.people(Window.ALL, By.SAMPLES).places) == 7


def test_each_order_is_its_own(books: Books) -> None:
    books.give("much", (3, 1000))
    books.give("long", (2, 1), (4, 1), (6, 1))
    books.give("steady", *on_days(0, 1))
    board = books.fresh()
    assert names(board.people(Window.ALL, By.SAMPLES)) == ["much", "steady", "long"]
    assert names(board.people(Window.ALL, By.HOURS)) == ["long", "steady", "much"]
    assert names(board.people(Window.ALL, By.STREAK))[0] == "steady"


def test_who_is_level_shares_the_rank(books: Books) -> None:
    for name, samples in [("a", 30), ("b", 20), ("c", 20), ("d", 10)]:
        books.give(name, (0, samples))
    board = books.fresh().people(Window.ALL, By.SAMPLES)
    assert [(each.name, each.rank) for each in board.places] == [("a", 1), ("b", 2), ("c", 2), ("d", 4)]


@pytest.mark.parametrize(
    ("days", "streak", "longest"),
    [
        ([], 0, 0),
        ([0], 1, 1),
        ([1], 1, 1),  # today is not over
        ([2], 0, 1),
        ([0, 1, 2], 3, 3),
        ([1, 2, 3], 3, 3),
        ([0, 2, 3, 4], 1, 3),
        ([0, 0.0001, 1], 2, 2),  # twice on one day
        (list(range(70)), 70, 70),
    ],
)
def test_days_in_a_row(books: Books, days: list[float], streak: int, longest: int) -> None:
    number = books.give("asha", *on_days(*days))
    board = books.fresh()
    career = board.career(number)
    assert career is not None
    assert (career.streak, career.longest) == (streak, longest)
    shown = board.people(Window.ALL, By.STREAK).place_of(number)
    assert (shown.streak if shown is not None else 0) == streak


def test_rows_of_days_that_are_counted_on_are_those_counted_anew(books_anywhere: Books) -> None:
    """Midnight passes while a leaderboard lives."""
    books = books_anywhere
    chance = random.Random(3)
    ahead = 6
    for person in range(12):
        given = [day - ahead for day in range(40) if chance.random() < 0.8]  # also on days to come
        books.give(f"v{person}", *on_days(*given), machine=0)
    lives = books.fresh()
    for day in range(ahead + 1):
        books.later = day * DAY
        lives._kept.clear()
        board, anew = (each.people(Window.ALL, By.STREAK) for each in (lives, books.fresh()))
        assert {each.name: each.streak for each in board.places} == {each.name: each.streak for each in anew.places}
        today = datetime.fromtimestamp(time.time() + books.later, UTC).date()
        for each in board.places:
            active = {entry.day for entry in books.ledger.activity_between(today - timedelta(60), today, each.number)}
            last = today if today in active else today - timedelta(1)
            expected = 0
            while last - timedelta(expected) in active:
                expected += 1
            assert each.streak == expected


def test_a_team_counts_all_of_its_people_also_those_who_are_hidden(books_anywhere: Books) -> None:
    books = books_anywhere
    for name, samples in [("asha", 100), ("rafiq", 30), ("mitu", 20), ("kobi", 5)]:
        books.give(name, (0, samples))
    team = books.allowlist.found_team("asha", "Dhaka Devs")
    books.allowlist.join_team("rafiq", team.number)
    books.allowlist.found_team("kobi", "Khulna")
    books.allowlist.show_as("rafiq", Shown.HIDDEN)
    board = books.fresh()
    teams = board.teams(Window.TODAY, By.SAMPLES)
    assert [(each.name, each.samples, each.people) for each in teams.places] == [
        ("Dhaka Devs", 130, 2),
        ("Khulna", 5, 1),
    ]
    assert (teams.hidden.samples, teams.total.samples) == (20, 155)
    people = board.people(Window.TODAY, By.SAMPLES, team.number)
    assert (names(people), people.hidden.samples, people.total.samples) == (["asha"], 30, 130)


def test_a_career_is_all_that_somebody_did(books_anywhere: Books) -> None:
    books = books_anywhere
    number = books.give("asha", (0, 30), (50, 12))
    books.give("asha", (0, 30), machine=1)
    books.give("rafiq", (0, 20))
    career = books.fresh().career(number)
    assert career is not None
    assert (career.samples, career.seconds, career.rounds) == (72, 3 * 3600, 3)
    assert career.share_of_last_day == 0.75
    assert [day.samples for day in career.days] == [12, 60]
    assert sorted(machine.samples for machine in career.machines) == [30, 42]


def test_what_is_signed_is_what_the_ledger_has_under_the_name_that_was_chosen(books: Books) -> None:
    number = books.give("asha", (0, 30), (50, 12))
    books.allowlist.show_as("asha", Shown.NICKNAME, "Starling")
    board = books.fresh()
    career = board.career(number)
    assert career is not None
    contribution = board.contribution(career)
    assert contribution is not None
    assert (contribution.name, contribution.samples, contribution.seconds) == ("Starling", 42, 7200)
    assert contribution.last_day - contribution.first_day == timedelta(50)
    assert contribution.run == books.spec.fingerprint


def test_nothing_is_signed_for_who_is_hidden_did_nothing_or_is_gone(books: Books) -> None:
    hidden, idle, gone = books.give("asha", (0, 30)), books.give("rafiq"), books.give("mitu", (0, 5))
    books.allowlist.show_as("asha", Shown.HIDDEN)
    books.allowlist.forget("mitu")
    board = books.fresh()
    for number in (hidden, idle):
        career = board.career(number)
        assert career is not None
        assert board.contribution(career) is None
    assert board.career(gone) is None
