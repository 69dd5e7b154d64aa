"""The allowlist: who is who, who may join, who decided that; and how people want to be known to everybody.

A person's number is for good: it is in other tables and in public addresses. Who leaves for good leaves the number, and
nothing else, so that what was done in it still adds up.
"""

import csv
import hashlib
import hmac
import re
import secrets
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeVar

from rapidfuzz import fuzz
from sqlalchemy import Select, String, delete, func, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.database import Database, Table
from kantha.coordinator.leases import Granted, Lease, Machine, end_leases, revoke
from kantha.coordinator.ledger import forget_person
from kantha.errors import MembershipError, printable

MOST_NAMES = 5_000  # in one pasted list
MOST_REASON = 300  # characters
LEAST_NAME, MOST_NAME = 2, 40  # characters of a nickname, or of a team's name
SOMEONE_WHO_LEFT = "someone who left"  # in the decisions, instead of a name
_MOST_USERNAME = 96  # characters, as on the Hugging Face hub
_MOST_BY = 120  # characters: a username, or the name of a rule
# of the hub's users and organisations: https://huggingface.co/docs/huggingface_hub/package_reference/utilities
_MOST_KEY = 120  # characters of a name as it is compared: a letter may become several
_TOO_ALIKE = 90.0  # percent of two teams' names that is the same
_LEFT = "left"  # state of a number whose person is gone; nobody is found in it
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


class Shown(StrEnum):
    """How a person is shown to everybody."""

    NAME = "name"  # the username
    NICKNAME = "nickname"
    HIDDEN = "hidden"


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
class Team:
    """Some people who count together."""

    number: int
    name: str
    people: int


@dataclass(frozen=True)
class Profile:
    """How a person is known."""

    number: int
    username: str
    shown: Shown
    nickname: str
    team: Team | None

    @property
    def name(self) -> str | None:
        """To everybody; None: hidden."""
        return _public_name(self.shown, self.username, self.nickname)


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
    shown: Mapped[str] = mapped_column(String(10), default=Shown.NAME.value, server_default=Shown.NAME.value)
    nickname: Mapped[str | None] = mapped_column(String(MOST_NAME))
    nickname_key: Mapped[str | None] = mapped_column(String(_MOST_KEY), unique=True, index=True)  # as compared
    team: Mapped[int | None] = mapped_column(index=True)


class _Team(Table):
    __tablename__ = "teams"
    __table_args__ = ({"sqlite_autoincrement": True},)  # the number of one that is gone is never another's
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(MOST_NAME))
    key: Mapped[str] = mapped_column(String(_MOST_KEY), unique=True)  # the name as it is compared
    founded: Mapped[float]


