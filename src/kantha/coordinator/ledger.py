"""The ledger: who is a member, what each peer did in each round, what came of it. See contributions.py for the sums."""

import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sqlalchemy import String, and_, delete, distinct, exists, func, literal_column, or_, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from kantha.coordinator.contributions import (
    FIGURES,
    STANDS_IN,
    Change,
    Contribution,
    FailedRound,
    PeerDay,
    Result,
    Round,
    Tally,
    Totals,
    date_of,
    day_number,
    day_of,
    portions,
    thinned,
)
from kantha.coordinator.database import Database, Table, insert
from kantha.coordinator.leases import Stay
from kantha.coordinator.status import BlanksStatus, Guess, HeldoutStatus, RoundStatus
from kantha.errors import printable
from kantha.swarm.membership import Membership
from kantha.swarm.reports import ROUNDS_KEPT, RoundReport

KEPT_SECONDS = 30 * 86_400.0  # that single contributions are kept for; their sums stay
_KEPT_ROUNDS = 10 * ROUNDS_KEPT  # whose contributions are kept however old they are, since reports may still name them
_THINNED_AT_ONCE = 100  # rounds; others that write wait so long
_REPORT_COMES = 30.0  # seconds after which a report of a round is not waited for any more
_GIFT_LATE = 2  # rounds after the one that a leaver names in which what it handed in may count, as old as it is by then
_RESULTS_KEPT = 64  # rounds
_LAST_ROUNDS = 200  # that a curve has one by one
_PAGE = 1_000  # rows that an export reads at once
_STREAK_DAYS = 32  # that are looked at together
# Grouped by the column itself, SQLite reads all of the table in the order of its index, and not the few rows asked for.
_PEER = func.coalesce(Contribution.peer_id, literal_column("''"))
_PEERS_REMEMBERED = 2_000  # for what they have said


class Member(Table):
    """One peer of one person."""

    __tablename__ = "members"
    peer_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    username: Mapped[str] = mapped_column(String(96), index=True)
    person: Mapped[int | None] = mapped_column(index=True)  # their number in all tables; None: nobody's any more
    service: Mapped[str] = mapped_column(String(20))
    joined: Mapped[float]
    expires: Mapped[int]


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


class BlankFilled(Table):
    """One word that the model of one round would put into the blank of one of the run spec's sentences."""

    __tablename__ = "guesses"
    round: Mapped[int] = mapped_column(primary_key=True)
    sentence: Mapped[int] = mapped_column(primary_key=True)  # from 0, in the spec's order
    rank: Mapped[int] = mapped_column(primary_key=True)  # from 0, the likeliest
    word: Mapped[str] = mapped_column(String(100))
    probability: Mapped[float]


def enter_member(session: Session, membership: Membership, person: int | None) -> None:
    """Whose a peer is, and until when it is a member; the newest word counts."""
    values = {
        "username": membership.username,
        "person": person,
        "service": membership.service,
        "joined": time.time(),
        "expires": membership.expires,
    }
    statement = insert(session, Member).values(peer_id=membership.peer_id, **values)
    session.execute(statement.on_conflict_do_update(index_elements=["peer_id"], set_=values))


def forget_person(session: Session, person: int) -> None:
    """What this person's machines did stays, as nobody's; what is known of the machines themselves is dropped."""
    peers = select(Member.peer_id).where(Member.person == person)
    session.execute(delete(Device).where(Device.peer_id.in_(peers)))
    session.execute(delete(Stay).where(Stay.person == person))
    session.execute(update(Member).where(Member.person == person).values(person=None, username=""))


@dataclass(frozen=True)
class PersonTotals:
    """What all peers of one person did together."""

    username: str  # empty: of somebody who left for good
    samples: int
    seconds: float  # spent computing
    waited: float  # seconds between computing, lost to whatever else
    person: int | None = None  # None: entered before people had numbers, or left for good


