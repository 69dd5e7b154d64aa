"""What runs where: the leases of members' machines, and the certificates that were given for them.

A lease is the right to run one instance on a service. It lives while it is renewed; a certificate lives longer, so that
members do without the coordinator, and is revoked where the lease goes to another machine.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, String, delete, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.database import Table

LEASE_SECONDS = 180.0  # without a renewal; then the place is free


class Machine(Table):
    """Whose a peer's key is, by that person's own word in the browser, or by a token."""

    __tablename__ = "machines"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    person: Mapped[int] = mapped_column(index=True)
    paired: Mapped[float]


class Lease(Table):
    """The place of one peer."""

    __tablename__ = "leases"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    person: Mapped[int] = mapped_column(index=True)
    service: Mapped[str] = mapped_column(String(20))
    instance: Mapped[str] = mapped_column(String(60))
    since: Mapped[float]
    renewed: Mapped[float]


class Granted(Table):
    """A certificate that was given to a peer, and is not long ended."""

    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(String(16), primary_key=True)
    peer_id: Mapped[str] = mapped_column(String(80), index=True)
    person: Mapped[int] = mapped_column(index=True)
    issued: Mapped[int]
    expires: Mapped[int]
    revoked: Mapped[bool] = mapped_column(default=False)
    signer: Mapped[str] = mapped_column(String(64))  # public key of the run that signed it, in hex
    certificate: Mapped[str]  # as JSON


class Stay(Table):
    """One time that a peer was here, from its lease on until it gave it back or fell silent."""

    __tablename__ = "sessions"
    id: Mapped[int] = mapped_column(primary_key=True)
    peer_id: Mapped[str] = mapped_column(String(80), index=True)
    person: Mapped[int] = mapped_column(index=True)
    service: Mapped[str] = mapped_column(String(20))
    label: Mapped[str] = mapped_column(String(60))
    began: Mapped[float]
    seen: Mapped[float]


@dataclass(frozen=True)
class Instance:
    """One machine that has a lease now."""

    username: str
    peer_id: str
    service: str
    label: str  # by which its owner knows the machine
    since: float  # seconds since 1970
    renewed: float


def instances(
    session: Session, names: Mapping[int, str], person: int | None = None, now: float | None = None
) -> list[Instance]:
    """All that have a place now, or those of one person; the oldest first.

    :param names: of people, by the number that these tables know them by
    """
    now = time.time() if now is None else now
    query = select(Lease).where(Lease.renewed > now - LEASE_SECONDS).order_by(Lease.since)
    if person is not None:
        query = query.where(Lease.person == person)
    return [
        Instance(names.get(lease.person, "?"), lease.peer_id, lease.service, lease.instance, lease.since, lease.renewed)
        for lease in session.scalars(query)
    ]


def enter_stay(session: Session, lease: Lease, goes_on: bool) -> None:
    """A peer has its place now.

    :param goes_on: whether it has had it without a break
    """
    newest = select(Stay).where(Stay.peer_id == lease.peer_id, Stay.person == lease.person).order_by(Stay.id.desc())
    stay = session.scalar(newest.limit(1)) if goes_on else None
    if stay is None:
        stay = Stay(peer_id=lease.peer_id, person=lease.person, service=lease.service, began=lease.renewed)
        session.add(stay)
    stay.label, stay.seen = lease.instance, lease.renewed


def end_leases(session: Session, *which: ColumnElement[bool]) -> None:
    """Free the places, and revoke the certificates of those peers."""
    peers = list(session.scalars(select(Lease.peer_id).where(*which)))
    session.execute(delete(Lease).where(Lease.peer_id.in_(peers)))
    revoke(session, Granted.peer_id.in_(peers))


def revoke(session: Session, *which: ColumnElement[bool]) -> None:
    """Told to all peers by the next notice."""
    session.execute(update(Granted).where(*which).values(revoked=True))