class _KeptOut(Table):
    """An account that was kept out when its owner left for good, and will be again. Nothing else is known of it."""

    __tablename__ = "kept_out"
    account: Mapped[str] = mapped_column(String(64), primary_key=True)  # keyed hash
    state: Mapped[str] = mapped_column(String(10))


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
        accounts_key: bytes | None = None,
    ) -> None:
        """
        :param notify: told the username of everybody who asks, once
        :param accounts_key: of the run, under which accounts are remembered that were kept out when they left for good;
            None: they are for as long as this object lives
        """
        self._database = database
        self._accounts_key = accounts_key or secrets.token_bytes(32)
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
        query = select(_Person).where(_Person.state != _LEFT)
        query = query.order_by(_Person.since.desc(), _Person.id.desc()).limit(limit).offset(offset)
        if state is not None:
            query = query.where(_Person.state == state)
        if search:
            query = query.where(_Person.folded.contains(_fold(search), autoescape=True))
        with self._database.reading() as session:
            return [self._standing(row) for row in session.scalars(query)]

    def count(self) -> dict[State, int]:
        """How many people there are in each state."""
        query = select(_Person.state, func.count()).where(_Person.state != _LEFT).group_by(_Person.state)
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

    # ---- how people are known

    def shown(self) -> dict[int, str]:
        """The name of everybody who is shown to everybody, by number; who is hidden, or left for good, is not in it."""
        query = select(_Person.id, _Person.shown, _Person.username, _Person.nickname).where(_Person.state != _LEFT)
        with self._database.reading() as session:
            names = {
                number: _public_name(Shown(shown), username, nickname)
                for number, shown, username, nickname in session.execute(query)
            }
        return {number: name for number, name in names.items() if name is not None}

    def profile(self, username: str) -> Profile:
        """Raises `MembershipError` for nobody that is known."""
        with self._database.reading() as session:
            return self._profile(session, self._known(session, username))

    def profile_of(self, number: int) -> Profile | None:
        """None: nobody has this number, or not any longer."""
        with self._database.reading() as session:
            row = session.get(_Person, number)
            return self._profile(session, row) if row is not None and row.state != _LEFT else None

    def show_as(self, username: str, shown: Shown, nickname: str = "") -> Profile:
        """How to show this person from now on, everywhere. Raises `MembershipError` where the nickname is not free, or
        cannot be one; nothing is changed then.

        :param nickname: kept where it is empty
        """
        with self._database.session() as session:
            row = self._known(session, username)
            if nickname.strip():
                name, key = _chosen_name(nickname, "a nickname")
                other = select(_Person.id).where(_Person.nickname_key == key, _Person.id != row.id)
                if session.scalar(other) is not None or self._is_username(session, key, row.id):
                    raise MembershipError(
                        f"somebody here is called {printable(name, 60)!r} already; choose another name"
                    )
                row.nickname, row.nickname_key = name, key
            if shown is Shown.NICKNAME and not row.nickname:
                raise MembershipError("to be shown by a nickname takes one; write it down")
            row.shown = shown.value
            session.flush()
            return self._profile(session, row)

    def take_nickname(self, number: int, by: str, reason: str) -> None:
        """A moderator takes a nickname away; its owner is hidden until he chooses again. Raises `MembershipError`."""
        reason = _reason(reason, "take a nickname away")
        with self._database.session() as session:
            row = session.get(_Person, number)
            if row is None or not row.nickname:
                raise MembershipError(f"nobody numbered {number} has a nickname")
            self._note(session, by, "no nickname", row.username, reason)
            row.nickname = row.nickname_key = None

    # ---- teams

    def teams(self) -> list[Team]:
        """All, by name."""
        with self._database.reading() as session:
            query = (
                select(_Team.id, _Team.name, func.count(_Person.id))
                .outerjoin(_Person, _Person.team == _Team.id)
                .group_by(_Team.id, _Team.name, _Team.key)
                .order_by(_Team.key)
            )
            return [Team(*row) for row in session.execute(query)]

    def teams_of_people(self) -> dict[int, Team]:
        """By the number of each person who is in one."""
        teams = {team.number: team for team in self.teams()}
        query = select(_Person.id, _Person.team).where(_Person.team.is_not(None))
        with self._database.reading() as session:
            return {person: teams[team] for person, team in session.execute(query) if team in teams}

    def found_team(self, username: str, name: str) -> Team:
        """A new team, with this person in it, who leaves the one before. Raises `MembershipError` for a name that
        cannot be one, or could be mistaken for another team's."""
        name, key = _chosen_name(name, "a team's name")
        letters = _letters(key)
        with self._database.session() as session:
            row = self._known(session, username)
            for other in session.scalars(select(_Team)):
                if _are_alike(letters, _letters(other.key)):
                    raise MembershipError(
                        f"there is a team {other.name!r} already: join that one, or choose a name less like it"
                    )
            team = _Team(name=name, key=key, founded=self._now())
            session.add(team)
            session.flush()
            self._put_into(session, row, team.id)
            return Team(team.id, team.name, 1)

    def join_team(self, username: str, number: int | None) -> None:
        """This person counts for that team from now on, with everything; None: for no team.

        Raises `MembershipError` where there is no such team.
        """
        with self._database.session() as session:
            row = self._known(session, username)
            if number is not None and session.get(_Team, number) is None:
                raise MembershipError("this team is gone: the last one has left it; found it anew")
            self._put_into(session, row, number)

    def dissolve_team(self, number: int, by: str, reason: str) -> None:
        """A moderator ends a team; its people stay, without one. Raises `MembershipError`."""
        reason = _reason(reason, "dissolve a team")
        with self._database.session() as session:
            team = session.get(_Team, number)
            if team is None:
                raise MembershipError("this team is gone already")
            self._note(session, by, "no team", team.name, reason)
            session.execute(update(_Person).where(_Person.team == number).values(team=None))
            session.delete(team)

    def _put_into(self, session: Session, row: _Person, team: int | None) -> None:
        before, row.team = row.team, team
        session.flush()
        if before is None or before == team:
            return
        if session.scalar(select(_Person.id).where(_Person.team == before).limit(1)) is None:
            session.execute(delete(_Team).where(_Team.id == before))  # nobody is left in it

    # ---- leaving for good

    def forget(self, username: str) -> int:
        """Drop all that is known of a person: names, account, team, machines, sessions. Returns the number, under which
        the samples stay, so that all totals do. Raises `MembershipError` for nobody that is known.

        Certificates and leases end. Who was kept out stays so: of that account a keyed hash is remembered.
        """
        with self._database.session() as session:
            row = self._known(session, username)
            number = row.id
            if row.state in _SHUT_OUT:
                session.merge(_KeptOut(account=self._account(row.subject, row.folded), state=row.state))
            self._forget_decisions(session, row)
            self._put_into(session, row, None)
            end_leases(session, Lease.person == number)
            revoke(session, Granted.person == number)
            session.execute(update(Granted).where(Granted.person == number).values(certificate=""))  # it has the name
            session.execute(delete(Machine).where(Machine.person == number))
            forget_person(session, number)
            row.folded = f"\n{number}"  # which no name can be: it is one line
            row.username, row.subject, row.state, row.reason, row.by = "", None, _LEFT, "", ""
            row.nickname = row.nickname_key = None
            row.shown, row.is_moderator, row.since = Shown.HIDDEN.value, False, self._now()
        return number

    def _forget_decisions(self, session: Session, row: _Person) -> None:
        """They stay, without the name; an earlier one counts as this person's unless somebody else has it now."""
        decisions = list(session.scalars(select(_Decision).order_by(_Decision.id.desc())))
        names = {row.folded}
        for decision in decisions:
            if decision.action == "rename" and _fold(decision.username) in names:
                before = decision.reason.removeprefix("was ")
                if _find(session, before) is None:
                    names.add(_fold(before))
        for decision in decisions:
            if _fold(decision.username) in names:
                decision.username, decision.reason = SOMEONE_WHO_LEFT, ""
            if _fold(decision.by) in names:
                decision.by = SOMEONE_WHO_LEFT
        others = session.scalars(select(_Person).where(_Person.by != "", _Person.id != row.id))
        for other in others:
            if _fold(other.by) in names:
                other.by = SOMEONE_WHO_LEFT

    def _account(self, subject: str | None, folded: str) -> str:
        """A keyed hash of an account, or of a name that nobody has signed in with."""
        account = f"account {subject}" if subject is not None else f"name {folded}"
        return hmac.new(self._accounts_key, account.encode(), hashlib.sha256).hexdigest()

    def _remember(self, session: Session, row: _Person) -> None:
        """Who was kept out when he left for good is kept out again."""
        kept = None
        for account in {self._account(row.subject, row.folded), self._account(None, row.folded)}:
            if (found := session.get(_KeptOut, account)) is not None:
                session.delete(found)
                kept = found
        if kept is not None:
            reason = "you were kept out before you left; a moderator can take it back"
            self._decide(session, [row], State(kept.state), "kept out", "the run", reason)

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
        return dict(session.execute(select(_Person.id, _Person.username).where(_Person.state != _LEFT)).all())

    # ---- rows

    def _arrive(self, session: Session, person: Person) -> _Person:
        username = _username(person.username)
        row = _find(session, username)
        if person.provider == "local":
            if row is None:
                row = self._enter(session, username)
                self._remember(session, row)
            return row
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
            self._remember(session, row)
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
        self._free_nickname(session, row)

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
        self._free_nickname(session, row)
        return row

    def _free_nickname(self, session: Session, row: _Person) -> None:
        """Nobody else is called by the username of one who came; whoever was is hidden until he chooses again."""
        others = update(_Person).where(_Person.nickname_key == _key(row.username), _Person.id != row.id)
        session.execute(others.values(nickname=None, nickname_key=None))

    def _is_username(self, session: Session, key: str, but: int) -> bool:
        names = session.scalars(select(_Person.username).where(_Person.id != but, _Person.state != _LEFT))
        return any(_key(name) == key for name in names)

    def _profile(self, session: Session, row: _Person) -> Profile:
        team = None
        if row.team is not None and (found := session.get(_Team, row.team)) is not None:
            people = session.scalar(select(func.count()).where(_Person.team == found.id))
            team = Team(found.id, found.name, people or 0)
        return Profile(row.id, row.username, Shown(row.shown), row.nickname or "", team)

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