@dataclass(frozen=True)
class RunTotals:
    """The whole run, exactly."""

    rounds: int  # finished
    samples: int
    failed: int  # of the finished rounds, those that had to be tried again
    seconds: float  # that volunteers computed
    waited: float  # seconds between computing, lost to whatever else
    people: int  # with samples

    @property
    def computing_share(self) -> float | None:
        """Of the volunteers' time, since each began to train; None before the first round."""
        present = self.seconds + self.waited
        return self.seconds / present if present else None


@dataclass(frozen=True)
class Activity:
    """What one person did on one day (UTC), or over several."""

    person: int | None  # None: of those who left for good
    day: date  # of several: the last one
    samples: int
    seconds: float  # spent computing
    rounds: int  # with samples, of each of the person's machines


@dataclass(frozen=True)
class PersonMachine:
    """A machine of one person, and all that it did."""

    peer_id: str
    service: str
    device: str  # empty: not known
    samples: int
    seconds: float  # spent computing
    seen: float | None  # when its last report came, seconds since 1970; None: it never did


@dataclass(frozen=True)
class PersonSession:
    """One time that a machine was in the run, from its joining until it left or fell silent."""

    peer_id: str
    service: str
    label: str  # by which its owner knows the machine; for nobody else
    began: float  # seconds since 1970
    seen: float  # when it was last heard of


@dataclass(frozen=True)
class PeerRound:
    """What one peer did in one round, for those who add up themselves."""

    round: int
    peer_id: str
    person: int | None
    samples: int
    seconds: float
    waited: float
    seen: float  # when it was entered, seconds since 1970


