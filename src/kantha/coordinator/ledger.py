"""The ledger: who is a member, what each peer did in each round, what came of it. SQLite through SQLAlchemy."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import String, and_, case, delete, exists, func, or_, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.database import Database, Table
from kantha.coordinator.status import HeldoutStatus, RoundStatus
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport

_REPORT_COMES = 30.0  # seconds after which a report of a round is not waited for any more
_GIFT_LATE = 2  # rounds after the one that a leaver names in which what it handed in may count, as old as it is by then
_RESULTS_KEPT = 64  # rounds


class Member(Table):
    """One peer of one person."""

    __tablename__ = "members"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    username: Mapped[str] = mapped_column(String(40), index=True)
    service: Mapped[str] = mapped_column(String(20))
    joined: Mapped[float]
    expires: Mapped[int]


class Contribution(Table):
    """What one peer did in one round; its lineage is empty where it left and handed its samples in.

    Where its report did not come, the samples are those that the round's result has of it, the rest is unknown, and 0.
    """

    __tablename__ = "contributions"
    round: Mapped[int] = mapped_column(primary_key=True)
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True, index=True)
    lineage: Mapped[str] = mapped_column(String(64))
    samples: Mapped[int]
    seconds: Mapped[float]
    waited: Mapped[float]
    mlm_loss_sum: Mapped[float]
    sop_loss_sum: Mapped[float]
    peers: Mapped[int]  # that put samples in, in its word; 0: it said nothing, and the result stands in for it
    seen: Mapped[float]


_STANDS_IN = Contribution.peers == 0


class Result(Table):
    """One of the last rounds, as this coordinator has applied it."""

    __tablename__ = "results"
    round: Mapped[int] = mapped_column(primary_key=True)
    lineage: Mapped[str] = mapped_column(String(64))  # after it
    seen: Mapped[float]


class Share(Table):
    """What one peer put into a result, what leavers had handed in to it included."""

    __tablename__ = "shares"
    round: Mapped[int] = mapped_column(primary_key=True)
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    samples: Mapped[int]


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
        """Enter what a peer reports, at most the samples that a round's result has of it, where that is known. Of a
        round that was done again, the newer report wins."""
        reports = {report.round: report for report in rounds}
        if not reports:
            return
        now = time.time()
        with self.database.session() as session:
            statement = insert(Contribution).values(
                [{"peer_id": peer_id, "seen": now, **row} for row in self._cut(session, peer_id, reports)]
            )
            figures = [column for column in statement.excluded if not column.primary_key]
            # A report repeats the peer's last rounds every few seconds: what is the same stays as it is, and when it
            # came.
            statement = statement.on_conflict_do_update(
                set_={column.name: column for column in figures},
                where=or_(
                    *(Contribution.__table__.c[column.name] != column for column in figures if column.name != "seen")
                ),
            )
            changed = session.connection().execute(statement).rowcount
            if changed:  # how far a result stands in for one peer depends on what others say
                session.execute(
                    delete(Contribution).where(
                        _STANDS_IN,
                        Contribution.round.between(min(reports), max(reports) + _GIFT_LATE),
                        exists().where(Result.round == Contribution.round),
                    )
                )
                self._stand_in(session)
        if changed:
            self._state = object()

    @staticmethod
    def _cut(session: Session, peer_id: str, reports: Mapping[int, RoundReport]) -> Iterator[dict[str, Any]]:
        """What is entered of a peer's reports. What a leaver handed in is another one's in the result, so unchecked."""
        query = (
            select(Result.round, Result.lineage, func.coalesce(Share.samples, 0))
            .outerjoin(Share, and_(Share.round == Result.round, Share.peer_id == peer_id))
            .where(Result.round.in_(reports))
        )
        known = {(number, lineage): samples for number, lineage, samples in session.execute(query)}
        for report in reports.values():
            row = report.dict()
            most = known.get((report.round, report.lineage), report.samples)
            if report.samples > most:  # the mean loss stays
                row["samples"] = most
                for name in ("mlm_loss_sum", "sop_loss_sum"):
                    row[name] *= most / report.samples
            yield row

    def add_result(self, number: int, lineage: str, samples: Mapping[str, float]) -> None:
        """Enter what came of a round: the samples that each peer put in, and the lineage after it. Of a round that was
        done again, the newer word counts."""
        with self.database.session() as session:
            known = session.get(Result, number)
            if known is not None and known.lineage == lineage:
                return
            session.merge(Result(round=number, lineage=lineage, seen=time.time()))
            session.execute(delete(Share).where(Share.round == number))
            session.execute(delete(Contribution).where(_STANDS_IN, Contribution.round == number))
            session.add_all(
                Share(round=number, peer_id=peer_id, samples=int(share))
                for peer_id, share in samples.items()
                if share >= 1
            )
            for table in (Result, Share):
                session.execute(delete(table).where(table.round <= number - _RESULTS_KEPT))
        self._state = object()

    def stand_in(self) -> None:
        """Give members whose report of a round did not come credit for it by its result. A report that comes later
        replaces that."""
        with self.database.session() as session:
            changed = self._stand_in(session)
        if changed:
            self._state = object()

    def _stand_in(self, session: Session) -> bool:
        query = (
            select(Share.round, Share.peer_id, Share.samples, Result.lineage, Result.seen)
            .join(Result, Result.round == Share.round)
            .join(Member, Member.peer_id == Share.peer_id)
            .outerjoin(Contribution, and_(Contribution.round == Share.round, Contribution.peer_id == Share.peer_id))
            .where(Contribution.round.is_(None), func.abs(time.time() - Result.seen) >= _REPORT_COMES)
        )  # abs: after the clock was put back, waiting for it to catch up would take too long
        missing: dict[int, list[Any]] = {}
        for row in session.execute(query):
            missing.setdefault(row.round, []).append(row)
        rows = []
        for number, shares in missing.items():
            whole = sum(share.samples for share in shares)
            own = max(0, whole - self._gifts(session, number))  # whose the gifts are is not known: all give way alike
            rows += [
                {
                    "round": number,
                    "peer_id": share.peer_id,
                    "lineage": share.lineage,
                    "samples": share.samples * own // whole,
                    "seconds": 0.0,
                    "waited": 0.0,
                    "mlm_loss_sum": 0.0,
                    "sop_loss_sum": 0.0,
                    "peers": 0,
                    "seen": share.seen,
                }
                for share in shares
            ]
        if rows:
            session.execute(insert(Contribution).values(rows))
        return bool(rows)

    @staticmethod
    def _gifts(session: Session, number: int) -> int:
        """How many of the samples in a round's result leavers may have handed in to members that say nothing: they
        count for the leavers already. What a peer put in beyond its own word was handed in to it."""
        handed_in = session.scalar(
            select(func.coalesce(func.sum(Contribution.samples), 0)).where(
                Contribution.round.between(number - _GIFT_LATE, number), Contribution.lineage == ""
            )
        )
        if not handed_in:
            return 0
        told = func.coalesce(Contribution.samples, 0)  # of who is no member nothing is entered: the coordinator
        found = session.scalar(
            select(func.coalesce(func.sum(Share.samples - told), 0))
            .outerjoin(Contribution, and_(Contribution.round == Share.round, Contribution.peer_id == Share.peer_id))
            .outerjoin(Member, Member.peer_id == Share.peer_id)
            .where(
                Share.round.between(number - _GIFT_LATE, number),
                or_(Member.peer_id.is_(None), and_(Contribution.peers > 0, Contribution.lineage != "")),
                Share.samples > told,
            )
        )
        return max(0, int(handed_in) - int(found or 0))

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
            for table in (Contribution, HeldoutRound, Result, Share):
                session.execute(delete(table).where(table.round > number))
        self._state = object()

    def mark_failed(self, number: int, reason: str) -> None:
        """Enter that a round had to be tried again, and why; the first reason stays."""
        statement = insert(FailedRound).values(round=number, reason=reason).on_conflict_do_nothing()
        with self.database.session() as session:
            changed = session.connection().execute(statement).rowcount
        if changed:  # a report repeats its failed rounds, too
            self._state = object()

    def rounds(self) -> list[RoundStatus]:
        """All finished rounds, oldest first, each added up over its contributions; the loss is that of the samples for
        which it is known."""
        state, known = self._state, self._rounds
        if known is not None and known[0] is state:
            return list(known[1])
        told = func.nullif(func.sum(case((_STANDS_IN, 0), else_=Contribution.samples)), 0)
        query = (
            select(
                Contribution.round,
                func.sum(Contribution.samples),
                func.sum(Contribution.mlm_loss_sum) / told,
                func.sum(Contribution.sop_loss_sum) / told,
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
                    loss=None if mlm is None or sop is None else mlm + sop,
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
