"""The sums that pages show are those of the contributions, whatever happens to these."""

import random
from collections import Counter
from datetime import UTC, date, datetime
from types import SimpleNamespace

import pytest

from kantha.coordinator import ledger as ledger_module
from kantha.coordinator.database import Database
from kantha.coordinator.leases import Lease, enter_stay
from kantha.coordinator.ledger import (
    Activity,
    Ledger,
    PeerRound,
    PersonMachine,
    PersonSession,
    RunTotals,
    forget_person,
)
from kantha.coordinator.status import HeldoutStatus
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport

DAY = 86_400.0
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


class Clock:
    now = NOON

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The ledger's."""
    clock = Clock()
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(time=clock.time))
    return clock


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


def join(ledger: Ledger, peer_id: str, person: int | None, username: str = "") -> None:
    membership = Membership(
        serial="0f" * 8,
        run="0f" * 32,
        username=username or f"person {person}",
        peer_id=peer_id,
        service="kaggle",
        roles=("trainer",),
        issued=0,
        expires=100,
    )
    ledger.add_member(membership, person)


def report(number: int, samples: int, lineage: str = "", **figures: float) -> RoundReport:
    values = {"seconds": 2.0, "waited": 0.5, "mlm_loss_sum": 5.0 * samples, "sop_loss_sum": 0.5 * samples, **figures}
    return RoundReport(round=number, lineage=lineage or f"after {number}", samples=samples, peers=2, **values)


def day(number: int) -> date:
    return date(2026, 3, number)


def assert_in_step(ledger: Ledger) -> None:
    """All sums are those of the contributions that are there."""
    entries = list(ledger.export_contributions())
    by_round, by_peer, by_day = Counter[int](), Counter[str](), Counter[tuple[int | None, date]]()
    people = Counter[int | None]()
    for entry in entries:
        by_round[entry.round] += entry.samples
        by_peer[entry.peer_id] += entry.samples
        people[entry.person] += entry.samples
        by_day[entry.person, datetime.fromtimestamp(entry.seen, UTC).date()] += entry.samples
    rounds = ledger.rounds()
    assert {entry.round: entry.samples for entry in rounds} == +by_round
    assert +Counter(ledger.samples_by_peer()) == +by_peer
    activity = ledger.activity_between(date(1970, 1, 1), date(2100, 1, 1))
    assert +Counter({(entry.person, entry.day): entry.samples for entry in activity}) == +by_day
    assert {entry.person: entry.samples for entry in ledger.contributors()} == +people
    totals = ledger.totals()
    assert (totals.samples, totals.rounds) == (by_round.total(), len(rounds))
    assert totals.failed == sum(entry.failed for entry in rounds)
    assert totals.seconds == pytest.approx(sum(entry.seconds for entry in entries))
    assert totals.waited == pytest.approx(sum(entry.waited for entry in entries))
    assert sum(entry.seconds for entry in activity) == pytest.approx(totals.seconds)


