"""What the moderators tell everybody: announcements, and that the run is paused. Volunteers hear it by a notice."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import BigInteger, String, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.allowlist import note_decision, one_line
from kantha.coordinator.database import Database, Table
from kantha.errors import MembershipError, StorageError
from kantha.swarm.membership import MOST_ANNOUNCEMENTS, MOST_WORDS, Announcement

LONGEST_DAYS = 60  # of an announcement
_log = logging.getLogger(__name__)


class _Announcement(Table):
    __tablename__ = "announcements"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(MOST_WORDS))
    time: Mapped[int] = mapped_column(BigInteger)
    until: Mapped[int] = mapped_column(BigInteger, index=True)


class _Pause(Table):
    """Of the run, and what ended it; the newest counts."""

    __tablename__ = "pauses"
    id: Mapped[int] = mapped_column(primary_key=True)
    reason: Mapped[str] = mapped_column(String(MOST_WORDS))
    began: Mapped[int] = mapped_column(BigInteger)
    ended: Mapped[int | None] = mapped_column(BigInteger)


@dataclass(frozen=True)
class Pause:
    """The run stands still."""

    reason: str
    since: int  # seconds since 1970


class Bulletin:
    """Safe to use from several threads and processes. All methods raise `StorageError` where the disk refuses.

    Who did it is in the log of decisions, and nowhere else.
    """

    def __init__(self, database: Database, now: Callable[[], float] = time.time) -> None:
        self._database, self._now = database, now
        self._known: tuple[tuple[Announcement, ...], Pause | None] = ((), None)

    def known(self) -> tuple[tuple[Announcement, ...], Pause | None]:
        """Announcements and pause; while the disk refuses, those that were seen last."""
        try:
            self._known = (self.announcements(), self.paused())
        except StorageError as error:
            _log.warning("%s", error)
        return self._known

    # ---- announcements

    def announcements(self) -> tuple[Announcement, ...]:
        """That have not ended, oldest first."""
        with self._database.reading() as session:
            return self.told(session)[0]

    def announce(self, text: str, hours: float, by: str) -> Announcement:
        """Tell everybody for so long. Raises `MembershipError` where that is no text, or too much at once."""
        text = one_line(text, MOST_WORDS, "an announcement")
        if not text:
            raise MembershipError("an announcement without a word tells nobody anything; write one")
        if not 0 < hours <= 24 * LONGEST_DAYS:
            raise MembershipError(f"an announcement is shown for at most {LONGEST_DAYS} days")
        now = int(self._now())
        with self._database.session() as session:
            if len(self.told(session)[0]) >= MOST_ANNOUNCEMENTS:
                raise MembershipError(
                    f"{MOST_ANNOUNCEMENTS} announcements are shown already, more would not be read; end one of them"
                )
            row = _Announcement(text=text, time=now, until=now + int(hours * 3600))
            session.add(row)
            session.flush()
            note_decision(session, self._now(), by, "announce", reason=text)
            return _announcement(row)

    def end(self, number: int, by: str) -> None:
        """Show an announcement no longer. Raises `MembershipError` where there is none."""
        now = int(self._now())
        with self._database.session() as session:
            row = session.get(_Announcement, number)
            if row is None or row.until <= now:
                raise MembershipError("that announcement has ended already")
            row.until = now
            note_decision(session, self._now(), by, "end announcement", reason=row.text)

    # ---- pause

    def paused(self) -> Pause | None:
        """None: the run goes on."""
        with self._database.reading() as session:
            row = self._pause(session)
            return Pause(row.reason, row.began) if row is not None else None

    def pause(self, reason: str, by: str) -> None:
        """Have all volunteers stop computing. Raises `MembershipError` without a reason, or where they have already."""
        reason = one_line(reason, MOST_WORDS, "a reason")
        if not reason:
            raise MembershipError("to pause the run takes a reason, which every volunteer is told; give one")
        with self._database.session() as session:
            if self._pause(session) is not None:
                raise MembershipError("the run is paused already")
            session.add(_Pause(reason=reason, began=int(self._now()), ended=None))
            note_decision(session, self._now(), by, "pause", reason=reason)

    def resume(self, by: str) -> None:
        """Let the run go on. Raises `MembershipError` where it does."""
        with self._database.session() as session:
            row = self._pause(session)
            if row is None:
                raise MembershipError("the run is not paused")
            row.ended = int(self._now())
            note_decision(session, self._now(), by, "resume")

    # ---- for the notice, in a transaction of admission's

    def told(self, session: Session) -> tuple[tuple[Announcement, ...], str]:
        """Announcements, oldest first, and why the run is paused; empty: it is not."""
        query = select(_Announcement).where(_Announcement.until > int(self._now())).order_by(_Announcement.id)
        rows = session.scalars(query.limit(MOST_ANNOUNCEMENTS))
        pause = self._pause(session)
        return tuple(map(_announcement, rows)), pause.reason if pause is not None else ""

    def _pause(self, session: Session) -> _Pause | None:
        return session.scalar(select(_Pause).where(_Pause.ended.is_(None)).order_by(_Pause.id.desc()).limit(1))


def _announcement(row: _Announcement) -> Announcement:
    return Announcement(id=row.id, text=row.text, time=row.time, until=row.until)
