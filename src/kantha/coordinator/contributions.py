"""What each peer did in each round, and the sums over it, which are kept in step in the same transaction.

Pages ask for sums a thousand times as often as a report changes them, and of a long run they would be over millions of
rows. So `Change` enters with every contribution what that changes in its round, for its peer, its peer's day and the
run. What is counted in samples is exact; seconds are sums of floating-point numbers, a millionth of a second off at
most.
"""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import BigInteger, ColumnElement, Index, String, case, delete, func, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.database import Table, insert

_DAY = 86_400  # seconds
_EPOCH = datetime.date(1970, 1, 1)
_Value = TypeVar("_Value")


class Contribution(Table):
    """What one peer did in one round; its lineage is empty where it left and handed its samples in.

    Where its report did not come, the samples are those that the round's result has of it, the rest is unknown, and 0.
    """

    __tablename__ = "contributions"
    __table_args__ = (Index("ix_contributions_seen", "seen", "peer_id", "samples"),)
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


STANDS_IN = Contribution.peers == 0
FIGURES = tuple(column.name for column in Contribution.__table__.columns if not column.primary_key)


class Result(Table):
    """One of the last rounds, as this coordinator has applied it."""

    __tablename__ = "results"
    round: Mapped[int] = mapped_column(primary_key=True)
    lineage: Mapped[str] = mapped_column(String(64))  # after it
    seen: Mapped[float]
    learning_rate: Mapped[float | None]  # None: not known


class FailedRound(Table):
    """A round that no group could finish at first; it was tried again."""

    __tablename__ = "failed_rounds"
    round: Mapped[int] = mapped_column(primary_key=True)
    reason: Mapped[str] = mapped_column(String(100))


class Round(Table):
    """A round, added up over its contributions. It is finished when somebody's samples are in it."""

    __tablename__ = "rounds"
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    samples: Mapped[int] = mapped_column(BigInteger)
    told: Mapped[int] = mapped_column(BigInteger)  # of the samples, those whose loss is known
    mlm_loss_sum: Mapped[float]
    sop_loss_sum: Mapped[float]
    volunteers: Mapped[int]
    seconds: Mapped[float]
    waited: Mapped[float]
    finished: Mapped[float]  # when the first report of it came
    learning_rate: Mapped[float | None]
    reason: Mapped[str | None] = mapped_column(String(100))  # why it failed at first


class Tally(Table):
    """All that one peer did."""

    __tablename__ = "tallies"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    samples: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    waited: Mapped[float]
    rounds: Mapped[int]  # with samples
    first: Mapped[float]  # time of its first report
    seen: Mapped[float]  # and of its last


class PeerDay(Table):
    """What one peer did on one day."""

    __tablename__ = "activity"
    day: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # UTC, since 1970
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True, index=True)
    samples: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    waited: Mapped[float]
    rounds: Mapped[int]  # with samples


class Totals(Table):
    """The run; one row."""

    __tablename__ = "totals"
    id: Mapped[int] = mapped_column(primary_key=True)
    rounds: Mapped[int]  # finished
    samples: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int]
    seconds: Mapped[float]
    waited: Mapped[float]
    thinned: Mapped[int]  # up to and with this round the contributions are gone, and their sums final; -1: of none


