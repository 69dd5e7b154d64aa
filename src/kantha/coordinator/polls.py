"""Polls of the community: the one for the model's name, and any other that an organizer holds.

Members propose, and vote for as many entries as they like, once each (approval voting, Brams and Fishburn 1978). Who
voted for what is nobody's business; how often, everybody sees. When a poll has closed, its counts are written down and
never change again.
"""

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from rapidfuzz import fuzz, process
from sqlalchemy import BigInteger, ColumnElement, String, and_, delete, func, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.admission import SignIn
from kantha.coordinator.allowlist import MOST_REASON, Allowlist, State, kept_out, note_decision, one_line
from kantha.coordinator.database import Database, Table
from kantha.errors import MembershipError, printable

NAME_POLL = "name"  # slug of the poll whose first is the model's name
MOST_LETTERS = 60  # of an entry
MOST_TITLE = 80
MOST_QUESTION = 300
MOST_ENTRIES = 5  # that one person proposes in a poll
MOST_IN_POLL = 1_000
_ALIKE = 80.0  # of 100, from which on an entry is pointed out as nearly the same
_MOST_ALIKE = 5
_LONGEST = 366 * 24 * 3600  # seconds from now until a poll may open or close
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_HEAP_OF_MARKS = 4  # accents and vowel signs on one letter; no language writes more, only pranks do


class PollState(StrEnum):
    UPCOMING = "upcoming"
    OPEN = "open"
    CLOSED = "closed"


class Problem(StrEnum):
    """Why somebody who takes part cannot do that."""

    NO_POLL = "there is no such poll"
    NOT_OPEN = "this poll has not opened yet; come back when it has"
    CLOSED = "this poll has closed; its result is final"
    NO_MEMBER = "polls are for members: a moderator has to let you in first"
    NO_ENTRY = "this poll has no such entry; load the page again"
    NO_TEXT = "an entry is one line of at most %(most)s characters"
    NO_LETTER = "an entry needs a letter or a digit; write one"
    MARKS = "an entry cannot have so many marks on one letter; write it plainly"
    THERE = "“%(text)s” is there already: vote for it"
    WAS_HIDDEN = "“%(text)s” was proposed before, and a moderator hid it"
    HIDDEN = "a moderator hid that entry; vote for another one"
    YOUR_SHARE = "you have proposed %(most)s already, which is as many as one person may"
    FULL = "this poll has %(most)s entries and takes no more; vote for one of them"


class PollError(MembershipError):
    """:param values: fill the problem's text in"""

    def __init__(self, problem: Problem, **values: object) -> None:
        self.problem, self.values = problem, values
        super().__init__(problem % values if values else problem.value)


@dataclass(frozen=True)
class Poll:
    """What is asked, and when."""

    slug: str
    title: str
    question: str
    opens: int  # seconds since 1970
    closes: int
    state: PollState
    entries: int
    voters: int


@dataclass(frozen=True)
class Entry:
    """One answer that somebody proposed."""

    id: int
    text: str
    votes: int
    place: int  # 1: the most votes; entries with as many have the same
    hidden: str  # why a moderator hid it; empty: it is shown
    is_mine: bool  # proposed by the person who asks
    has_my_vote: bool
    by: int | None  # number of who proposed it; None: somebody who left


class _Poll(Table):
    __tablename__ = "polls"
    id: Mapped[int] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(String(40), unique=True)
    title: Mapped[str] = mapped_column(String(MOST_TITLE))
    question: Mapped[str] = mapped_column(String(MOST_QUESTION))
    opens: Mapped[int] = mapped_column(BigInteger)
    closes: Mapped[int] = mapped_column(BigInteger)
    voters: Mapped[int | None]  # written down when it has closed; None: not yet


class _Entry(Table):
    __tablename__ = "poll_entries"
    id: Mapped[int] = mapped_column(primary_key=True)
    poll: Mapped[int] = mapped_column(index=True)
    text: Mapped[str] = mapped_column(String(MOST_LETTERS))
    person: Mapped[int | None] = mapped_column(index=True)
    proposed: Mapped[int] = mapped_column(BigInteger)
    hidden: Mapped[str] = mapped_column(String(MOST_REASON), default="")
    votes: Mapped[int | None]  # written down when the poll has closed; None: not yet


class _Vote(Table):
    __tablename__ = "poll_votes"
    entry: Mapped[int] = mapped_column(primary_key=True)
    person: Mapped[int] = mapped_column(primary_key=True, index=True)


