"""Admission: what a peer asks is checked, and answered with a certificate, a code to sign in by, or a refusal."""

import base64
import binascii
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import ValidationError
from sqlalchemy import ColumnElement, String, delete, func, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha import api
from kantha.coordinator.allowlist import Allowlist, Person, Standing, State, note_decision
from kantha.coordinator.bulletin import Bulletin
from kantha.coordinator.certificate import Certificate as ContributionCertificate
from kantha.coordinator.certificate import Contribution
from kantha.coordinator.database import Database, Table, insert
from kantha.coordinator.leases import (
    LEASE_SECONDS,
    Granted,
    Instance,
    Lease,
    Machine,
    end_leases,
    enter_stay,
    instances,
    revoke,
)
from kantha.coordinator.ledger import enter_member
from kantha.coordinator.limiter import CERTIFICATES, PAIRINGS, REQUESTS, STRANGERS, Limiter
from kantha.errors import LeaseError, MembershipError
from kantha.spec import RunSpec
from kantha.swarm.membership import (
    CLOCK_SKEW,
    LIFETIME,
    RENEWAL,
    Certificate,
    DepartureRequest,
    DownloadRequest,
    KeyChange,
    MembershipRequest,
    Notice,
    PeerRequest,
    RunKey,
    Trust,
)

SignIn = Literal["local", "huggingface"]
RENEW_SECONDS = 45.0  # a lease is lost when four of them are
POLL_SECONDS = 3.0
PAIRING_SECONDS = 600.0
CODE_LETTERS = "ACDEFGHJKMNPQRTVWXY34679"  # none that looks like another
_CODE_LENGTH = 8
_NONCE_SECONDS = 600  # that a nonce is kept: for longer than its request could be used anyway
_MOST_REVOKED = 5_000  # in a notice
_MOST_HEADER = 8_000  # characters
_CLEAN_SECONDS = 60.0  # between two times that what has ended is dropped
_log = logging.getLogger(__name__)


class _Nonce(Table):
    """A request that was used."""

    __tablename__ = "nonces"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    nonce: Mapped[str] = mapped_column(String(32), primary_key=True)
    issued: Mapped[int] = mapped_column(index=True)


class _Pairing(Table):
    """A code that waits for somebody to say that this machine is his."""

    __tablename__ = "pairings"
    code: Mapped[str] = mapped_column(String(_CODE_LENGTH), primary_key=True)
    peer_id: Mapped[str] = mapped_column(String(80), index=True)
    service: Mapped[str] = mapped_column(String(20))
    instance: Mapped[str] = mapped_column(String(60))
    asked: Mapped[float]
    is_used: Mapped[bool] = mapped_column(default=False)


class _LastNotice(Table):
    __tablename__ = "notice"
    id: Mapped[int] = mapped_column(primary_key=True)
    signer: Mapped[str] = mapped_column(String(64))  # public key of the run, in hex
    notice: Mapped[str]  # as JSON


@dataclass(frozen=True)
class Pairing:
    """A machine that waits for its owner."""

    code: str  # as people read it: ABCD-EFGH
    service: str
    instance: str
    asked: float  # seconds since 1970


