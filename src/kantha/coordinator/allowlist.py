"""The allowlist: who is who, who may join, and who decided that."""

import csv
import re
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeVar

from sqlalchemy import Select, String, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.database import Database, Table
from kantha.coordinator.leases import Granted, Lease, end_leases, revoke
from kantha.errors import MembershipError, printable

MOST_NAMES = 5_000  # in one pasted list
MOST_REASON = 300  # characters
_MOST_USERNAME = 96  # characters, as on the Hugging Face hub
_MOST_BY = 120  # characters: a username, or the name of a rule
# of the hub's users and organisations: https://huggingface.co/docs/huggingface_hub/package_reference/utilities
_HUB_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")

_Value = TypeVar("_Value")
Action = Literal["approve", "refuse", "suspend", "ban"]


class State(StrEnum):
    """Of a person in one run."""

    NEW = "new"  # known, never asked
    ASKED = "asked"
    APPROVED = "approved"
    REFUSED = "refused"
    SUSPENDED = "suspended"
    BANNED = "banned"

    @property
    def sign(self) -> str:
        """As the community knows it."""
        return {State.NEW: "", State.ASKED: "⏳", State.APPROVED: "✅"}.get(self, "⛔")


_STATE_AFTER = {
    "approve": State.APPROVED,
    "refuse": State.REFUSED,
    "suspend": State.SUSPENDED,
    "ban": State.BANNED,
}
_SHUT_OUT = (State.REFUSED, State.SUSPENDED, State.BANNED)


@dataclass(frozen=True)
class Person:
    """Who signed in, in the provider's words."""

    username: str
    subject: str  # the provider's own number for the account, which outlives a change of name; local: empty
    provider: str  # "local" or "huggingface"
    organisations: tuple[str, ...]


@dataclass(frozen=True)
class Standing:
    """Where a person stands with the run."""

    username: str
    state: State
    reason: str
    since: float  # seconds since 1970; 0: nobody of that name was here
    by: str
    is_moderator: bool
    number: int = 0  # by which tables and public addresses know this person; 0: nobody of that name was here

    @property
    def may_not(self) -> bool:
        """Whether a moderator keeps this person out."""
        return self.state in _SHUT_OUT

    @property
    def sentence(self) -> str:
        """What it means and what happens next, for that person."""
        what = {
            State.NEW: "You have not asked to join yet. Ask, and a moderator of the run will answer.",
            State.ASKED: "Asked. A moderator of the run answers; a `kantha join` that waits starts when you are in ✅.",
            State.APPROVED: "You are in. `kantha join` with the run's link starts on any of your machines.",
            State.REFUSED: "A moderator did not let you in: {reason}",
            State.SUSPENDED: "A moderator suspended you for now: {reason}",
            State.BANNED: "A moderator banned you from this run: {reason}",
        }[self.state]
        return f"{self.state.sign} {what}".strip().format(reason=self.reason)


@dataclass(frozen=True)
class Decision:
    """Who did what when."""

    time: float  # seconds since 1970
    by: str
    action: str
    username: str
    reason: str


class _Person(Table):
    __tablename__ = "people"
    id: Mapped[int] = mapped_column(primary_key=True)
    folded: Mapped[str] = mapped_column(String(_MOST_USERNAME), unique=True)  # the name as it is compared
    username: Mapped[str] = mapped_column(String(_MOST_USERNAME))
    subject: Mapped[str | None] = mapped_column(String(100), unique=True)  # None: never signed in at the provider
    state: Mapped[str] = mapped_column(String(10), index=True)
    reason: Mapped[str] = mapped_column(String(MOST_REASON))
    since: Mapped[float]
    by: Mapped[str] = mapped_column(String(_MOST_BY))
    is_moderator: Mapped[bool] = mapped_column(default=False)


class _Decision(Table):
    __tablename__ = "decisions"
    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    by: Mapped[str] = mapped_column(String(_MOST_BY))
    action: Mapped[str] = mapped_column(String(20))
    username: Mapped[str] = mapped_column(String(_MOST_USERNAME))
    reason: Mapped[str] = mapped_column(String(MOST_REASON))


class _Rule(Table):
    """Members of this organisation are approved when they sign in."""

    __tablename__ = "rules"
    folded: Mapped[str] = mapped_column(String(_MOST_USERNAME), primary_key=True)
    organisation: Mapped[str] = mapped_column(String(_MOST_USERNAME))