class Polls:
    """Safe to use from several threads and processes. All methods raise `StorageError` where the disk refuses.

    People are meant by the number that the allowlist knows them by.
    """

    def __init__(
        self, database: Database, allowlist: Allowlist, sign_in: SignIn, now: Callable[[], float] = time.time
    ) -> None:
        """:param sign_in: where people sign in, only those who were let in take part"""
        self._database, self._allowlist, self._sign_in, self._now = database, allowlist, sign_in, now

    # ---- looking

    def all(self) -> list[Poll]:
        """Those that close last come first."""
        self.close_due()
        with self._database.reading() as session:
            rows = session.scalars(select(_Poll).order_by(_Poll.closes.desc(), _Poll.id.desc()))
            return [self._poll(session, row) for row in rows]

    def poll(self, slug: str) -> Poll | None:
        """None: there is no such poll."""
        self.close_due()
        with self._database.reading() as session:
            row = _find(session, slug)
            return self._poll(session, row) if row is not None else None

    def entries(self, slug: str, person: int | None = None, *, with_hidden: bool = False) -> list[Entry]:
        """Of a poll, most votes first, and of as many the older one first; none of a poll that there is not.

        :param person: who asks, whose votes and proposals are marked
        :param with_hidden: as well those that a moderator hid; one's own are always there
        """
        self.close_due()
        with self._database.reading() as session:
            row = _find(session, slug)
            return self._entries(session, row, person, with_hidden) if row is not None else []

    def winners(self, slug: str) -> list[Entry]:
        """Those that have the most votes in a poll that has closed: one, several with as many, or none."""
        poll = self.poll(slug)
        if poll is None or poll.state != PollState.CLOSED:
            return []
        return [entry for entry in self.entries(slug) if entry.place == 1 and entry.votes]

    def alike(self, slug: str, text: str) -> list[str]:
        """Entries that are nearly this one, the nearest first."""
        with self._database.reading() as session:
            row = _find(session, slug)
            if row is None:
                return []
            query = select(_Entry.text).where(_Entry.poll == row.id, _Entry.hidden == "")
            known = {other: _fold(other) for other in session.scalars(query)}
        found = process.extract(_fold(text), known, scorer=fuzz.WRatio, score_cutoff=_ALIKE, limit=_MOST_ALIKE)
        return [other for _, _, other in found]

    def is_there(self, slug: str, text: str) -> bool:
        """Whether this very entry was proposed before, however it was typed."""
        folded = _fold(text)
        with self._database.reading() as session:
            row = _find(session, slug)
            known = session.scalars(select(_Entry.text).where(_Entry.poll == row.id)) if row is not None else ()
            return any(_fold(other) == folded for other in known)

    # ---- taking part

    def propose(self, slug: str, text: str, person: int) -> int:
        """Enter an answer, with a vote for it; returns its number. Raises `MembershipError` where that cannot be."""
        text = _entry_text(text)
        with self._database.session() as session:
            poll = self._open(session, slug)
            self._check_takes_part(session, person)
            entries = list(session.scalars(select(_Entry).where(_Entry.poll == poll.id)))
            folded = _fold(text)
            for entry in entries:
                if _fold(entry.text) == folded:
                    raise PollError(Problem.WAS_HIDDEN if entry.hidden else Problem.THERE, text=entry.text)
            if sum(entry.person == person for entry in entries) >= MOST_ENTRIES:
                raise PollError(Problem.YOUR_SHARE, most=MOST_ENTRIES)
            if len(entries) >= MOST_IN_POLL:
                raise PollError(Problem.FULL, most=MOST_IN_POLL)
            entry = _Entry(poll=poll.id, text=text, person=person, proposed=int(self._now()), hidden="", votes=None)
            session.add(entry)
            session.flush()
            session.add(_Vote(entry=entry.id, person=person))
            return entry.id

    def vote(self, slug: str, entry: int, person: int) -> None:
        """Voting twice counts once. Raises `MembershipError` where there is nothing to vote for."""
        with self._database.session() as session:
            row = self._entry(session, self._open(session, slug), entry)
            self._check_takes_part(session, person)
            if row.hidden:
                raise PollError(Problem.HIDDEN)
            if session.get(_Vote, (entry, person)) is None:
                session.add(_Vote(entry=entry, person=person))

    def take_back(self, slug: str, entry: int, person: int) -> None:
        """A vote. Raises `MembershipError` where the poll is not open."""
        with self._database.session() as session:
            self._entry(session, self._open(session, slug), entry)
            session.execute(delete(_Vote).where(_Vote.entry == entry, _Vote.person == person))

    def forget(self, person: int) -> None:
        """Somebody leaves for good: votes go along, what was proposed stays as nobody's. What has closed is final."""
        self.close_due()
        with self._database.session() as session:
            session.execute(delete(_Vote).where(_Vote.person == person))
            session.execute(update(_Entry).where(_Entry.person == person).values(person=None))

    # ---- moderating

    def make(self, slug: str, title: str, question: str, opens: float, closes: float, by: str) -> Poll:
        """Raises `MembershipError` where that can be no poll."""
        if not _SLUG.fullmatch(slug):
            raise MembershipError(
                f"{slug[:60]!r} cannot be a poll's address: small Latin letters, digits and hyphens, at most 40"
            )
        with self._database.session() as session:
            if _find(session, slug) is not None:
                raise MembershipError(f"there is a poll at {slug} already")
            poll = _Poll(slug=slug, voters=None, opens=0, closes=0)
            self._set(poll, title, question, opens, closes)
            session.add(poll)
            session.flush()
            note_decision(session, self._now(), by, "open poll", reason=f"{slug}: {poll.title}")
            return self._poll(session, poll)

    def change(self, slug: str, title: str, question: str, opens: float, closes: float, by: str) -> Poll:
        """Also its times. Raises `MembershipError`; what has closed is final."""
        with self._database.session() as session:
            poll = self._changeable(session, slug)
            self._set(poll, title, question, opens, closes)
            note_decision(session, self._now(), by, "change poll", reason=f"{slug}: {_span(poll)}")
            return self._poll(session, poll)

    def close(self, slug: str, by: str) -> None:
        """Now, for good. Raises `MembershipError` where it is not open."""
        with self._database.session() as session:
            poll = self._open(session, slug)
            poll.closes = int(self._now())
            note_decision(session, self._now(), by, "close poll", reason=slug)
        self.close_due()

    def hide(self, slug: str, entry: int, reason: str, by: str) -> None:
        """Nobody sees an entry any more but who proposed it, with the reason. Raises `MembershipError`."""
        reason = one_line(reason, MOST_REASON, "a reason")
        if not reason:
            raise MembershipError("to hide an entry takes a reason, which who proposed it is told; give one")
        self._hide(slug, entry, reason, by, "hide entry", reason)

    def show(self, slug: str, entry: int, by: str) -> None:
        """Take `hide` back. Raises `MembershipError`."""
        self._hide(slug, entry, "", by, "show entry", "")

    def _hide(self, slug: str, entry: int, hidden: str, by: str, action: str, reason: str) -> None:
        with self._database.session() as session:
            row = self._entry(session, self._changeable(session, slug), entry)
            row.hidden = hidden
            why = f"{row.text}: {reason}" if reason else row.text
            note_decision(session, self._now(), by, action, reason=why[:MOST_REASON])

    def close_due(self) -> None:
        """Write down what polls that have closed came to."""
        due = and_(_Poll.closes <= int(self._now()), _Poll.voters.is_(None))
        with self._database.reading() as session:
            if session.scalar(select(_Poll.id).where(due).limit(1)) is None:
                return
        with self._database.session() as session:
            for poll in session.scalars(select(_Poll).where(due)):
                counts = self._counts(session, poll)
                for entry in session.scalars(select(_Entry).where(_Entry.poll == poll.id)):
                    entry.votes = counts.get(entry.id, 0)
                poll.voters = self._voters(session, poll)

    # ---- rows

    def _set(self, poll: _Poll, title: str, question: str, opens: float, closes: float) -> None:
        poll.title = one_line(title, MOST_TITLE, "a title")
        poll.question = one_line(question, MOST_QUESTION, "a question")
        if not poll.title:
            raise MembershipError("a poll takes a title; give one")
        now = int(self._now())
        if not (now - _LONGEST <= opens < closes <= now + _LONGEST and closes > now):
            raise MembershipError("a poll opens before it closes, and closes within a year from now; give other times")
        poll.opens, poll.closes = int(opens), int(closes)

    def _open(self, session: Session, slug: str) -> _Poll:
        poll = _find(session, slug)
        if poll is None:
            raise PollError(Problem.NO_POLL)
        state = self._state(poll)
        if state != PollState.OPEN:
            raise PollError(Problem.CLOSED if state == PollState.CLOSED else Problem.NOT_OPEN)
        return poll

    def _changeable(self, session: Session, slug: str) -> _Poll:
        poll = _find(session, slug)
        if poll is None:
            raise PollError(Problem.NO_POLL)
        if self._state(poll) == PollState.CLOSED:
            raise PollError(Problem.CLOSED)
        return poll

    def _entry(self, session: Session, poll: _Poll, number: int) -> _Entry:
        entry = session.get(_Entry, number)
        if entry is None or entry.poll != poll.id:
            raise PollError(Problem.NO_ENTRY)
        return entry

    def _check_takes_part(self, session: Session, person: int) -> None:
        standing = self._allowlist.person(session, person)
        if standing.may_not:
            raise MembershipError(standing.sentence)
        if self._sign_in != "local" and standing.state != State.APPROVED and not standing.is_moderator:
            raise PollError(Problem.NO_MEMBER)

    def _state(self, poll: _Poll) -> PollState:
        now = int(self._now())
        if poll.closes <= now:
            return PollState.CLOSED
        return PollState.OPEN if poll.opens <= now else PollState.UPCOMING

    def _poll(self, session: Session, poll: _Poll) -> Poll:
        shown = select(func.count()).select_from(_Entry).where(_Entry.poll == poll.id, _Entry.hidden == "")
        voters = poll.voters if poll.voters is not None else self._voters(session, poll)
        return Poll(
            poll.slug,
            poll.title,
            poll.question,
            poll.opens,
            poll.closes,
            self._state(poll),
            session.scalar(shown) or 0,
            voters,
        )

    def _entries(self, session: Session, poll: _Poll, person: int | None, with_hidden: bool) -> list[Entry]:
        # columns, and no objects: there may be a thousand, and many people look
        query = select(_Entry.id, _Entry.text, _Entry.person, _Entry.hidden, _Entry.votes)
        query = query.where(_Entry.poll == poll.id).order_by(_Entry.id)
        rows = [
            row
            for row in session.execute(query)
            if not row.hidden or with_hidden or (person is not None and row.person == person)
        ]
        counts = self._counts(session, poll)
        mine: set[int] = set()
        if person is not None:
            voted = select(_Vote.entry).join(_Entry, _Entry.id == _Vote.entry)
            mine = set(session.scalars(voted.where(_Entry.poll == poll.id, _Vote.person == person)))
        found = [(row, row.votes if row.votes is not None else counts.get(row.id, 0)) for row in rows]
        found.sort(key=lambda each: (bool(each[0].hidden), -each[1], each[0].id))
        places: dict[int, int] = {}
        for place, (row, votes) in enumerate(found, 1):
            if not row.hidden:
                places.setdefault(votes, place)
        return [
            Entry(
                id=row.id,
                text=row.text,
                votes=0 if row.hidden else votes,
                place=0 if row.hidden else places[votes],
                hidden=row.hidden,
                is_mine=person is not None and row.person == person,
                has_my_vote=row.id in mine,
                by=row.person,
            )
            for row, votes in found
        ]

    def _counts(self, session: Session, poll: _Poll) -> dict[int, int]:
        """Votes of those who may take part still, by entry."""
        query = select(_Vote.entry, func.count()).join(_Entry, _Entry.id == _Vote.entry)
        return dict(session.execute(query.where(*_counted(poll)).group_by(_Vote.entry)).all())

    def _voters(self, session: Session, poll: _Poll) -> int:
        query = select(func.count(_Vote.person.distinct())).join(_Entry, _Entry.id == _Vote.entry)
        return session.scalar(query.where(*_counted(poll))) or 0