def day_of(seconds: float) -> int:
    """The UTC day of a moment, since 1970."""
    return int(seconds // _DAY)


def day_number(day: datetime.date) -> int:
    return (day - _EPOCH).days


def date_of(number: int) -> datetime.date:
    return _EPOCH + datetime.timedelta(days=number)


def portions(values: Iterable[_Value], size: int = 500) -> Iterator[list[_Value]]:
    """One statement has a limit of values."""
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some


@dataclass
class _Sum:
    """What changes for a peer, or for its day."""

    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    rounds: int = 0
    first: float = float("inf")
    seen: float = float("-inf")

    def add(self, row: Mapping[str, Any], sign: int) -> None:
        self.samples += sign * row["samples"]
        self.seconds += sign * row["seconds"]
        self.waited += sign * row["waited"]
        self.rounds += sign * (row["samples"] > 0)
        self.first = min(self.first, row["seen"])
        self.seen = max(self.seen, row["seen"])


class Change:
    """Changes to contributions in one transaction; `close` enters what they change in the sums. The contributions of
    rounds that were thinned are gone, and must not be changed: see `thinned`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rounds: set[int] = set()
        self._peers: dict[str, _Sum] = {}
        self._days: dict[tuple[int, str], _Sum] = {}

    @property
    def thinned(self) -> int:
        """The last round whose contributions are gone."""
        return thinned(self._session)

    def put(self, rows: Sequence[dict[str, Any]]) -> None:
        """Enter contributions; one of the same peer to the same round is replaced."""
        if not rows:
            return
        for some in portions(rows, 100):
            keys = {(row["round"], row["peer_id"]) for row in some}
            found = self._found(  # not the pairs at once: SQLite reads the whole table for those
                Contribution.round.in_({number for number, _ in keys}),
                Contribution.peer_id.in_({peer_id for _, peer_id in keys}),
            )
            self._count((row for row in found if (row["round"], row["peer_id"]) in keys), -1)
        self._count(rows, +1)
        statement = insert(self._session, Contribution)
        statement = statement.on_conflict_do_update(
            index_elements=["round", "peer_id"], set_={name: statement.excluded[name] for name in FIGURES}
        )
        self._session.connection().execute(statement, list(rows))

    def drop(self, *where: ColumnElement[bool]) -> None:
        gone = self._found(*where)
        if gone:
            self._count(gone, -1)
            self._session.execute(delete(Contribution).where(*where))

    def touch(self, number: int) -> None:
        """What else is known of this round has changed."""
        self._rounds.add(number)

    def close(self) -> int | None:
        """Returns the first of the rounds that changed; None: nothing did."""
        last = self.thinned
        numbers = sorted(number for number in self._rounds if number > last)
        for some in portions(numbers):
            self._sum_up(some)
        self._enter(
            Tally,
            ["peer_id"],
            [{"peer_id": peer_id, **vars(change)} for peer_id, change in self._peers.items()],
        )
        self._enter(
            PeerDay,
            ["day", "peer_id"],
            [{"day": day, "peer_id": peer_id, **vars(change)} for (day, peer_id), change in self._days.items()],
        )
        return numbers[0] if numbers else None

    def _found(self, *where: ColumnElement[bool]) -> list[dict[str, Any]]:
        columns = Contribution.__table__.columns
        names = ("round", "peer_id", "samples", "seconds", "waited", "seen")
        query = select(*(columns[name] for name in names)).where(*where)
        return [dict(zip(names, row, strict=True)) for row in self._session.execute(query)]

    def _count(self, rows: Iterable[Mapping[str, Any]], sign: int) -> None:
        for row in rows:
            self._rounds.add(row["round"])
            self._peers.setdefault(row["peer_id"], _Sum()).add(row, sign)
            self._days.setdefault((day_of(row["seen"]), row["peer_id"]), _Sum()).add(row, sign)

    def _enter(self, table: type[Tally] | type[PeerDay], key: list[str], rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        names = [column.name for column in table.__table__.columns]
        statement = insert(self._session, table)
        new, old = statement.excluded, table.__table__.c
        sums: dict[str, Any] = {name: old[name] + new[name] for name in ("samples", "seconds", "waited", "rounds")}
        if table is Tally:
            sums["first"] = case((new.first < old.first, new.first), else_=old.first)
            sums["seen"] = case((new.seen > old.seen, new.seen), else_=old.seen)
        statement = statement.on_conflict_do_update(index_elements=key, set_=sums)
        self._session.connection().execute(statement, [{name: row[name] for name in names} for row in rows])

    def _sum_up(self, numbers: Sequence[int]) -> None:
        session = self._session
        has_samples = Contribution.samples > 0
        query = (
            select(
                Contribution.round,
                func.sum(Contribution.samples).label("samples"),
                func.sum(case((STANDS_IN, 0), else_=Contribution.samples)).label("told"),
                func.sum(case((has_samples, Contribution.mlm_loss_sum), else_=0.0)).label("mlm_loss_sum"),
                func.sum(case((has_samples, Contribution.sop_loss_sum), else_=0.0)).label("sop_loss_sum"),
                func.sum(case((has_samples, 1), else_=0)).label("volunteers"),
                func.sum(Contribution.seconds).label("seconds"),
                func.sum(Contribution.waited).label("waited"),
                func.coalesce(func.min(case((has_samples, Contribution.seen))), func.min(Contribution.seen)).label(
                    "finished"
                ),
            )
            .where(Contribution.round.in_(numbers))
            .group_by(Contribution.round)
        )
        before = {row.round: row for row in session.scalars(select(Round).where(Round.round.in_(numbers)))}
        rates = dict(session.execute(select(Result.round, Result.learning_rate).where(Result.round.in_(numbers))).all())
        failed = select(FailedRound.round, FailedRound.reason).where(FailedRound.round.in_(numbers))
        reasons = dict(session.execute(failed).all())
        change: dict[str, Any] = dict.fromkeys(("rounds", "samples", "failed", "seconds", "waited"), 0)

        def count(row: Round, sign: int) -> None:
            change["rounds"] += sign * (row.samples > 0)
            change["samples"] += sign * row.samples
            change["failed"] += sign * (row.samples > 0 and row.reason is not None)
            change["seconds"] += sign * row.seconds
            change["waited"] += sign * row.waited

        for row in before.values():
            count(row, -1)
        for sums in session.execute(query).mappings():
            number = sums["round"]
            row = before.pop(number) if number in before else Round(round=number, learning_rate=None)
            for name, value in sums.items():
                setattr(row, name, value)
            row.reason = reasons.get(number)
            if rates.get(number) is not None:
                row.learning_rate = rates[number]
            session.add(row)
            count(row, +1)
        for row in before.values():  # nobody's any more
            session.delete(row)
        session.flush()
        session.execute(
            update(Totals).values({name: Totals.__table__.c[name] + value for name, value in change.items()})
        )


def thinned(session: Session) -> int:
    """The last round whose contributions are gone."""
    return session.execute(select(Totals.thinned)).scalar_one()