def _nobody(_: str) -> None: ...


class Allowlist:
    """Safe to use from several threads and processes. All methods raise `StorageError` where the disk refuses."""

    def __init__(
        self,
        database: Database,
        notify: Callable[[str], None] = _nobody,
        now: Callable[[], float] = time.time,
    ) -> None:
        """:param notify: told the username of everybody who asks, once"""
        self._database = database
        self._notify = notify
        self._now = now
        database.migrate()

    # ---- people

    def sign_in(self, person: Person) -> Standing:
        """Somebody came through the provider's door. Raises `MembershipError` where the name was another account's.

        An account that changed its name keeps where it stands, under the new name.
        """
        with self._database.session() as session:
            return self._standing(self._arrive(session, person))

    def ask(self, username: str) -> Standing:
        """Ask to be let in. Who was answered already is told so. Raises `MembershipError` for nobody that is known."""
        with self._database.session() as session:
            row = self._known(session, username)
            asks = row.state == State.NEW
            if asks:
                self._decide(session, [row], State.ASKED, "ask", row.username, "")
            standing = self._standing(row)
        if asks:
            self._notify(standing.username)
        return standing

    def standing(self, username: str) -> Standing:
        """Of a name that never was here: new."""
        with self._database.reading() as session:
            row = _find(session, username)
            return self._standing(row) if row is not None else Standing(username, State.NEW, "", 0.0, "", False)

    def account(self, subject: str) -> Standing | None:
        """Of the account that has this number with the provider, whatever its name is by now; None: it never came.

        A name tells nothing of who it is for long: an account may change its own, and another take it.
        """
        with self._database.reading() as session:
            row = session.scalar(select(_Person).where(_Person.subject == subject))
            return self._standing(row) if row is not None else None

    def people(self, state: State | None = None, search: str = "", limit: int = 100, offset: int = 0) -> list[Standing]:
        """Those whose state changed last come first.

        :param search: a part of the username
        """
        query = select(_Person).order_by(_Person.since.desc(), _Person.id.desc()).limit(limit).offset(offset)
        if state is not None:
            query = query.where(_Person.state == state)
        if search:
            query = query.where(_Person.folded.contains(_fold(search), autoescape=True))
        with self._database.reading() as session:
            return [self._standing(row) for row in session.scalars(query)]

    def count(self) -> dict[State, int]:
        """How many people there are in each state."""
        query = select(_Person.state, func.count()).group_by(_Person.state)
        with self._database.reading() as session:
            return {State(state): number for state, number in session.execute(query)}

    def usernames(self, numbers: Iterable[int]) -> dict[int, str]:
        """Of these people, by their number; of those that are known."""
        found: dict[int, str] = {}
        with self._database.reading() as session:
            for some in _portions(list(numbers)):
                query = select(_Person.id, _Person.username).where(_Person.id.in_(some))
                found |= dict(session.execute(query).all())
        return found

    # ---- decisions

    def decide(self, usernames: Iterable[str], action: Action, by: str, reason: str = "") -> list[Standing]:
        """All of them or, where a name or the reason is none, nobody (`MembershipError`).

        Names that were never here are entered. Whoever is kept out from now on loses his certificates and leases.

        :param by: who decides
        :param reason: told to the person; needed for all but `approve`
        """
        reason = one_line(reason, MOST_REASON, "a reason")
        if not reason and action != "approve":
            raise MembershipError(f"to {action} somebody takes a reason, which that person is told; give one")
        state = _STATE_AFTER[action]
        with self._database.session() as session:
            rows = self._entered(session, usernames)
            self._decide(
                session, [row for row in rows if (row.state, row.reason) != (state, reason)], state, action, by, reason
            )
            return [self._standing(row) for row in rows]

    def set_moderator(self, username: str, is_moderator: bool, by: str) -> Standing:
        """Moderators decide about others. The organizer names them."""
        with self._database.session() as session:
            [row] = self._entered(session, [username])
            if row.is_moderator != is_moderator:
                row.is_moderator = is_moderator
                self._note(session, by, "moderator" if is_moderator else "no moderator", row.username)
            return self._standing(row)

    def is_moderator(self, username: str) -> bool:
        """Whoever was refused, suspended or banned is none."""
        standing = self.standing(username)
        return standing.is_moderator and not standing.may_not

    def rules(self) -> list[str]:
        """Organisations whose members are approved when they sign in."""
        with self._database.reading() as session:
            return list(session.scalars(select(_Rule.organisation).order_by(_Rule.folded)))

    def set_rule(self, organisation: str, is_approved: bool, by: str) -> None:
        """Raises `MembershipError` where that cannot be an organisation's name."""
        if not _HUB_NAME.fullmatch(organisation):
            raise MembershipError(f"{printable(organisation, 100)!r} cannot be an organisation on the Hugging Face hub")
        folded = _fold(organisation)
        with self._database.session() as session:
            before = session.get(_Rule, folded)
            if is_approved == (before is not None):
                return
            if before is None:
                session.add(_Rule(folded=folded, organisation=organisation))
            else:
                session.delete(before)
            self._note(session, by, "rule" if is_approved else "no rule", organisation)

    def log(self, limit: int = 100) -> list[Decision]:
        """The newest first."""
        query = select(_Decision).order_by(_Decision.id.desc()).limit(limit)
        with self._database.reading() as session:
            return [Decision(row.time, row.by, row.action, row.username, row.reason) for row in session.scalars(query)]

    def note(self, by: str, action: str, reason: str = "") -> None:
        """Into the log, what is no decision about a person."""
        with self._database.session() as session:
            note_decision(session, self._now(), by, action, reason=reason)

    # ---- for admission: in a transaction of its own

    def identify(self, session: Session, person: Person) -> tuple[int, Standing]:
        """`sign_in`, with the number that this person has in other tables."""
        row = self._arrive(session, person)
        return row.id, self._standing(row)

    def person(self, session: Session, number: int) -> Standing:
        return self._standing(session.get_one(_Person, number))

    def number(self, session: Session, username: str) -> int:
        """By which other tables know a person. Raises `MembershipError` for nobody that is known."""
        return self._known(session, username).id

    def numbers(self, session: Session) -> dict[int, str]:
        """All usernames, by the number that other tables know them by."""
        return dict(session.execute(select(_Person.id, _Person.username)).all())

    # ---- rows

    def _arrive(self, session: Session, person: Person) -> _Person:
        username = _username(person.username)
        row = _find(session, username)
        if person.provider == "local":
            return row or self._enter(session, username)
        if not person.subject:
            raise MembershipError("the provider did not say which account this is; sign in again")
        before = session.scalar(select(_Person).where(_Person.subject == person.subject))
        if before is not None and before is not row:
            self._rename(session, before, row, username)
            row = before
        if row is None:
            row = self._enter(session, username)
        if row.subject is None:
            row.subject = person.subject
        if row.subject != person.subject:
            raise MembershipError(
                f"the name {row.username} belongs to another account here, one that has had it before; "
                "ask a moderator of the run"
            )
        row.username = username  # in the letters that the provider uses
        self._follow_rules(session, row, person.organisations)
        return row

    def _rename(self, session: Session, row: _Person, taken: _Person | None, username: str) -> None:
        """An account has another name now, and keeps where it stands, the more so where it is kept out."""
        if taken is not None and taken.subject is not None:
            raise MembershipError(
                f"the name {username} belongs to another account here, one that has had it before; "
                "ask a moderator of the run"
            )
        if taken is not None:  # a name that moderators spoke of before anybody signed in with it
            if State(row.state) not in _SHUT_OUT and taken.state != State.NEW:
                row.is_moderator = row.is_moderator or taken.is_moderator
                self._decide(session, [row], State(taken.state), "rename", taken.by, taken.reason)
            session.delete(taken)
            session.flush()
        self._note(session, username, "rename", username, f"was {row.username}")
        row.username, row.folded = username, _fold(username)

    def _follow_rules(self, session: Session, row: _Person, organisations: Sequence[str]) -> None:
        if row.state not in (State.NEW, State.ASKED) or not organisations:
            return
        query = select(_Rule.organisation).where(_Rule.folded.in_([_fold(name) for name in organisations]))
        organisation = session.scalar(query.order_by(_Rule.folded))
        if organisation is not None:
            self._decide(session, [row], State.APPROVED, "approve", f"rule: member of {organisation}", "")

    def _known(self, session: Session, username: str) -> _Person:
        row = _find(session, username)
        if row is None:
            raise MembershipError(f"nobody named {printable(username, _MOST_USERNAME)!r} signed in here")
        return row

    def _entered(self, session: Session, usernames: Iterable[str]) -> list[_Person]:
        """All of them, each once; those that are not known are entered."""
        names = {_fold(name): name for name in map(_username, usernames)}
        rows: dict[str, _Person] = {}
        for some in _portions(list(names)):
            rows |= {row.folded: row for row in session.scalars(select(_Person).where(_Person.folded.in_(some)))}
        for folded, name in names.items():
            if folded not in rows:
                rows[folded] = self._make(name)
        session.add_all(rows.values())
        session.flush()
        return [rows[folded] for folded in names]

    def _enter(self, session: Session, username: str) -> _Person:
        row = self._make(username)
        session.add(row)
        session.flush()
        return row

    def _make(self, username: str) -> _Person:
        return _Person(
            folded=_fold(username),
            username=username,
            state=State.NEW.value,
            reason="",
            since=self._now(),
            by="",
            is_moderator=False,
        )

    def _decide(
        self, session: Session, rows: Sequence[_Person], state: State, action: str, by: str, reason: str
    ) -> None:
        for row in rows:
            row.state, row.reason, row.by, row.since = state.value, reason, by, self._now()
            self._note(session, by, action, row.username, reason)
        if state in _SHUT_OUT:
            for people in _portions([row.id for row in rows]):
                end_leases(session, Lease.person.in_(people))
                revoke(session, Granted.person.in_(people))

    def _note(self, session: Session, by: str, action: str, username: str, reason: str = "") -> None:
        note_decision(session, self._now(), by, action, username, reason)

    def _standing(self, row: _Person) -> Standing:
        return Standing(row.username, State(row.state), row.reason, row.since, row.by, row.is_moderator, row.id)


