"""The ledger: who is a member, and what each peer did in each round. SQLite through SQLAlchemy."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, String, create_engine, event, func, select
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from kantha.coordinator.status import RoundStatus
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport


class _Table(DeclarativeBase):
    pass


class Member(_Table):
    """One peer of one person."""

    __tablename__ = "members"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    username: Mapped[str] = mapped_column(String(40), index=True)
    service: Mapped[str] = mapped_column(String(20))
    joined: Mapped[float]
    expires: Mapped[int]


class Contribution(_Table):
    """What one peer did in one round."""

    __tablename__ = "contributions"
    round: Mapped[int] = mapped_column(primary_key=True)
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True, index=True)
    samples: Mapped[int]
    seconds: Mapped[float]
    mlm_loss_sum: Mapped[float]
    sop_loss_sum: Mapped[float]
    peers: Mapped[int]
    whole: Mapped[bool]
    seen: Mapped[float]


class Ledger:
    """Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._engine: Engine = create_engine(f"sqlite:///{path}")

        @event.listens_for(self._engine, "connect")
        def _configure(connection: Any, _record: object) -> None:
            connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer
            connection.execute("PRAGMA busy_timeout=10000")

        _Table.metadata.create_all(self._engine)

    def add_member(self, membership: Membership) -> None:
        values = {
            "username": membership.username,
            "service": membership.service,
            "joined": time.time(),
            "expires": membership.expires,
        }
        with Session(self._engine) as session, session.begin():
            statement = insert(Member).values(peer_id=membership.peer_id, **values)
            session.execute(statement.on_conflict_do_update(index_elements=["peer_id"], set_=values))

    def members(self) -> dict[str, str]:
        """Username of every member, by peer id."""
        with Session(self._engine) as session:
            return dict(session.execute(select(Member.peer_id, Member.username)).all())

    def add_rounds(self, peer_id: str, rounds: Iterable[RoundReport]) -> None:
        """Enter what a peer reports; what was entered before is left as it is."""
        now = time.time()
        rows = [{"peer_id": peer_id, "seen": now, **report.dict()} for report in rounds]
        if rows:
            with Session(self._engine) as session, session.begin():
                session.execute(insert(Contribution).values(rows).on_conflict_do_nothing())

    def rounds(self) -> list[RoundStatus]:
        """All finished rounds, oldest first, each added up over its contributions."""
        samples = func.sum(Contribution.samples)
        query = (
            select(
                Contribution.round,
                samples,
                func.sum(Contribution.mlm_loss_sum) / samples,
                func.sum(Contribution.sop_loss_sum) / samples,
                func.count(),
                func.min(Contribution.seen),
                func.min(Contribution.whole),
            )
            .where(Contribution.samples > 0)
            .group_by(Contribution.round)
            .order_by(Contribution.round)
        )
        with Session(self._engine) as session:
            return [
                RoundStatus(
                    round=number,
                    samples=count,
                    loss=mlm + sop,
                    mlm_loss=mlm,
                    sop_loss=sop,
                    volunteers=volunteers,
                    finished=finished,
                    failed=not whole,
                )
                for number, count, mlm, sop, volunteers, finished, whole in session.execute(query)
            ]

    def samples_by_peer(self) -> dict[str, int]:
        query = select(Contribution.peer_id, func.sum(Contribution.samples)).group_by(Contribution.peer_id)
        with Session(self._engine) as session:
            return {peer: int(samples) for peer, samples in session.execute(query)}

    def close(self) -> None:
        self._engine.dispose()