def test_sums_stay_those_of_the_contributions_whatever_happens(ledger: Ledger, clock: Clock) -> None:
    """Reports come late, again and changed; results replace others; rounds are forgotten, and fail."""
    chance = random.Random(6)
    peers = [f"peer {number}" for number in range(6)]
    for number, peer in enumerate(peers[:-1]):
        join(ledger, peer, number // 2)
    newest = 1
    for step in range(150):
        clock.now += chance.choice([1.0, 60.0, DAY / 5])
        what = chance.random()
        if what < 0.6:
            rounds = sorted(chance.sample(range(max(1, newest - 5), newest + 2), 2))
            newest = max(newest, rounds[-1])
            ledger.add_rounds(
                chance.choice(peers),
                [report(number, chance.choice([0, 8, 16]), seconds=chance.random()) for number in rounds],
            )
        elif what < 0.75:
            shares = {peer: float(chance.choice([0, 8, 16])) for peer in peers}
            ledger.add_result(newest, f"after {newest} {chance.choice('ab')}", shares, 0.25)
        elif what < 0.9:
            ledger.stand_in()
        elif what < 0.95:
            ledger.mark_failed(chance.randint(max(1, newest - 3), newest + 1), "a peer stalled")
        else:
            newest = max(1, newest - chance.randint(0, 3))
            ledger.forget_rounds_after(newest)
        if step % 10 == 9:
            assert_in_step(ledger)
    assert ledger.totals().samples > 0
    assert ledger.totals().failed > 0


def test_totals_are_of_the_whole_run(ledger: Ledger) -> None:
    assert ledger.totals() == RunTotals(0, 0, 0, 0.0, 0.0, 0)
    for peer, person in (("a", 1), ("b", 1), ("c", 2), ("idle", 3)):
        join(ledger, peer, person)
    for peer in "abc":
        ledger.add_rounds(peer, [report(1, 8), report(2, 16)])
    ledger.add_rounds("idle", [report(2, 0, seconds=0.0, waited=0.0)])
    ledger.mark_failed(2, "parts are missing")
    ledger.mark_failed(3, "not done yet")
    assert ledger.totals() == RunTotals(rounds=2, samples=72, failed=1, seconds=12.0, waited=3.0, people=2)
    assert ledger.totals().computing_share == 0.8


def test_rounds_know_their_length_learning_rate_and_time_computing(ledger: Ledger, clock: Clock) -> None:
    ledger.add_rounds("a", [report(1, 8)])
    clock.now += 38.0
    ledger.add_result(2, "after 2", {"a": 8.0}, 0.125)
    ledger.add_rounds("a", [report(1, 8), report(2, 8, seconds=3.0, waited=1.0)])
    first, second = ledger.last_rounds(50)
    assert (first.seconds, first.learning_rate, first.computing_share) == (None, None, 0.8)
    assert (second.seconds, second.learning_rate, second.computing_share) == (38.0, 0.125, 0.75)
    assert ledger.last_rounds(1) == [second]
    assert ledger.last_rounds(0) == []
    ledger.add_result(65 + 2, "after 67", {"a": 8.0}, 0.5)  # the result of round 2 is not kept any more
    ledger.add_rounds("b", [report(2, 8)])
    assert ledger.last_rounds(50)[1].learning_rate == 0.125


def test_a_curve_is_exact_at_its_end_and_keeps_the_mean_before(ledger: Ledger, clock: Clock) -> None:
    chance = random.Random(1)

    def compute(first: int, last: int) -> None:
        for number in range(first, last + 1):
            clock.now += 10.0
            loss = 8.0 - number / 500 + chance.random()
            ledger.add_rounds("a", [report(number, 8, mlm_loss_sum=8 * loss)])

    compute(1, 20)
    assert ledger.curve(20) == ledger.rounds()
    compute(21, 90)
    rounds, curve = ledger.rounds(), ledger.curve(20)
    assert 15 <= len(curve) <= 30
    assert curve[-10:] == rounds[-10:]
    assert [entry.round for entry in curve] == sorted({entry.round for entry in curve})
    assert curve[0].mlm_loss == pytest.approx(
        sum(entry.mlm_loss for entry in rounds[: curve[0].round]) / curve[0].round
    )
    assert [entry.seconds for entry in curve[1:-10]] == [pytest.approx(10.0)] * (len(curve) - 11)
    compute(91, 110)  # goes on from what is known
    assert ledger.curve(20) == Ledger(ledger.database).curve(20)
    ledger.mark_failed(3, "late news of a round long past")
    assert ledger.curve(20)[0].failed
    assert ledger.curve(20) == Ledger(ledger.database).curve(20)
    ledger.forget_rounds_after(40)
    assert ledger.curve(20)[-1].round == 40
    assert ledger.curve(1000) == ledger.rounds()


def test_what_was_done_is_told_by_person_and_day(ledger: Ledger, clock: Clock) -> None:
    for peer, person in (("a", 1), ("b", 1), ("c", 2)):
        join(ledger, peer, person)
    ledger.add_rounds("a", [report(1, 8)])
    ledger.add_rounds("b", [report(1, 8)])
    clock.now += DAY
    ledger.add_rounds("a", [report(1, 8), report(2, 16)])
    ledger.add_rounds("c", [report(2, 4)])
    ledger.add_rounds("stranger", [report(2, 2)])
    assert ledger.activity_between(day(1), day(1)) == [Activity(1, day(1), 16, 4.0, 2)]
    assert {(entry.person, entry.samples) for entry in ledger.activity_between(day(2), day(3))} == {
        (1, 16),
        (2, 4),
        (None, 2),
    }
    assert ledger.activity_between(day(1), day(9), person=2) == [Activity(2, day(2), 4, 2.0, 1)]
    assert ledger.contributors() == [
        Activity(1, day(2), 32, 6.0, 3),
        Activity(2, day(2), 4, 2.0, 1),
        Activity(None, day(2), 2, 2.0, 1),
    ]
    assert ledger.contributors(day(1), day(1)) == [Activity(1, day(1), 16, 4.0, 2)]
    assert ledger.recent(DAY) == {1: 16, 2: 4, None: 2}  # exactly: those of yesterday noon are not
    assert ledger.recent(DAY + 1) == {1: 32, 2: 4, None: 2}


def test_streaks_are_days_in_a_row_until_today_or_yesterday(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_STREAK_DAYS", 4)
    active = {1: range(20), 2: range(1, 9), 3: range(2, 9), 4: [0, 1, 3, 4], 5: [0, *range(2, 19)]}  # days ago
    for person in active:
        join(ledger, f"peer {person}", person)
    now = clock.now
    for ago in range(19, -1, -1):
        clock.now = now - ago * DAY
        for person, days in active.items():
            if ago in days:
                ledger.add_rounds(f"peer {person}", [report(200 - ago, 1)])
    assert ledger.streaks(day(1)) == {1: 20, 2: 8, 4: 2, 5: 1}
    assert ledger.streaks(day(2)) == {1: 20, 4: 2, 5: 1}
    assert ledger.streaks(day(3)) == {}


def test_machines_and_sessions_of_a_person(ledger: Ledger, clock: Clock) -> None:
    for peer, person in (("a", 1), ("b", 1), ("c", 2)):
        join(ledger, peer, person)
    ledger.set_device("a", "Tesla T4")
    ledger.add_rounds("a", [report(1, 8)])
    assert ledger.person_machines(1) == [
        PersonMachine("a", "kaggle", "Tesla T4", 8, 2.0, NOON),
        PersonMachine("b", "kaggle", "", 0, 0.0, None),
    ]
    lease = {"peer_id": "a", "person": 1, "service": "kaggle", "instance": "my notebook", "since": NOON}
    with ledger.database.session() as session:
        for moment, goes_on in ((0, False), (45, True), (90, True), (900, False)):
            enter_stay(session, Lease(**lease, renewed=NOON + moment), goes_on)
    assert ledger.person_sessions(1) == [
        PersonSession("a", "kaggle", "my notebook", NOON + 900, NOON + 900),
        PersonSession("a", "kaggle", "my notebook", NOON, NOON + 90),
    ]
    assert ledger.person_sessions(1, limit=1)[0].began == NOON + 900
    assert ledger.person_sessions(2) == []


def test_who_is_forgotten_leaves_samples_and_nothing_else(ledger: Ledger, clock: Clock) -> None:
    for peer, person in (("a", 1), ("b", 2)):
        join(ledger, peer, person)
        ledger.set_device(peer, f"device of {peer}")
        ledger.add_rounds(peer, [report(1, 8)])
        with ledger.database.session() as session:
            lease = Lease(peer_id=peer, person=person, service="kaggle", instance="", since=NOON, renewed=NOON)
            enter_stay(session, lease, False)
    before = ledger.totals()
    with ledger.database.session() as session:
        forget_person(session, 1)
    assert ledger.totals() == before
    assert_in_step(ledger)
    assert sorted((entry.person or 0, entry.samples) for entry in ledger.contributors()) == [(0, 8), (2, 8)]
    assert ledger.person_machines(1) == []
    assert ledger.person_sessions(1) == []
    assert ledger.members() == {"a": "", "b": "person 2"}
    assert ledger.seconds_by_device(1) == {"device of b": 2.0, None: 2.0}


# ---- thinning


def test_old_contributions_are_dropped_and_their_sums_stay(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_KEPT_ROUNDS", 5)
    monkeypatch.setattr(ledger_module, "_THINNED_AT_ONCE", 7)
    for peer, person in (("a", 1), ("b", 2)):
        join(ledger, peer, person)
    for number in range(1, 41):
        clock.now += DAY
        for peer in "ab":
            ledger.add_rounds(peer, [report(number, 8)])

    def known() -> tuple[object, ...]:
        return (
            ledger.totals(),
            ledger.rounds(),
            ledger.contributors(),
            ledger.samples_by_peer(),
            ledger.people(40),
            ledger.people(35),
            ledger.activity_between(day(1), date(2026, 12, 31)),
            ledger.recent(20 * DAY),
            ledger.curve(20),
        )

    before = known()
    assert ledger.thin() == 9  # the tenth is 30 days old
    assert ledger.thin() == 9
    assert next(ledger.export_contributions()).round == 10
    assert known() == before

    # nothing of them is counted again, whatever is reported, found out or forgotten
    ledger.add_rounds("a", [report(3, 800), report(9, 8), report(10, 8)])
    ledger.add_rounds("c", [report(9, 8)])
    ledger.add_result(9, "another", {"a": 80.0})
    ledger.stand_in()
    assert known() == before
    ledger.forget_rounds_after(4)
    assert ledger.totals().samples == 9 * 16 == sum(ledger.samples_by_peer().values())
    assert [entry.round for entry in ledger.rounds()] == list(range(1, 10))
    ledger.add_rounds("a", [report(number, 8) for number in range(5, 12)])
    assert ledger.totals().samples == 9 * 16 + 2 * 8 == sum(entry.samples for entry in ledger.contributors())

    clock.now += 300 * DAY
    assert ledger.thin() == 9  # however old: reports may still name the last rounds


# ---- exports


def test_exports_are_read_in_parts_and_whole(ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_PAGE", 3)
    join(ledger, "a", 1)
    for number in range(1, 8):
        clock.now += 5.0
        for peer in "ab":
            ledger.add_rounds(peer, [report(number, 8)])
    assert [entry.round for entry in ledger.export_rounds()] == list(range(1, 8))
    assert [entry.seconds for entry in ledger.export_rounds()] == [None, *[5.0] * 6]
    entries = list(ledger.export_contributions())
    assert [(entry.round, entry.peer_id) for entry in entries] == [(n, peer) for n in range(1, 8) for peer in "ab"]
    assert entries[-2] == PeerRound(7, "a", 1, 8, 2.0, 0.5, NOON + 35.0)
    assert entries[-1].person is None
    assert [entry.round for entry in ledger.export_rounds(after=5)] == [6, 7]


def test_heldout_scores_are_given_from_the_end(ledger: Ledger) -> None:
    for number in range(5):
        ledger.add_heldout(
            HeldoutStatus(
                round=number,
                loss=5.5,
                mlm_loss=5.0,
                mlm_accuracy=0.1,
                sop_loss=0.5,
                sop_accuracy=0.5,
                masked=9,
                pairs=9,
            )
        )
    assert [entry.round for entry in ledger.heldout(2)] == [3, 4]
    assert len(ledger.heldout()) == 5


# ---- what strangers say


def test_what_no_database_can_keep_is_entered_all_the_same(ledger: Ledger) -> None:
    join(ledger, "a", 1)
    ledger.set_device("a", "T4\x00\x1b[31m")
    ledger.mark_failed(1, "\x00")
    ledger.add_rounds("a", [report(1, 8, lineage="\x00after")])
    ledger.add_rounds("a", [report(1, 8, lineage="\x00after")])
    assert ledger.totals().samples == 8
    assert ledger.person_machines(1)[0].device == "T4??[31m"
    assert ledger.rounds()[0].reason == "?"


def test_the_largest_figures_do_not_break_the_sums(ledger: Ledger) -> None:
    most = {"seconds": 9.9e11, "waited": 9.9e11, "mlm_loss_sum": 9.9e11, "sop_loss_sum": 9.9e11}
    for peer in "abc":
        join(ledger, peer, 1)
        ledger.add_rounds(peer, [report(number, 10**9, **most) for number in range(1, 4)])
    assert ledger.totals().samples == 9 * 10**9
    assert ledger.contributors()[0].samples == 9 * 10**9
    ledger.add_rounds("a", [report(1, 1)])
    assert ledger.totals().samples == 8 * 10**9 + 1