def _public_name(shown: Shown, username: str, nickname: str | None) -> str | None:
    match shown:
        case Shown.NAME:
            return username
        case Shown.NICKNAME:
            return nickname or None
        case Shown.HIDDEN:
            return None


def _chosen_name(name: str, what: str) -> tuple[str, str]:
    """A name that somebody thought of, and how it is compared. Raises `MembershipError`."""
    name = one_line(" ".join(filter(None, name.split(" "))), MOST_NAME, what)
    key = _key(name)
    if len(name) < LEAST_NAME or not any(letter.isalnum() for letter in key):
        raise MembershipError(f"{what} takes at least {LEAST_NAME} characters, and a letter or digit among them")
    if len(key) > _MOST_KEY:
        raise MembershipError(f"{what} cannot be {printable(name, 60)!r}; choose simpler letters")
    return name, key


def _key(name: str) -> str:
    """What two names have in common that people take for the same: form and case of letters, joiners, blanks."""
    plain = unicodedata.normalize("NFKC", name).casefold().replace("\u200c", "").replace("\u200d", "")
    return " ".join(unicodedata.normalize("NFKC", plain).split())


def _letters(key: str) -> str:
    """Without what stands between them; vowel signs are marks."""
    return "".join(letter for letter in key if letter.isalnum() or unicodedata.category(letter).startswith("M"))


def _are_alike(one: str, other: str) -> bool:
    """Whether two names, of letters only, may be taken for each other; "class 10" and "class 11" are two."""
    if one == other:
        return True
    digits = [[letter for letter in name if letter.isdigit()] for name in (one, other)]
    return digits[0] == digits[1] and fuzz.ratio(one, other) >= _TOO_ALIKE


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


def _reason(reason: str, to: str) -> str:
    reason = one_line(reason, MOST_REASON, "a reason")
    if not reason:
        raise MembershipError(f"to {to} takes a reason; give one")
    return reason


def one_line(text: str, most: int, what: str) -> str:
    """What a person wrote, without space around it. Raises `MembershipError` where it is longer, or not one line."""
    text = text.strip()
    if len(text) > most or printable(text, most) != text:
        raise MembershipError(f"{printable(text, 60)!r} cannot be {what}: one line of at most {most} characters")
    return text
