"""Announcements and pauses, up to the notice that volunteers get."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kantha.coordinator.admission import Admission
from kantha.coordinator.allowlist import Allowlist
from kantha.coordinator.bulletin import Bulletin
from kantha.coordinator.database import Database
from kantha.errors import MembershipError, StorageError
from kantha.spec import RunSpec
from kantha.swarm.membership import RunKey, Trust


class Books:
    """Of a coordinator, with a clock of their own."""

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        self.ahead = 0.0
        self.database = Database(folder / "ledger.sqlite")
        self.allowlist = Allowlist(self.database, now=self.now)
        self.key = key = RunKey.generate(folder / "run.pem")
        self.admission = Admission(self.database, spec, key, "local", self.allowlist, self.now)
        self.bulletin = Bulletin(self.database, self.now)
        self.trust = Trust(spec.fingerprint, key.public_key)

    def now(self) -> float:
        return time.time() + self.ahead

    def heard(self) -> tuple[list[str], str]:
        """What a volunteer knows after the next renewal: announcements, and why the run is paused."""
        self.trust.take(self.admission.notice())
        return [each.text for each in self.trust.announcements], self.trust.paused

    def log(self) -> list[tuple[str, str, str]]:
        return [(each.by, each.action, each.reason) for each in reversed(self.allowlist.log())]


@pytest.fixture
def books(tmp_path: Path, tiny_run: object) -> Iterator[Books]:
    books = Books(tmp_path, tiny_run.spec)  # type: ignore[attr-defined]
    yield books
    books.database.close()


def test_an_announcement_is_in_the_next_notice_until_it_ends(books: Books) -> None:
    assert books.heard() == ([], "")
    first = books.bulletin.announce("  ভোট দিন: /name ", 24, "mitu")
    books.bulletin.announce("meeting at eight", 1, "mitu")
    assert books.heard() == (["ভোট দিন: /name", "meeting at eight"], "")
    number = books.trust.number
    books.heard()
    assert books.trust.number == number, "a notice that says the same is not made anew"
    books.ahead = 3601
    assert books.heard()[0] == ["ভোট দিন: /name"]
    books.bulletin.end(first.id, "rafiq")
    assert books.heard()[0] == []
    with pytest.raises(MembershipError, match="ended already"):
        books.bulletin.end(first.id, "rafiq")
    assert books.log() == [
        ("mitu", "announce", "ভোট দিন: /name"),
        ("mitu", "announce", "meeting at eight"),
        ("rafiq", "end announcement", "ভোট দিন: /name"),
    ]


def test_no_more_is_announced_than_people_read(books: Books) -> None:
    for number in range(3):
        books.bulletin.announce(f"number {number}", 1, "mitu")
    with pytest.raises(MembershipError, match="end one of them"):
        books.bulletin.announce("number 3", 1, "mitu")
    assert len(books.heard()[0]) == 3


@pytest.mark.parametrize(
    ("text", "hours"),
    [("", 1), (" ", 1), ("x" * 301, 1), ("two\nlines", 1), ("\u202eright to left", 1), ("x", 0), ("x", 24 * 61)],
)
def test_what_is_no_announcement_is_refused(books: Books, text: str, hours: float) -> None:
    with pytest.raises(MembershipError):
        books.bulletin.announce(text, hours, "mitu")
    with pytest.raises(MembershipError):
        books.bulletin.announce("x", float("nan"), "mitu")
    assert (books.heard(), books.log()) == (([], ""), [])


def test_a_new_key_of_the_run_says_what_the_old_one_said(books: Books, tmp_path: Path) -> None:
    books.bulletin.announce("stays", 1, "mitu")
    books.bulletin.pause("stays, too", "mitu")
    newer = RunKey.generate(tmp_path / "newer.pem")
    books.admission.rotate(newer, [books.key.change_to(newer.public_key, books.trust.run)])
    assert books.heard() == (["stays"], "stays, too")
    assert books.trust.run_key == newer.public_key


def test_while_the_disk_refuses_pages_say_what_was_known(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise StorageError("ledger.sqlite: make room")

    books.bulletin.announce("known", 1, "mitu")
    known = books.bulletin.known()
    assert [each.text for each in known[0]] == ["known"]
    monkeypatch.setattr(books.database, "reading", refuse)
    assert books.bulletin.known() == known


def test_a_run_is_paused_with_a_reason_and_resumed(books: Books) -> None:
    with pytest.raises(MembershipError, match="takes a reason"):
        books.bulletin.pause(" ", "mitu")
    books.bulletin.pause("the text is mended", "mitu")
    assert books.heard() == ([], "the text is mended")
    pause = books.bulletin.paused()
    assert pause is not None
    assert pause.reason == "the text is mended"
    assert abs(pause.since - books.now()) < 60
    with pytest.raises(MembershipError, match="paused already"):
        books.bulletin.pause("once more", "rafiq")
    books.bulletin.resume("rafiq")
    assert books.heard() == ([], "")
    assert books.bulletin.paused() is None
    with pytest.raises(MembershipError, match="not paused"):
        books.bulletin.resume("rafiq")
    assert books.log() == [("mitu", "pause", "the text is mended"), ("rafiq", "resume", "")]