class Ledger:
    """Safe to use from several threads. All methods raise `StorageError` where the disk or the server refuses."""

    def __init__(self, database: Database | Path) -> None:
        """:param database: or the path of its file"""
        self.database = database if isinstance(database, Database) else Database(database)
        # What this program has entered, since reports repeat it all every few seconds: devices, failed rounds, and what
        # each peer said of its last rounds, unless a result or forgetting may have changed what becomes of that.
        self._devices: dict[str, str] = {}
        self._failed: set[int] = set()
        self._entered: dict[str, dict[int, RoundReport]] = {}
        self._entering = threading.RLock()  # of the last one, and of what it tells of
        self._curve = _Curve()
        self._heldout: list[HeldoutStatus] | None = None  # all of them; None: they have to be read
        self._heldout_lock = threading.Lock()
        self.database.migrate()

    # ---- members

    def add_member(self, membership: Membership, person: int | None = None) -> None:
        with self.database.session() as session:
            enter_member(session, membership, person)

    def members(self) -> dict[str, str]:
        """Username of every member, by peer id."""
        with self.database.reading() as session:
            return dict(session.execute(select(Member.peer_id, Member.username)).all())

    def people_of_peers(self) -> dict[str, int | None]:
        """The number of every member's person, by peer id."""
        with self.database.reading() as session:
            return dict(session.execute(select(Member.peer_id, Member.person)).all())

    # ---- what is entered

    def add_rounds(self, peer_id: str, rounds: Iterable[RoundReport]) -> None:
        """Enter what a peer reports, at most the samples that a round's result has of it, where that is known. Of a
        round that was done again, the newer report wins. Of rounds that were thinned, all is known."""
        reports = {report.round: report for report in rounds}
        with self._entering:
            known = self._entered.get(peer_id, {})
            new = {number: report for number, report in reports.items() if known.get(number) != report}
            if new:
                self._enter_rounds(peer_id, new)
                if len(self._entered) >= _PEERS_REMEMBERED:
                    self._entered.clear()
                self._entered[peer_id] = reports  # a report's last rounds; what it has no more, it will not repeat

    def _enter_rounds(self, peer_id: str, reports: Mapping[int, RoundReport]) -> None:
        with self.database.session() as session:
            news = self._news(session, peer_id, reports)
            change = Change(session)
            change.put(news)
            if news:  # how far a result stands in for one peer depends on what others say
                first, last = min(row["round"] for row in news), max(row["round"] for row in news) + _GIFT_LATE
                change.drop(
                    STANDS_IN,
                    Contribution.round.between(first, last),
                    exists().where(Result.round == Contribution.round),
                )
                self._stand_in(change, session, first, last)
            first_changed = change.close()
        self._curve.changed(first_changed)

    @classmethod
    def _news(cls, session: Session, peer_id: str, reports: Mapping[int, RoundReport]) -> list[dict[str, Any]]:
        """What has to be entered of a peer's reports."""
        names = [name for name in FIGURES if name != "seen"]
        columns = Contribution.__table__.columns
        known: dict[int, tuple[Any, ...]] = {}
        for some in portions(reports):
            query = select(Contribution.round, *(columns[name] for name in names)).where(
                Contribution.peer_id == peer_id, Contribution.round.in_(some)
            )
            known |= {number: tuple(figures) for number, *figures in session.execute(query)}
        last, now = thinned(session), time.time()
        return [
            {"peer_id": peer_id, "seen": now, **row}
            for row in cls._cut(session, peer_id, reports)
            if row["round"] > last and known.get(row["round"]) != tuple(row[name] for name in names)
        ]

    @staticmethod
    def _cut(session: Session, peer_id: str, reports: Mapping[int, RoundReport]) -> Iterator[dict[str, Any]]:
        """What is entered of a peer's reports. What a leaver handed in is another one's in the result, so unchecked."""
        known: dict[tuple[int, str], int] = {}
        for some in portions(reports):
            query = (
                select(Result.round, Result.lineage, func.coalesce(Share.samples, 0))
                .outerjoin(Share, and_(Share.round == Result.round, Share.peer_id == peer_id))
                .where(Result.round.in_(some))
            )
            known |= {(number, lineage): samples for number, lineage, samples in session.execute(query)}
        for report in reports.values():
            row = report.dict()
            row["lineage"] = printable(report.lineage)  # a stranger's words: PostgreSQL takes no zero bytes
            most = known.get((report.round, report.lineage), report.samples)
            if report.samples > most:  # the mean loss stays
                row["samples"] = most
                for name in ("mlm_loss_sum", "sop_loss_sum"):
                    row[name] *= most / report.samples
            yield row

    def add_result(
        self, number: int, lineage: str, samples: Mapping[str, float], learning_rate: float | None = None
    ) -> None:
        """Enter what came of a round: the samples that each peer put in, the lineage after it, and the learning rate of
        the step, where that is known. Of a round that was done again, the newer word counts."""
        with self._entering, self.database.session() as session:
            for known_of_peer in self._entered.values():
                known_of_peer.pop(number, None)
            change = Change(session)
            known = session.get(Result, number)
            if number <= change.thinned or (known is not None and known.lineage == lineage):
                return
            session.merge(Result(round=number, lineage=lineage, seen=time.time(), learning_rate=learning_rate))
            session.execute(delete(Share).where(Share.round == number))
            session.add_all(
                Share(round=number, peer_id=peer_id, samples=int(share))
                for peer_id, share in samples.items()
                if share >= 1
            )
            for table in (Result, Share):
                session.execute(delete(table).where(table.round <= number - _RESULTS_KEPT))
            change.drop(STANDS_IN, Contribution.round == number)
            change.touch(number)
            first_changed = change.close()
        self._curve.changed(first_changed)

    def stand_in(self) -> None:
        """Give members whose report of a round did not come credit for it by its result. A report that comes later
        replaces that."""
        with self.database.reading() as session:
            if not self._missing(session):
                return
        with self.database.session() as session:
            change = Change(session)
            self._stand_in(change, session)
            first_changed = change.close()
        self._curve.changed(first_changed)

    @staticmethod
    def _missing(session: Session, first: int | None = None, last: int | None = None) -> dict[int, list[Any]]:
        """What is known by results alone, by round."""
        query = (
            select(Share.round, Share.peer_id, Share.samples, Result.lineage, Result.seen)
            .join(Result, Result.round == Share.round)
            .join(Member, Member.peer_id == Share.peer_id)
            .outerjoin(Contribution, and_(Contribution.round == Share.round, Contribution.peer_id == Share.peer_id))
            .where(Contribution.round.is_(None), func.abs(time.time() - Result.seen) >= _REPORT_COMES)
            .where(Share.round > thinned(session))
        )  # abs: after the clock was put back, waiting for it to catch up would take too long
        if first is not None and last is not None:
            query = query.where(Share.round.between(first, last))
        missing: dict[int, list[Any]] = {}
        for row in session.execute(query):
            missing.setdefault(row.round, []).append(row)
        return missing

    def _stand_in(self, change: Change, session: Session, first: int | None = None, last: int | None = None) -> None:
        for number, shares in self._missing(session, first, last).items():
            whole = sum(share.samples for share in shares)
            own = max(0, whole - self._gifts(session, number))  # whose the gifts are is not known: all give way alike
            change.put(
                [
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
            )

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
        with self.database.session() as session:
            statement = insert(session, Device).values(peer_id=peer_id, device=printable(device))
            session.execute(
                statement.on_conflict_do_update(index_elements=["peer_id"], set_={"device": printable(device)})
            )
        self._devices[peer_id] = device

    def forget_rounds_after(self, number: int) -> None:
        """Drop the contributions to later rounds, which will be done again, and what their models scored.

        If the swarm is still alive, they were not lost: its peers report their last rounds again. What was done in
        rounds that were thinned stays counted, and is not counted again.
        """
        with self._entering, self.database.session() as session:
            self._entered.clear()
            change = Change(session)
            first = max(number, change.thinned)
            change.drop(Contribution.round > first)
            for table in (HeldoutRound, BlankFilled, Result, Share):
                session.execute(delete(table).where(table.round > number))
            first_changed = change.close()
        with self._heldout_lock:
            self._heldout = None
        self._curve.changed(first_changed)

    def mark_failed(self, number: int, reason: str) -> None:
        """Enter that a round had to be tried again, and why; the first reason stays."""
        if number in self._failed:
            return
        with self.database.session() as session:
            statement = insert(session, FailedRound).values(round=number, reason=printable(reason))
            session.execute(statement.on_conflict_do_nothing())
            change = Change(session)
            change.touch(number)
            first_changed = change.close()
        self._failed.add(number)
        self._curve.changed(first_changed)

    def thin(self) -> int:
        """Drop contributions that are older than `KEPT_SECONDS`; all sums stay as they are.

        Returns the last round whose contributions are gone; -1 where none's are.
        """
        with self.database.reading() as session:
            before = thinned(session)
            newest = session.scalar(select(func.max(Round.round))) or 0
            last = session.scalar(
                select(func.max(Round.round)).where(
                    Round.round.between(before + 1, newest - _KEPT_ROUNDS), Round.finished < time.time() - KEPT_SECONDS
                )
            )
        if last is None:
            return before
        for number in range(before, last, _THINNED_AT_ONCE):
            with self.database.session() as session:
                until = min(number + _THINNED_AT_ONCE, last)
                session.execute(delete(Contribution).where(Contribution.round <= until))
                session.execute(update(Totals).values(thinned=until))
        return last

    def add_heldout(self, scores: HeldoutStatus, blanks: BlanksStatus | None = None) -> None:
        """Enter what the model of a round scored on held-out text and filled into blanks; the newer word counts."""
        with self.database.session() as session:
            session.merge(HeldoutRound(**scores.model_dump(exclude={"loss"})))
            if blanks is not None:
                session.execute(delete(BlankFilled).where(BlankFilled.round == blanks.round))
                session.add_all(
                    BlankFilled(round=blanks.round, sentence=sentence, rank=rank, **guess.model_dump())
                    for sentence, guesses in enumerate(blanks.guesses)
                    for rank, guess in enumerate(guesses)
                )
        with self._heldout_lock:
            self._heldout = None

    def blanks(self, earlier: int = 3) -> list[BlanksStatus]:
        """What the newest measured model fills into the blanks, and before it that of `earlier` former rounds, each
        about half as far as the next, the first measured one among them; oldest first."""
        with self.database.reading() as session:
            measured = list(session.scalars(select(BlankFilled.round).distinct().order_by(BlankFilled.round)))
            if not measured:
                return []
            chosen, newest = {measured[0], measured[-1]}, measured[-1]
            for halvings in range(1, earlier):
                chosen.add(measured[bisect_left(measured, newest / 2**halvings)])
            query = select(BlankFilled).where(BlankFilled.round.in_(chosen))
            rows = session.scalars(query.order_by(BlankFilled.round, BlankFilled.sentence, BlankFilled.rank))
            found: dict[int, list[list[Guess]]] = {}
            for row in rows:
                sentences = found.setdefault(row.round, [])
                while len(sentences) <= row.sentence:
                    sentences.append([])
                sentences[row.sentence].append(Guess(word=row.word, probability=row.probability))
        return [BlanksStatus(round=number, guesses=guesses) for number, guesses in found.items()]

    # ---- the run

    def totals(self) -> RunTotals:
        """Of all that was ever entered."""
        anybody = select(func.count(distinct(Member.person))).join(Tally, Tally.peer_id == Member.peer_id)
        nameless = select(func.count(distinct(Member.username))).join(Tally, Tally.peer_id == Member.peer_id)
        with self.database.reading() as session:
            row = session.execute(select(Totals)).scalar_one()
            people = session.scalar(anybody.where(Tally.samples > 0)) or 0
            people += session.scalar(nameless.where(Tally.samples > 0, Member.person.is_(None))) or 0
        return RunTotals(row.rounds, row.samples, row.failed, row.seconds, row.waited, people)

    def rounds(self) -> list[RoundStatus]:
        """All finished rounds, oldest first; of a long run, `last_rounds`, `curve` and `export_rounds` are for you."""
        return list(self.export_rounds())

    def last_rounds(self, count: int) -> list[RoundStatus]:
        """The newest finished rounds, oldest first."""
        query = select(Round).where(Round.samples > 0).order_by(Round.round.desc()).limit(count + 1)
        with self.database.reading() as session:
            rows = list(session.scalars(query))[::-1]
        before = rows[0].finished if len(rows) > count else None
        return list(_statuses(rows[-count:] if count else [], before))

    def export_rounds(self, after: int = -1) -> Iterator[RoundStatus]:
        """All finished rounds later than `after`, oldest first, read a part at a time."""
        before = None
        while True:
            query = select(Round).where(Round.samples > 0, Round.round > after).order_by(Round.round).limit(_PAGE)
            with self.database.reading() as session:
                rows = list(session.scalars(query))
            if not rows:
                return
            yield from _statuses(rows, before)
            before, after = rows[-1].finished, rows[-1].round

    def curve(self, points: int) -> list[RoundStatus]:
        """The whole run by about `points` entries, oldest first: the last rounds one by one, and before them the means
        of so many rounds each, under the number of the last one; such an entry failed if any of them did."""
        return self._curve.of(self.database, points)

    def heldout(self, last: int | None = None) -> list[HeldoutStatus]:
        """What was measured on held-out text, oldest round first.

        :param last: how many of the newest; by default all
        """
        with self._heldout_lock:
            if self._heldout is None:
                with self.database.reading() as session:
                    self._heldout = [
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
            return self._heldout[-last:] if last else list(self._heldout)

    def failures(self) -> dict[int, str]:
        """Why a round had to be tried again, by round."""
        with self.database.reading() as session:
            return dict(session.execute(select(FailedRound.round, FailedRound.reason)).all())

    def computing_share(self) -> float | None:
        """Share of the volunteers' time, since each began to train, that they computed; None before the first round."""
        return self.totals().computing_share

    # ---- peers and people

    def samples_by_peer(self, peers: Sequence[str] | None = None) -> dict[str, int]:
        """:param peers: whose; by default all"""
        query = select(Tally.peer_id, Tally.samples).where(Tally.rounds >= 0)
        with self.database.reading() as session:
            if peers is None:
                return dict(session.execute(query).all())
            return {
                peer: samples
                for some in portions(peers)
                for peer, samples in session.execute(query.where(Tally.peer_id.in_(some)))
            }

    def people(self, last_round: int) -> list[PersonTotals]:
        """What each person did up to and with `last_round`, most samples first; who has no samples is left out.

        Of a round whose contributions are gone, what was done after it counts, too.
        """
        query = select(Member.peer_id, Member.username, Member.person).order_by(Member.joined)
        people: dict[object, PersonTotals] = {}
        with self.database.reading() as session:
            did = _until(session, last_round)
            members = session.execute(query).all()
        for peer_id, username, person in members:
            samples, seconds, waited = did.get(peer_id, (0, 0.0, 0.0))
            key = username if person is None else person
            known = people.get(key, PersonTotals(username, 0, 0.0, 0.0, person))
            people[key] = PersonTotals(
                username, known.samples + samples, known.seconds + seconds, known.waited + waited, person
            )
        found = [person for person in people.values() if person.samples > 0]
        return sorted(found, key=lambda person: (-person.samples, person.username))

    def seconds_by_device(self, last_round: int) -> dict[str | None, float]:
        """Seconds of computing up to and with `last_round` by kind of device, most first; None where it is not known,
        as of peers that reported to a Kantha which did not keep it. Old rounds as of `people`."""
        with self.database.reading() as session:
            did = _until(session, last_round)
            devices = dict(session.execute(select(Device.peer_id, Device.device)).all())
        found: dict[str | None, float] = {}
        for peer_id, (_, seconds, _) in did.items():
            device = devices.get(peer_id)
            found[device] = found.get(device, 0.0) + seconds
        order = sorted(found.items(), key=lambda entry: (-entry[1], entry[0] or ""))
        return {device: seconds for device, seconds in order if seconds > 0}

    def activity_between(self, first: date, last: date, person: int | None = None) -> list[Activity]:
        """What each person did on each of these days, oldest first; who left for good is one person, without a number.

        :param person: only this one's
        """
        query = (
            select(
                Member.person,
                PeerDay.day,
                func.sum(PeerDay.samples),
                func.sum(PeerDay.seconds),
                func.sum(PeerDay.rounds),
            )
            .outerjoin(Member, Member.peer_id == PeerDay.peer_id)
            .where(PeerDay.day.between(day_number(first), day_number(last)))
            .group_by(Member.person, PeerDay.day)
            .order_by(PeerDay.day, Member.person)
        )
        if person is not None:
            query = query.where(Member.person == person)
        with self.database.reading() as session:
            return [
                Activity(number, date_of(day), int(samples), seconds, int(rounds))
                for number, day, samples, seconds, rounds in session.execute(query)
                if rounds or seconds > 0
            ]

    def contributors(self, first: date | None = None, last: date | None = None) -> list[Activity]:
        """What each person did from one day to another (by default in the whole run), most samples first."""
        is_all = first is None and last is None
        table = Tally if is_all else PeerDay
        newest = func.max(Tally.seen if is_all else PeerDay.day)
        query = (
            select(Member.person, func.sum(table.samples), func.sum(table.seconds), func.sum(table.rounds), newest)
            .select_from(table)
            .outerjoin(Member, Member.peer_id == table.peer_id)
            .group_by(Member.person)
            .having(func.sum(table.samples) > 0)
        )
        if not is_all:
            query = query.where(PeerDay.day.between(day_number(first or date.min), day_number(last or date.max)))
        with self.database.reading() as session:
            found = [
                Activity(person, date_of(day_of(day) if is_all else int(day)), int(samples), seconds, int(rounds))
                for person, samples, seconds, rounds, day in session.execute(query)
            ]
        return sorted(found, key=lambda entry: -entry.samples)

    def streaks(self, today: date) -> dict[int, int]:
        """Days in a row with samples up to today, or to yesterday, by person; who has none is left out."""
        streaks: dict[int, int] = {}
        ended: set[int] = set()
        last = day_number(today)
        with self.database.reading() as session:
            while True:
                first = last - _STREAK_DAYS + 1
                query = (
                    select(Member.person, PeerDay.day)
                    .distinct()
                    .join(PeerDay, PeerDay.peer_id == Member.peer_id)
                    .where(PeerDay.day.between(first, last), PeerDay.samples > 0)
                )
                days: dict[int, set[int]] = {}
                for person, day in session.execute(query):
                    if person is not None:
                        days.setdefault(person, set()).add(day)
                is_first = last == day_number(today)
                for person, active in days.items():
                    if person in ended or (not is_first and person not in streaks):
                        continue
                    day = last
                    if is_first and day not in active:
                        day -= 1  # today is not over
                    while day >= first and day in active:
                        streaks[person] = streaks.get(person, 0) + 1
                        day -= 1
                    if day >= first:
                        ended.add(person)
                ended |= streaks.keys() - days.keys()
                if not streaks.keys() - ended:
                    return streaks
                last = first - 1

    def recent(self, seconds: float) -> dict[int | None, int]:
        """Samples of each person in the last so many seconds; None are those who left for good."""
        query = (
            select(_PEER, func.sum(Contribution.samples))
            .where(Contribution.seen > time.time() - seconds)
            .group_by(_PEER)
        )
        with self.database.reading() as session:
            by_peer = session.execute(query).all()
            people = dict(session.execute(select(Member.peer_id, Member.person)).all())
        found: dict[int | None, int] = {}
        for peer_id, samples in by_peer:
            person = people.get(peer_id)
            found[person] = found.get(person, 0) + int(samples)
        return {person: samples for person, samples in found.items() if samples > 0}

    def person_machines(self, person: int) -> list[PersonMachine]:
        """Those that were heard of last come first."""
        query = (
            select(
                Member.peer_id,
                Member.service,
                func.coalesce(Device.device, ""),
                func.coalesce(Tally.samples, 0),
                func.coalesce(Tally.seconds, 0.0),
                Tally.seen,
            )
            .outerjoin(Tally, Tally.peer_id == Member.peer_id)
            .outerjoin(Device, Device.peer_id == Member.peer_id)
            .where(Member.person == person)
        )
        with self.database.reading() as session:
            found = [PersonMachine(*row) for row in session.execute(query)]
        return sorted(found, key=lambda machine: -(machine.seen or 0.0))

    def person_sessions(self, person: int, limit: int = 100) -> list[PersonSession]:
        """The newest first."""
        query = select(Stay).where(Stay.person == person).order_by(Stay.began.desc(), Stay.id.desc()).limit(limit)
        with self.database.reading() as session:
            return [
                PersonSession(stay.peer_id, stay.service, stay.label, stay.began, stay.seen)
                for stay in session.scalars(query)
            ]

    def export_contributions(self) -> Iterator[PeerRound]:
        """Those that are not thinned, by round, read a part at a time."""
        after = (-1, "")
        while True:
            query = (
                select(
                    Contribution.round,
                    Contribution.peer_id,
                    Member.person,
                    Contribution.samples,
                    Contribution.seconds,
                    Contribution.waited,
                    Contribution.seen,
                )
                .outerjoin(Member, Member.peer_id == Contribution.peer_id)
                .where(
                    or_(
                        Contribution.round > after[0],
                        and_(Contribution.round == after[0], Contribution.peer_id > after[1]),
                    )
                )
                .order_by(Contribution.round, Contribution.peer_id)
                .limit(_PAGE)
            )
            with self.database.reading() as session:
                rows = session.execute(query).all()
            if not rows:
                return
            yield from (PeerRound(*row) for row in rows)
            after = rows[-1].round, rows[-1].peer_id

    def close(self) -> None:
        self.database.close()


class _Curve:
    """The rounds of a long run as a few hundred means. Those of rounds long past are kept: they hardly ever change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._points = self._width = self._end = 0  # of what is kept: rounds for a mean, and the first that is in none
        self._means: list[RoundStatus] = []

    def changed(self, first: int | None) -> None:
        """:param first: of the rounds that did; None: none"""
        with self._lock:
            if first is not None and first < self._end:
                self._width = 0

    def of(self, database: Database, points: int) -> list[RoundStatus]:
        points = max(2, points)
        exact = min(_LAST_ROUNDS, points // 2)
        with self._lock, database.reading() as session:
            newest = session.scalar(select(func.max(Round.round)).where(Round.samples > 0)) or 0
            width = 1
            while newest > points and (newest - exact) / width > points - exact:
                width *= 2
            end = (newest - exact) // width * width if width > 1 else 0
            if (points, width) != (self._points, self._width) or end < self._end:
                self._points, self._width, self._end, self._means = points, width, 0, []
            if end > self._end:
                self._means += self._read_means(session, width, self._end, end)
                self._end = end
            query = select(Round).where(Round.samples > 0, Round.round >= end).order_by(Round.round)
            before = self._means[-1].finished if self._means else None
            return [*self._means, *_statuses(list(session.scalars(query)), before)]

    def _read_means(self, session: Session, width: int, first: int, end: int) -> Iterator[RoundStatus]:
        query = (
            select(
                func.max(Round.round).label("round"),
                func.count().label("count"),
                func.sum(Round.samples).label("samples"),
                func.sum(Round.told).label("told"),
                func.sum(Round.mlm_loss_sum).label("mlm_loss_sum"),
                func.sum(Round.sop_loss_sum).label("sop_loss_sum"),
                func.sum(Round.volunteers).label("volunteers"),
                func.max(Round.finished).label("finished"),
                func.avg(Round.learning_rate).label("learning_rate"),
                func.sum(Round.seconds).label("seconds"),
                func.sum(Round.waited).label("waited"),
                func.max(Round.reason).label("reason"),
            )
            .where(Round.samples > 0, Round.round >= first, Round.round < end)
            .group_by(Round.round // literal_column(str(width)))
            .order_by(func.max(Round.round))
        )
        before = self._means[-1].finished if self._means else None
        for row in session.execute(query):
            mlm, sop = _mean(row.mlm_loss_sum, row.told), _mean(row.sop_loss_sum, row.told)
            yield RoundStatus(
                round=row.round,
                samples=round(row.samples / row.count),
                loss=None if mlm is None or sop is None else mlm + sop,
                mlm_loss=mlm,
                sop_loss=sop,
                volunteers=round(row.volunteers / row.count),
                finished=row.finished,
                seconds=None if before is None else max(0.0, row.finished - before) / row.count,
                learning_rate=row.learning_rate,
                computing_share=_mean(row.seconds, row.seconds + row.waited),
                failed=row.reason is not None,
                reason=row.reason,
            )
            before = row.finished


def _statuses(rows: Iterable[Round], before: float | None) -> Iterator[RoundStatus]:
    """:param before: when the round before the first one finished"""
    for row in rows:
        mlm, sop = _mean(row.mlm_loss_sum, row.told), _mean(row.sop_loss_sum, row.told)
        yield RoundStatus(
            round=row.round,
            samples=row.samples,
            loss=None if mlm is None or sop is None else mlm + sop,
            mlm_loss=mlm,
            sop_loss=sop,
            volunteers=row.volunteers,
            finished=row.finished,
            seconds=None if before is None else max(0.0, row.finished - before),
            learning_rate=row.learning_rate,
            computing_share=_mean(row.seconds, row.seconds + row.waited),
            failed=row.reason is not None,
            reason=row.reason,
        )
        before = row.finished


def _mean(whole: float, count: float) -> float | None:
    return float(whole) / float(count) if count else None


def _until(session: Session, last_round: int) -> dict[str, tuple[int, float, float]]:
    """Samples, seconds and seconds waited up to and with a round, by peer."""
    query = select(Tally.peer_id, Tally.samples, Tally.seconds, Tally.waited)
    did = {peer_id: (samples, seconds, waited) for peer_id, samples, seconds, waited in session.execute(query)}
    later = (
        select(_PEER, func.sum(Contribution.samples), func.sum(Contribution.seconds), func.sum(Contribution.waited))
        .where(Contribution.round > last_round)
        .group_by(_PEER)
    )
    for peer_id, samples, seconds, waited in session.execute(later):
        before = did[peer_id]
        did[peer_id] = (before[0] - int(samples), before[1] - seconds, before[2] - waited)
    return did
