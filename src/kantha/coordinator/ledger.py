"""The ledger: who is a member, what each peer did in each round, what came of it. SQLite through SQLAlchemy."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import String, delete, func, or_, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.database import Database, Table
from kantha.coordinator.status import HeldoutStatus, RoundStatus
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport


class Member(Table):
    """One peer of one person."""

    __tablename__ = "members"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    username: Mapped[str] = mapped_column(String(40), index=True)
    service: Mapped[str] = mapped_column(String(20))
    joined: Mapped[float]
    expires: Mapped[int]


class Contribution(Table):
    """What one peer did in one round."""

    __tablename__ = "contributions"
    round: Mapped[int] = mapped_column(primary_key=True)
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True, index=True)
    lineage: Mapped[str] = mapped_column(String(64))
    samples: Mapped[int]
    seconds: Mapped[float]
    waited: Mapped[float]
    mlm_loss_sum: Mapped[float]
    sop_loss_sum: Mapped[float]
    peers: Mapped[int]
    seen: Mapped[float]


class Device(Table):
    """What one peer computes on, in its own words."""

    __tablename__ = "devices"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    device: Mapped[str] = mapped_column(String(60))


class FailedRound(Table):
    """A round that no group could finish at first; it was tried again."""

    __tablename__ = "failed_rounds"
    round: Mapped[int] = mapped_column(primary_key=True)
    reason: Mapped[str] = mapped_column(String(100))


class HeldoutRound(Table):
    """What the model of one round scored on held-out text."""

    __tablename__ = "heldout_rounds"
    round: Mapped[int] = mapped_column(primary_key=True)
    mlm_loss: Mapped[float]
    mlm_accuracy: Mapped[float]
    sop_loss: Mapped[float]
    sop_accuracy: Mapped[float]
    masked: Mapped[int]
    pairs: Mapped[int]


def enter_member(session: Session, membership: Membership) -> None:
    """Whose a peer is, and until when it is a member; the newest word counts."""
    values = {
        "username": membership.username,
        "service": membership.service,
        "joined": time.time(),
        "expires": membership.expires,
    }
    statement = insert(Member).values(peer_id=membership.peer_id, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["peer_id"], set_=values))


@dataclass(frozen=True)
class PersonTotals:
    """What all peers of one person did together."""

    username: str
    samples: int
    seconds: float  # spent computing
    waited: float  # seconds between computing, lost to whatever else


class Ledger:
    """Safe to use from several threads. All methods raise `StorageError` where the disk refuses."""

    def __init__(self, database: Database | Path) -> None:
        """:param database: or its path"""
        self.database = database if isinstance(database, Database) else Database(database)
        self._state: object = object()  # another one after every change
        self._rounds: tuple[object, list[RoundStatus]] | None = None  # the state that they are of, and all rounds
        self._devices: dict[str, str] = {}  # what was entered by this program
        self.database.make_tables()

    def add_member(self, membership: Membership) -> None:
        with self.database.session() as session:
            enter_member(session, membership)

    def members(self) -> dict[str, str]:
        """Username of every member, by peer id."""
        with self.database.reading() as session:
            return dict(session.execute(select(Member.peer_id, Member.username)).all())

    def add_rounds(self, peer_id: str, rounds: Iterable[RoundReport]) -> None:
        """Enter what a peer reports. Of a round that was done again, the newer report wins."""
        now = time.time()
        rows = [{"peer_id": peer_id, "seen": now, **report.dict()} for report in rounds]
        if not rows:
            return
        statement = insert(Contribution).values(rows)
        figures = [column for column in statement.excluded if not column.primary_key]
        # A report repeats the peer's last rounds every few seconds: what is the same stays as it is, and when it came.
        statement = statement.on_conflict_do_update(
            set_={column.name: column for column in figures},
            where=or_(
                *(Contribution.__table__.c[column.name] != column for column in figures if column.name != "seen")
            ),
        )
        with self.database.session() as session:
            changed = session.connection().execute(statement).rowcount
        if changed:
            self._state = object()

    def set_device(self, peer_id: str, device: str) -> None:
        """Enter what a peer computes on; the newest word counts."""
        if self._devices.get(peer_id) == device:  # every report repeats it
            return
        statement = insert(Device).values(peer_id=peer_id, device=device)
        with self.database.session() as session:
            session.execute(statement.on_conflict_do_update(index_elements=["peer_id"], set_={"device": device}))
        self._devices[peer_id] = device

    def forget_rounds_after(self, number: int) -> None:
        """Drop the contributions to later rounds, which will be done again, and what their models scored.

        If the swarm is still alive, they were not lost: its peers report their last rounds again.
        """
        with self.database.session() as session:
            session.execute(delete(Contribution).where(Contribution.round > number))
            session.execute(delete(HeldoutRound).where(HeldoutRound.round > number))
        self._state = object()

    def mark_failed(self, number: int, reason: str) -> None:
        """Enter that a round had to be tried again, and why; the first reason stays."""
        statement = insert(FailedRound).values(round=number, reason=reason).on_conflict_do_nothing()
        with self.database.session() as session:
            changed = session.connection().execute(statement).rowcount
        if changed:  # a report repeats its failed rounds, too
            self._state = object()

    def rounds(self) -> list[RoundStatus]:
        """All finished rounds, oldest first, each added up over its contributions."""
        state, known = self._state, self._rounds
        if known is not None and known[0] is state:
            return list(known[1])
        samples = func.sum(Contribution.samples)
        query = (
            select(
                Contribution.round,
                samples,
                func.sum(Contribution.mlm_loss_sum) / samples,
                func.sum(Contribution.sop_loss_sum) / samples,
                func.count(),
                func.min(Contribution.seen),
                func.max(FailedRound.reason),
            )
            .outerjoin(FailedRound, FailedRound.round == Contribution.round)
            .where(Contribution.samples > 0)
            .group_by(Contribution.round)
            .order_by(Contribution.round)
        )
        with self.database.reading() as session:
            rounds = [
                RoundStatus(
                    round=number,
                    samples=count,
                    loss=mlm + sop,
                    mlm_loss=mlm,
                    sop_loss=sop,
                    volunteers=volunteers,
                    finished=finished,
                    failed=reason is not None,
                    reason=reason,
                )
                for number, count, mlm, sop, volunteers, finished, reason in session.execute(query)
            ]
        self._rounds = state, rounds  # under the state from before the query: of a change since then it knows nothing
        return list(rounds)

    def add_heldout(self, scores: HeldoutStatus) -> None:
        """Enter what the model of a round scored on held-out text; the newer word counts."""
        with self.database.session() as session:
            session.merge(HeldoutRound(**scores.model_dump(exclude={"loss"})))

    def heldout(self) -> list[HeldoutStatus]:
        """All that was measured on held-out text, oldest round first."""
        with self.database.reading() as session:
            return [
                HeldoutStatus(
                    round=entry.round,
                    loss=entry.mlm_loss + entry.sop_loss,
                    mlm_loss=entry.mlm_loss,
                    mlm_accuracy=entry.mlm_accuracy,
                    sop_loss=entry.sop_loss,
                    sop_accuracy=entry.sop_accuracy,
                    masked=entry.masked,
                    pairs=entry.pairs,
                )
                for entry in session.scalars(select(HeldoutRound).order_by(HeldoutRound.round))
            ]

    def samples_by_peer(self) -> dict[str, int]:
        query = select(Contribution.peer_id, func.sum(Contribution.samples)).group_by(Contribution.peer_id)
        with self.database.reading() as session:
            return {peer: int(samples) for peer, samples in session.execute(query)}

    def people(self, last_round: int) -> list[PersonTotals]:
        """What each person did up to and with `last_round`, most samples first; who has no samples is left out."""
        samples = func.sum(Contribution.samples)
        query = (
            select(Member.username, samples, func.sum(Contribution.seconds), func.sum(Contribution.waited))
            .join(Contribution, Contribution.peer_id == Member.peer_id)
            .where(Contribution.round <= last_round)
            .group_by(Member.username)
            .having(samples > 0)
            .order_by(samples.desc(), Member.username)
        )
        with self.database.reading() as session:
            return [PersonTotals(*row) for row in session.execute(query)]

    def seconds_by_device(self, last_round: int) -> dict[str | None, float]:
        """Seconds of computing up to and with `last_round` by kind of device, most first; None where it is not known,
        as of peers that reported to a Kantha which did not keep it."""
        seconds = func.sum(Contribution.seconds)
        query = (
            select(Device.device, seconds)
            .select_from(Contribution)
            .outerjoin(Device, Device.peer_id == Contribution.peer_id)
            .where(Contribution.round <= last_round)
            .group_by(Device.device)
            .having(seconds > 0)
            .order_by(seconds.desc(), Device.device)
        )
        with self.database.reading() as session:
            return dict(session.execute(query).all())

    def failures(self) -> dict[int, str]:
        """Why a round had to be tried again, by round."""
        with self.database.reading() as session:
            return dict(session.execute(select(FailedRound.round, FailedRound.reason)).all())

    def computing_share(self) -> float | None:
        """Share of the volunteers' time, since each began to train, that they computed; None before the first round."""
        query = select(func.sum(Contribution.seconds), func.sum(Contribution.seconds + Contribution.waited))
        with self.database.reading() as session:
            computing, present = session.execute(query).one()
        return computing / present if present else None

    def close(self) -> None:
        self.database.close()