def _counted(poll: _Poll) -> Sequence[ColumnElement[bool]]:
    """Which votes count."""
    return (_Entry.poll == poll.id, _Entry.hidden == "", _Vote.person.not_in(kept_out()))


def _find(session: Session, slug: str) -> _Poll | None:
    return session.scalar(select(_Poll).where(_Poll.slug == slug))


def _span(poll: _Poll) -> str:
    return " – ".join(time.strftime("%Y-%m-%d %H:%M", time.gmtime(each)) for each in (poll.opens, poll.closes))


def _entry_text(text: str) -> str:
    text = re.sub(" +", " ", unicodedata.normalize("NFC", text)).strip()
    if not text or len(text) > MOST_LETTERS or printable(text) != text:
        raise PollError(Problem.NO_TEXT, most=MOST_LETTERS)
    if not any(map(str.isalnum, text)):
        raise PollError(Problem.NO_LETTER)
    marks = 0
    for letter in text:
        marks = marks + 1 if unicodedata.category(letter).startswith("M") else 0
        if marks > _HEAP_OF_MARKS:
            raise PollError(Problem.MARKS)
    return text


def _fold(text: str) -> str:
    """An entry as it is compared: what looks or sounds the same however it was typed is one."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(letter for letter in folded if unicodedata.category(letter)[0] in "LMNS")