def kept_out() -> Select[int]:
    """The numbers of all whom a moderator keeps out."""
    return select(_Person.id).where(_Person.state.in_(_SHUT_OUT))


def note_decision(session: Session, now: float, by: str, action: str, username: str = "", reason: str = "") -> None:
    """Into the log of who did what, in the transaction that does it.

    :param username: whom it is about; empty: everybody
    """
    session.add(_Decision(time=now, by=by, action=action, username=username, reason=reason))


def parse_names(text: str) -> list[str]:
    """Usernames of a pasted list, or of a CSV file: one a line, or in the column `username`; each once.

    `@` before a name, empty lines and lines that begin with # are no matter. Raises `MembershipError` with the line
    that is no username, and for more than `MOST_NAMES`.
    """
    reader = csv.reader(text.removeprefix("\ufeff").splitlines())
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise MembershipError(f"this is no list of usernames, nor a CSV file ({error})") from None
    rows = [(number, row) for number, row in rows if not row[0].lstrip().startswith("#")]
    column, is_table = 0, False
    if rows and "username" in (header := [cell.strip().lower() for cell in rows[0][1]]):
        column, is_table, rows = header.index("username"), True, rows[1:]
    if len(rows) > MOST_NAMES:
        raise MembershipError(f"{len(rows):,} names are more than {MOST_NAMES:,}; give them in several lists")
    names: dict[str, str] = {}
    for number, row in rows:
        name = row[column].strip().removeprefix("@") if column < len(row) else ""
        if len(row) > 1 and not is_table:
            name = ""  # which of them?
        if not _HUB_NAME.fullmatch(name):
            raise MembershipError(f"line {number}: {printable(','.join(row), 60)!r} is no username")
        names.setdefault(_fold(name), name)
    return list(names.values())


def _portions(values: Sequence[_Value], size: int = 500) -> Iterator[Sequence[_Value]]:
    """One statement has a limit of values."""
    return (values[start : start + size] for start in range(0, len(values), size))


def _find(session: Session, username: str) -> _Person | None:
    return session.scalar(select(_Person).where(_Person.folded == _fold(username)))


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _username(name: str) -> str:
    name = one_line(name.removeprefix("@"), _MOST_USERNAME, "a username")
    if not name:
        raise MembershipError("a username is empty; give one")
    return name


def one_line(text: str, most: int, what: str) -> str:
    """What a person wrote, without space around it. Raises `MembershipError` where it is longer, or not one line."""
    text = text.strip()
    if len(text) > most or printable(text, most) != text:
        raise MembershipError(f"{printable(text, 60)!r} cannot be {what}: one line of at most {most} characters")
    return text