class Admission:
    """Safe to use from several threads. All methods raise `StorageError` where the disk refuses."""

    def __init__(
        self,
        database: Database,
        spec: RunSpec,
        key: RunKey,
        sign_in: SignIn,
        allowlist: Allowlist,
        now: Callable[[], float] = time.time,
        changes: Sequence[KeyChange] = (),
    ) -> None:
        """
        :param key: the run's newest
        :param changes: of the run's key, oldest first
        """
        self._bulletin = Bulletin(database, now)
        self._sign_in = sign_in
        self._database = database
        self._spec = spec
        self._key = key
        self._changes = tuple(changes)
        self._allowlist = allowlist
        self._now = now
        self._limiter = Limiter()
        self._lock = threading.Lock()  # of key and changes, which belong together
        self._cleaned = float("-inf")
        database.migrate()

    # ---- what peers ask

    def admit(self, request: MembershipRequest) -> api.Admission | api.Waiting:
        """Let a peer in, or let it stay. Raises `MembershipError`, and `LeaseError` where its place is taken."""
        peer_id = self._verified(request)
        with self._database.session() as session:
            owner = self._owner(session, request, peer_id)
            if owner is None:
                return self._pair(session, request, peer_id)
            answer = self._answer(session, request, peer_id, *owner)
        return self._ask(answer) if isinstance(answer, Standing) else answer

    def sign_in_with(self, request: MembershipRequest, person: Person) -> api.Admission | api.Waiting:
        """`admit`, for a peer whose owner signed in by a token. Raises what `admit` raises."""
        if self._sign_in == "local":
            raise MembershipError("this run knows no sign-in; join without a token, with --name")
        peer_id = self._verified(request)
        with self._database.session() as session:
            owner = self._allowlist.identify(session, person)
            self._belongs(session, peer_id, owner[0])
        with self._database.session() as session:
            answer = self._answer(session, request, peer_id, *owner)
        return self._ask(answer) if isinstance(answer, Standing) else answer

    def depart(self, request: DepartureRequest) -> None:
        """A peer gives its lease back. Raises `MembershipError`."""
        peer_id = self._verified(request)
        with self._database.session() as session:
            lease = session.get(Lease, peer_id)
            if lease is not None:
                lease.renewed = self._now()
                enter_stay(session, lease, goes_on=True)
                session.delete(lease)

    def check_download(self, header: str) -> None:
        """Whether a member asks, by the Authorization header. Raises `MembershipError`."""
        scheme, _, encoded = header.partition(" ")
        try:
            if scheme != "Kantha" or len(encoded) > _MOST_HEADER:
                raise ValueError
            request = DownloadRequest.model_validate_json(base64.b64decode(encoded, altchars=b"-_", validate=True))
        except (ValidationError, binascii.Error, ValueError):
            raise MembershipError("checkpoints are for members: `kantha join` shows that it is one") from None
        peer_id = self._verified(request)
        with self._database.reading() as session:
            query = select(Granted.serial).where(Granted.peer_id == peer_id, *self._in_force())
            if session.scalar(query.limit(1)) is None:
                raise MembershipError("this peer has no certificate now; join first")

    def _verified(self, request: PeerRequest) -> str:
        """The peer that asks, for this run, now, and for the first time."""
        if request.run != self._spec.fingerprint:
            raise MembershipError("this is another run than the one asked for; check the address and join again")
        peer_id = request.verified_peer_id()
        self._limiter.hit(REQUESTS, request.purpose, peer_id)
        if self._sign_in != "local":
            with self._database.reading() as session:
                is_known = session.get(Machine, peer_id) is not None
            if not is_known:
                self._limiter.hit(STRANGERS, "stranger", request.purpose)
        # in a transaction of its own: whatever comes of the request, it was used
        with self._database.session() as session:
            self._clean(session)
            statement = insert(session, _Nonce).values(peer_id=peer_id, nonce=request.nonce, issued=request.issued)
            is_new = session.scalar(statement.on_conflict_do_nothing().returning(_Nonce.nonce)) is not None
            if not is_new:
                raise MembershipError("this request was used before; join again")
        return peer_id

    # ---- whose peer it is

    def _owner(self, session: Session, request: MembershipRequest, peer_id: str) -> tuple[int, Standing] | None:
        """None: nobody has said so yet."""
        if self._sign_in == "local":
            if not request.username:
                raise MembershipError("a run without sign-in asks for your name; give one with --name")
            return self._allowlist.identify(session, Person(request.username, "", "local", ()))
        machine = session.get(Machine, peer_id)
        return (machine.person, self._allowlist.person(session, machine.person)) if machine is not None else None

    def _pair(self, session: Session, request: MembershipRequest, peer_id: str) -> api.Waiting:
        query = select(_Pairing).where(
            _Pairing.peer_id == peer_id, ~_Pairing.is_used, _Pairing.asked > self._now() - PAIRING_SECONDS
        )
        pairing = session.scalar(query.order_by(_Pairing.asked.desc()))
        if pairing is None:
            self._limiter.hit(PAIRINGS, "pairing")
            pairing = _Pairing(
                code="".join(secrets.choice(CODE_LETTERS) for _ in range(_CODE_LENGTH)),
                peer_id=peer_id,
                service=request.service,
                instance=request.instance,
                asked=self._now(),
                is_used=False,
            )
            session.add(pairing)
        code = _readable(pairing.code)
        return api.Waiting(
            state="sign_in",
            message=f"Sign in with a browser, on any device, and confirm there that this machine shows {code}.",
            code=code,
            path=f"pair?code={code}",
            expires=pairing.asked + PAIRING_SECONDS,
            poll_seconds=POLL_SECONDS,
        )

    def pairing(self, code: str) -> Pairing | None:
        """The machine that shows this code and waits; None: none does. Who asks must not try one after the other."""
        with self._database.reading() as session:
            found = session.get(_Pairing, _plain(code))
            if found is None or found.is_used or self._has_ended(found):
                return None
            return Pairing(_readable(found.code), found.service, found.instance, found.asked)

    def confirm(self, code: str, username: str) -> None:
        """The machine that shows this code is this person's. Raises `MembershipError`; a code is good for once."""
        with self._database.session() as session:
            pairing = session.get(_Pairing, _plain(code))
            if pairing is None:
                raise MembershipError("no machine shows this code; look at it again, or start `kantha join` anew")
            if pairing.is_used:
                raise MembershipError("this code was used already; each is good for one machine, once")
            if self._has_ended(pairing):
                raise MembershipError("this code has ended; the machine shows a new one")
            pairing.is_used = True
            self._belongs(session, pairing.peer_id, self._allowlist.number(session, username))

    def _has_ended(self, pairing: _Pairing) -> bool:
        return pairing.asked <= self._now() - PAIRING_SECONDS

    def _belongs(self, session: Session, peer_id: str, person: int) -> None:
        values = {"person": person, "paired": self._now()}
        statement = insert(session, Machine).values(peer_id=peer_id, **values)
        session.execute(statement.on_conflict_do_update(index_elements=["peer_id"], set_=values))
        # what it was given as another person's machine
        end_leases(session, Lease.peer_id == peer_id, Lease.person != person)
        revoke(session, Granted.peer_id == peer_id, Granted.person != person)

    # ---- the answer

    def _answer(
        self, session: Session, request: MembershipRequest, peer_id: str, person: int, standing: Standing
    ) -> api.Admission | Standing:
        """A standing: that person has to be let in first."""
        if standing.may_not:
            raise MembershipError(standing.sentence)
        if self._sign_in != "local" and standing.state != State.APPROVED:
            return standing
        self._lease(session, request, peer_id, person)
        return api.Admission(
            certificate=self._certificate(session, request, peer_id, person, standing.username),
            notice=self._notice(session),
            renew_seconds=RENEW_SECONDS,
        )

    def _ask(self, standing: Standing) -> api.Waiting:
        """To try to join is to ask."""
        if standing.state == State.NEW:
            standing = self._allowlist.ask(standing.username)
        return api.Waiting(state="asked", message=standing.sentence, poll_seconds=POLL_SECONDS)

    def _lease(self, session: Session, request: MembershipRequest, peer_id: str, person: int) -> None:
        """Renew or give the lease. Raises `MembershipError`, and `LeaseError` where all places are taken."""
        service = self._spec.services.get(request.service)
        if service is None:
            raise MembershipError(
                f"this run takes no volunteers on {request.service}, only on {', '.join(sorted(self._spec.services))}"
            )
        now = self._now()
        query = select(Lease).where(Lease.person == person, Lease.service == request.service, Lease.peer_id != peer_id)
        others = list(session.scalars(query.order_by(Lease.renewed)))
        live = [lease for lease in others if lease.renewed > now - LEASE_SECONDS]
        lease = session.get(Lease, peer_id)
        has_place = (
            lease is not None
            and (lease.person, lease.service) == (person, request.service)
            and lease.renewed > now - LEASE_SECONDS
        )
        ends: list[Lease] = []
        if request.take_over:
            ends = others
        elif not has_place:
            if len(live) >= service.max_instances:
                raise LeaseError(_taken(live, service.max_instances, now))
            # of those that fell silent, so many as this one takes the place of
            ends = [each for each in others if each not in live][: max(0, len(others) + 1 - service.max_instances)]
        if ends:
            end_leases(session, Lease.peer_id.in_([each.peer_id for each in ends]))
        if lease is None:
            lease = Lease(peer_id=peer_id, since=now)
            session.add(lease)
        elif (lease.person, lease.service) != (person, request.service):
            revoke(session, Granted.peer_id == peer_id)  # what it was given as something else
            lease.since = now
        lease.person, lease.service = person, request.service
        lease.instance, lease.renewed = request.instance, now
        enter_stay(session, lease, goes_on=has_place)

    def _certificate(
        self, session: Session, request: MembershipRequest, peer_id: str, person: int, username: str
    ) -> Certificate:
        key = self._key
        query = select(Granted).where(Granted.peer_id == peer_id, Granted.person == person, *self._in_force())
        newest = session.scalar(query.order_by(Granted.issued.desc()).limit(1))
        if newest is not None and newest.signer == key.public_key and newest.issued > self._now() - RENEWAL:
            certificate = Certificate.model_validate_json(newest.certificate)
            membership = certificate.membership
            if (membership.username, membership.service) == (username, request.service):
                return certificate
        self._limiter.hit(CERTIFICATES, str(person))
        certificate = key.certify(self._spec.fingerprint, username, peer_id, request.service)
        membership = certificate.membership
        session.add(
            Granted(
                serial=membership.serial,
                peer_id=peer_id,
                person=person,
                issued=membership.issued,
                expires=membership.expires,
                revoked=False,
                signer=key.public_key,
                certificate=certificate.model_dump_json(),
            )
        )
        enter_member(session, membership, person)
        return certificate

    def averager_certificate(self, peer_id: str) -> Certificate:
        """The coordinator's own."""
        return self._key.certify(self._spec.fingerprint, "coordinator", peer_id, roles=("averager",))

    @property
    def public_key(self) -> str:
        """The run's newest, in hex."""
        return self._key.public_key

    def attest(self, contribution: Contribution) -> ContributionCertificate:
        """Sign what somebody gave to the run, by its newest key."""
        return contribution.signed(self._key, self._now())

    def trust(self) -> Trust:
        """What the coordinator's own peer believes: all keys that the run has had, and the newest notice."""
        with self._lock:
            first = self._changes[0].old if self._changes else self._key.public_key
        trust = Trust(self._spec.fingerprint, first)
        trust.take(self.notice())
        return trust

    # ---- what all peers are told

    def notice(self) -> str:
        """The newest, as JSON; made anew where it would not say what is true by now, whatever program changed that."""
        with self._database.reading() as session:
            newest = self._told(session, self._revoked(session))
        if newest is not None:
            return newest
        with self._database.session() as session:
            return self._notice(session)

    def _notice(self, session: Session) -> str:
        session.flush()
        revoked = self._revoked(session)
        newest = self._told(session, revoked)
        if newest is not None:
            return newest
        with self._lock:
            key, changes = self._key, self._changes
        row = session.get(_LastNotice, 1)
        number = Notice.model_validate_json(row.notice).number if row is not None else 0
        announcements, paused = self._bulletin.told(session)
        notice = key.notify(self._spec.fingerprint, revoked, changes, number, announcements, paused)
        session.merge(_LastNotice(id=1, signer=key.public_key, notice=notice.model_dump_json()))
        return notice.model_dump_json()

    def _told(self, session: Session, revoked: dict[str, int]) -> str | None:
        """The newest notice, if it says this; None: another one has to be made."""
        row = session.get(_LastNotice, 1)
        if row is None:
            return None
        last = Notice.model_validate_json(row.notice)
        with self._lock:
            says = (revoked, self._changes, self._key.public_key, *self._bulletin.told(session))
        said = (last.revoked, last.changes, row.signer, last.announcements, last.paused)
        return row.notice if said == says else None

    def _revoked(self, session: Session) -> dict[str, int]:
        """When each revoked certificate ends, by its serial; for a little longer than any clock may be slow."""
        query = select(Granted.serial, Granted.expires).where(
            Granted.revoked, Granted.expires > self._now() - 2 * CLOCK_SKEW
        )
        found = session.execute(query.order_by(Granted.expires.desc()).limit(_MOST_REVOKED + 1)).all()
        if len(found) > _MOST_REVOKED:
            _log.warning("more than %d certificates are revoked; those that end first are not told", _MOST_REVOKED)
        return dict(found[:_MOST_REVOKED])

    def rotate(self, key: RunKey, changes: Sequence[KeyChange]) -> None:
        """Sign with another key from now on. Members get certificates by it when they renew.

        :param changes: all of the run's key, oldest first
        """
        with self._lock:
            self._key, self._changes = key, tuple(changes)

    # ---- what runs where

    def leases(self, username: str) -> list[Instance]:
        """This person's machines that have a place now. Raises `MembershipError` for nobody that is known."""
        with self._database.reading() as session:
            person = self._allowlist.number(session, username)
            return instances(session, self._allowlist.numbers(session), person, self._now())

    def all_leases(self) -> list[Instance]:
        """All machines that have a place now; the oldest first."""
        with self._database.reading() as session:
            return instances(session, self._allowlist.numbers(session), now=self._now())

    def end_lease(self, peer_id: str, by: str) -> str:
        """Free the place of a machine; returns whose. One that is alive asks for it again.

        Raises `MembershipError` where it has none.
        """
        with self._database.session() as session:
            lease = session.get(Lease, peer_id)
            if lease is None:
                raise MembershipError("that machine has no place any more")
            username = self._allowlist.numbers(session).get(lease.person, "?")
            note_decision(session, self._now(), by, "end lease", username, lease.instance or lease.service)
            end_leases(session, Lease.peer_id == peer_id)
        return username

    def restart(self) -> None:
        """The coordinator was away: leases that were alive when it stopped live on, for their peers to renew them."""
        now = self._now()
        with self._database.session() as session:
            last = session.scalar(select(func.max(Lease.renewed)))
            if last is not None:
                alive = Lease.renewed > min(last, now) - LEASE_SECONDS
                session.execute(update(Lease).where(alive).values(renewed=now))

    def _in_force(self) -> tuple[ColumnElement[bool], ...]:
        return (~Granted.revoked, Granted.expires > self._now())

    def _clean(self, session: Session) -> None:
        now = self._now()
        if now - self._cleaned < _CLEAN_SECONDS:
            return
        self._cleaned = now
        session.execute(delete(_Nonce).where(_Nonce.issued < now - _NONCE_SECONDS))
        session.execute(delete(_Pairing).where(_Pairing.asked < now - 2 * PAIRING_SECONDS))
        session.execute(delete(Granted).where(Granted.expires < now - LIFETIME))
        session.execute(delete(Lease).where(Lease.renewed < now - LIFETIME))


def _taken(live: Sequence[Lease], places: int, now: float) -> str:
    lease = live[-1]
    where = f"on {lease.service}" + (f" ({lease.instance})" if lease.instance else "")
    since = in_words(now - lease.since)
    others = f", and {places - 1} more" if places > 1 else ""
    return (
        f"you have a machine {where} in this run, for {since} now{others}; this run takes {places} of yours there at a "
        "time. End it there, or join here with --take-over, which ends it at once; one that was killed makes room by "
        "itself, after 3 minutes at most"
    )


def in_words(seconds: float) -> str:
    """A length of time for people: 45 s, 12 min, 2 h 10 min, 3 days."""
    minutes = int(max(0.0, seconds)) // 60
    if minutes < 1:
        return f"{int(max(0.0, seconds))} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def _readable(code: str) -> str:
    return f"{code[:4]}-{code[4:]}"


def _plain(code: str) -> str:
    """As a person may have typed it."""
    return "".join(letter for letter in code[:40].upper() if letter.isalnum())
