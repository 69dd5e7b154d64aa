import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import event, text

from kantha.coordinator import ledger as ledger_module
from kantha.coordinator.ledger import Ledger, PersonTotals
from kantha.coordinator.status import HeldoutStatus
from kantha.errors import StorageError
from kantha.swarm.membership import Membership
from kantha.swarm.reports import RoundReport


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


def membership(peer_id: str, username: str, expires: int = 100) -> Membership:
    return Membership(
        serial="0f" * 8,
        run="0f" * 32,
        username=username,
        peer_id=peer_id,
        service="local",
        roles=("trainer",),
        issued=0,
        expires=expires,
    )


def report(
    number: int, samples: int, mlm: float = 5.0, sop: float = 0.5, seconds: float = 1.0, waited: float = 0.0
) -> RoundReport:
    """What a peer with these mean losses says."""
    return RoundReport(
        round=number,
        lineage=f"after {number}",
        samples=samples,
        seconds=seconds,
        waited=waited,
        mlm_loss_sum=mlm * samples,
        sop_loss_sum=sop * samples,
        peers=2,
    )


def heldout(number: int, mlm: float = 5.25) -> HeldoutStatus:
    return HeldoutStatus(
        round=number,
        loss=mlm + 0.5,
        mlm_loss=mlm,
        mlm_accuracy=0.125,
        sop_loss=0.5,
        sop_accuracy=0.75,
        masked=2300,
        pairs=512,
    )


def test_heldout_scores_are_kept_by_round_and_forgotten_with_the_rounds(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for entry in (heldout(10), heldout(0, 8.25), heldout(20), heldout(10, 5.125)):
        ledger.add_heldout(entry)
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.heldout() == [heldout(0, 8.25), heldout(10, 5.125), heldout(20)]
    ledger.forget_rounds_after(10)  # 20 will be another model
    assert ledger.heldout() == [heldout(0, 8.25), heldout(10, 5.125)]
    ledger.close()


def test_a_round_is_entered_once_for_each_peer(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.add_rounds("a", [report(1, 10), report(2, 20), report(2, 20)])
    ledger.add_rounds("b", [report(2, 5)])
    ledger.add_rounds("a", [report(3, 30)])
    ledger.add_rounds("a", [])
    assert [(entry.round, entry.samples, entry.volunteers) for entry in ledger.rounds()] == [
        (1, 10, 1),
        (2, 25, 2),
        (3, 30, 1),
    ]
    assert ledger.samples_by_peer() == {"a": 60, "b": 5}


def test_a_round_that_was_done_again_replaces_the_one_before(ledger: Ledger) -> None:
    ledger.add_rounds("a", [report(1, 10), report(2, 20)])
    ledger.add_rounds("b", [report(2, 5)])
    before = ledger.rounds()
    ledger.add_rounds("a", [report(1, 10), report(2, 30, mlm=4.0)])
    first, second = ledger.rounds()
    assert first == before[0]  # repeated, not done again: it finished when it did
    assert second.samples == 35
    assert second.mlm_loss == pytest.approx((30 * 4.0 + 5 * 5.0) / 35)


def test_what_a_living_swarm_repeats_is_not_lost_by_forgetting(ledger: Ledger) -> None:
    reports = [report(number, 10) for number in range(1, 6)]
    ledger.add_rounds("a", reports)
    ledger.forget_rounds_after(3)
    assert [entry.round for entry in ledger.rounds()] == [1, 2, 3]
    assert ledger.samples_by_peer() == {"a": 30}
    ledger.add_rounds("a", reports)
    assert [(entry.round, entry.samples) for entry in ledger.rounds()] == [(n, 10) for n in range(1, 6)]


def test_a_round_that_had_to_be_tried_again_failed_for_the_first_reason_told(ledger: Ledger) -> None:
    ledger.add_rounds("a", [report(1, 10), report(2, 10)])
    ledger.add_rounds("b", [report(2, 5)])
    assert [entry.failed for entry in ledger.rounds()] == [False, False]
    ledger.mark_failed(2, "a peer stalled (Qm1234)")
    ledger.mark_failed(2, "parts are missing")  # in another peer's words
    ledger.mark_failed(3, "")  # not done yet
    assert [(entry.round, entry.samples, entry.failed, entry.reason) for entry in ledger.rounds()] == [
        (1, 10, False, None),
        (2, 15, True, "a peer stalled (Qm1234)"),
    ]
    assert ledger.failures() == {2: "a peer stalled (Qm1234)", 3: ""}
    ledger.add_rounds("a", [report(3, 10)])
    assert ledger.rounds()[2].failed


def test_a_failed_round_stays_one_after_a_restart_of_the_coordinator(ledger: Ledger) -> None:
    ledger.add_rounds("a", [report(1, 10), report(2, 10)])
    ledger.mark_failed(2, "parts are missing")
    ledger.forget_rounds_after(1)
    ledger.add_rounds("a", [report(2, 10)])
    assert [entry.failed for entry in ledger.rounds()] == [False, True]


def test_the_computing_share_is_that_of_all_volunteers_time(ledger: Ledger) -> None:
    assert ledger.computing_share() is None
    ledger.add_rounds("a", [report(1, 10, seconds=9.0, waited=1.0), report(2, 10, seconds=10.0, waited=0.0)])
    assert ledger.computing_share() == pytest.approx(0.95)
    ledger.add_rounds("b", [report(2, 0, seconds=0.0, waited=0.0), report(3, 5, seconds=11.0, waited=29.0)])
    assert ledger.computing_share() == pytest.approx(30 / 60)


def test_the_computing_share_of_no_time_is_unknown(ledger: Ledger) -> None:
    ledger.add_rounds("a", [report(1, 0, seconds=0.0)])
    assert ledger.computing_share() is None


def test_what_does_not_change_is_not_added_up_again(ledger: Ledger) -> None:
    queries: list[str] = []
    event.listen(
        ledger.database._engine, "before_cursor_execute", lambda _c, _k, statement, *_: queries.append(statement)
    )
    ledger.add_rounds("a", [report(1, 10)])
    ledger.mark_failed(1, "parts are missing")
    ledger.rounds()
    queries.clear()
    ledger.add_rounds("a", [report(1, 10)])
    ledger.mark_failed(1, "parts are missing")
    assert len(ledger.rounds()) == 1
    assert not any("sum(" in query for query in queries)
    ledger.add_rounds("a", [report(1, 20)])
    assert ledger.rounds()[0].samples == 20


def test_a_full_disk_is_told_and_survived(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.add_rounds("a", [report(1, 10)])

    def set_size(pages: int) -> None:
        with ledger.database._engine.connect() as connection:  # the pool has one connection: the one that is used next
            connection.execute(text(f"PRAGMA max_page_count={pages}"))

    set_size(1)
    with pytest.raises(StorageError, match="make room") as caught:
        ledger.add_rounds("a", [report(number, 10) for number in range(1000)])
    assert str(caught.value).startswith(f"{tmp_path / 'ledger.sqlite'}: ")
    assert len(str(caught.value).splitlines()) == 1
    assert ledger.rounds()
    set_size(10_000)
    ledger.add_member(membership("a", "Asha"))
    ledger.add_rounds("a", [report(number, 10) for number in range(32)])
    assert ledger.members() == {"a": "Asha"}
    ledger.close()


def test_a_ledger_that_is_damaged_is_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match="whole"):
        Ledger(path)


def test_the_loss_of_a_round_is_the_mean_over_its_samples(ledger: Ledger) -> None:
    ledger.add_rounds("a", [report(1, 30, mlm=4.0, sop=0.2)])
    ledger.add_rounds("b", [report(1, 10, mlm=8.0, sop=0.6)])
    [entry] = ledger.rounds()
    assert entry.mlm_loss == pytest.approx(5.0)
    assert entry.sop_loss == pytest.approx(0.3)
    assert entry.loss == pytest.approx(5.3)


def test_a_peer_without_samples_in_a_round_changes_nothing(ledger: Ledger) -> None:
    ledger.add_rounds("a", [report(1, 10, mlm=4.0)])
    ledger.add_rounds("b", [report(1, 0), report(2, 0)])
    [entry] = ledger.rounds()
    assert (entry.round, entry.samples, entry.mlm_loss, entry.volunteers) == (1, 10, 4.0, 1)
    assert ledger.samples_by_peer().get("b", 0) == 0


def test_rounds_come_in_order_whenever_they_were_reported(ledger: Ledger) -> None:
    for number in (10, 2, 33, 1):
        ledger.add_rounds("a", [report(number, 1)])
    entries = ledger.rounds()
    assert [entry.round for entry in entries] == [1, 2, 10, 33]
    assert len({entry.finished for entry in entries}) == 4


def test_an_empty_ledger_has_nothing(ledger: Ledger) -> None:
    assert ledger.rounds() == []
    assert ledger.members() == {}
    assert ledger.samples_by_peer() == {}
    assert ledger.failures() == {}
    assert ledger.people(1) == []
    assert ledger.seconds_by_device(1) == {}


def test_a_member_who_comes_back_is_the_same_member(ledger: Ledger) -> None:
    ledger.add_member(membership("a", "আশা"))
    ledger.add_member(membership("b", "Rafiq"))
    ledger.add_member(membership("a", "Asha", expires=200))
    assert ledger.members() == {"a": "Asha", "b": "Rafiq"}


def test_people_are_added_up_over_their_peers_up_to_a_round(ledger: Ledger) -> None:
    for peer, name in (("a", "Asha"), ("b", "Rafiq"), ("c", "Asha"), ("d", "Mitu"), ("e", "Karim")):
        ledger.add_member(membership(peer, name))
    ledger.add_rounds("a", [report(1, 10, seconds=4.0, waited=1.0), report(2, 10, seconds=3.0), report(3, 99)])
    ledger.add_rounds("b", [report(2, 40, seconds=5.0)])
    ledger.add_rounds("c", [report(2, 5, seconds=2.0)])
    ledger.add_rounds("d", [report(2, 0)])
    ledger.add_rounds("e", [report(3, 1000)])
    assert ledger.people(2) == [PersonTotals("Rafiq", 40, 5.0, 0.0), PersonTotals("Asha", 25, 9.0, 1.0)]
    assert [person.username for person in ledger.people(3)] == ["Karim", "Asha", "Rafiq"]
    assert ledger.people(0) == []


def test_hours_are_added_up_by_device(ledger: Ledger) -> None:
    ledger.add_rounds("a", [report(1, 1, seconds=4.0), report(2, 1, seconds=3.0)])
    ledger.add_rounds("b", [report(1, 1, seconds=5.0)])
    ledger.add_rounds("c", [report(1, 1, seconds=20.0)])
    ledger.add_rounds("d", [report(1, 1, seconds=1.0)])
    for peer, device in (("a", "CPU"), ("a", "Tesla T4"), ("a", "Tesla T4"), ("b", "Tesla T4"), ("c", "CPU")):
        ledger.set_device(peer, device)
    assert list(ledger.seconds_by_device(1).items()) == [("CPU", 20.0), ("Tesla T4", 9.0), (None, 1.0)]
    assert ledger.seconds_by_device(2)["Tesla T4"] == 12.0
    assert ledger.seconds_by_device(0) == {}


# ---- reports that do not come


class Clock:
    now = 1e9

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The ledger's."""
    clock = Clock()
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(time=clock.time))
    return clock


@pytest.fixture
def members(ledger: Ledger) -> Ledger:
    """A ledger with three members: a, b and c."""
    for peer, name in (("a", "Asha"), ("b", "Rafiq"), ("c", "Mitu")):
        ledger.add_member(membership(peer, name))
    return ledger


def handed_in(number: int, samples: int) -> RoundReport:
    return report(number, samples).copy(update={"lineage": ""})


def after_a_while(ledger: Ledger, clock: Clock, seconds: float = 30.0) -> dict[str, int]:
    """Samples by peer, of those that have any."""
    clock.now += seconds
    ledger.stand_in()
    return {peer: samples for peer, samples in ledger.samples_by_peer().items() if samples}


def test_a_round_whose_only_trainer_was_killed_counts_by_its_result(members: Ledger, clock: Clock) -> None:
    """It was killed before it could report; the others had no samples in that round."""
    members.add_rounds("a", [report(2, 4, seconds=3.0, waited=1.0)])
    members.add_result(3, "after 3", {"a": 0.0, "b": 10.0, "coordinator": 0.0})
    members.add_rounds("a", [report(3, 0, seconds=0.0)])
    ended = clock.now
    assert after_a_while(members, clock, 29.0) == {"a": 4}
    assert [entry.round for entry in members.rounds()] == [2]
    assert after_a_while(members, clock, 1.0) == {"a": 4, "b": 10}
    _, entry = members.rounds()
    assert (entry.round, entry.samples, entry.volunteers, entry.finished) == (3, 10, 1, ended)
    assert (entry.loss, entry.mlm_loss, entry.sop_loss) == (None, None, None)
    assert members.people(3) == [PersonTotals("Rafiq", 10, 0.0, 0.0), PersonTotals("Asha", 4, 3.0, 1.0)]
    assert members.computing_share() == pytest.approx(0.75)
    assert members.seconds_by_device(3) == {None: 3.0}


def test_the_loss_of_a_round_is_that_of_the_samples_which_were_reported(members: Ledger, clock: Clock) -> None:
    members.add_result(1, "after 1", {"a": 30.0, "b": 10.0, "c": 1000.0})
    members.add_rounds("a", [report(1, 30, mlm=4.0, sop=0.2)])
    members.add_rounds("b", [report(1, 10, mlm=8.0, sop=0.6)])
    after_a_while(members, clock)
    [entry] = members.rounds()
    assert (entry.samples, entry.volunteers) == (1040, 3)
    assert entry.mlm_loss == pytest.approx(5.0)
    assert entry.sop_loss == pytest.approx(0.3)
    assert entry.loss == pytest.approx(5.3)


def test_a_report_that_comes_late_replaces_what_stood_in_for_it(members: Ledger, clock: Clock) -> None:
    members.add_result(1, "after 1", {"a": 30.0})
    assert after_a_while(members, clock) == {"a": 30}
    members.add_rounds("a", [report(1, 20, seconds=7.0)])
    assert after_a_while(members, clock) == {"a": 20}
    [entry] = members.rounds()
    assert (entry.samples, entry.loss) == (20, 5.5)
    assert members.computing_share() == 1.0


def test_who_is_no_member_gets_nothing(members: Ledger, clock: Clock) -> None:
    members.add_result(1, "after 1", {"a": 30.0, "stranger": 50.0})
    assert after_a_while(members, clock) == {"a": 30}


def test_what_the_result_says_outlives_the_coordinator(tmp_path: Path, clock: Clock) -> None:
    """Volunteer and coordinator are killed one after the other."""
    first = Ledger(tmp_path / "ledger.sqlite")
    first.add_member(membership("a", "Asha"))
    first.add_result(1, "after 1", {"a": 30.0})
    first.stand_in()
    first.close()
    second = Ledger(tmp_path / "ledger.sqlite")
    assert after_a_while(second, clock) == {"a": 30}
    second.close()


def test_a_clock_that_was_put_back_makes_nobody_wait(members: Ledger, clock: Clock) -> None:
    members.add_result(1, "after 1", {"a": 30.0})
    assert after_a_while(members, clock, -3600.0) == {"a": 30}


def test_a_result_that_was_replaced_leaves_nothing(members: Ledger, clock: Clock) -> None:
    for number in (1, 2):
        members.add_result(number, f"after {number}", {"a": 30.0, "b": 5.0})
    assert after_a_while(members, clock) == {"a": 60, "b": 10}
    members.add_result(2, "after 2, again", {"a": 7.0})
    assert after_a_while(members, clock) == {"a": 37, "b": 5}
    members.forget_rounds_after(1)
    assert after_a_while(members, clock) == {"a": 30, "b": 5}


def test_a_result_that_is_repeated_changes_nothing(members: Ledger, clock: Clock) -> None:
    """As by a coordinator that came back and fetched it again."""
    members.add_result(1, "after 1", {"a": 30.0})
    before = after_a_while(members, clock), members.rounds()
    clock.now += 100.0
    members.add_result(1, "after 1", {"a": 30.0})
    assert (members.samples_by_peer(), members.rounds()) == before


def test_what_stands_in_is_kept_longer_than_the_results(members: Ledger, clock: Clock) -> None:
    members.add_result(1, "after 1", {"a": 30.0})
    after_a_while(members, clock)
    members.add_result(100, "after 100", {"b": 5.0})
    members.add_rounds("b", [report(1, 5), report(100, 5)])
    assert after_a_while(members, clock) == {"a": 30, "b": 10}
    members.add_rounds("a", [report(1, 25)])
    assert after_a_while(members, clock) == {"a": 25, "b": 10}


def test_nobody_is_credited_with_more_than_the_result_has_of_him(members: Ledger) -> None:
    members.add_result(1, "after 1", {"a": 30.0, "b": 10.0})
    for _ in range(2):  # a report repeats its rounds
        members.add_rounds("a", [report(1, 300, mlm=4.0, sop=0.25)])
        members.add_rounds("b", [report(1, 10, mlm=8.0, sop=0.25), report(2, 99)])
        members.add_rounds("c", [report(1, 77)])
        assert members.samples_by_peer() == {"a": 30, "b": 10 + 99, "c": 0}
        assert members.rounds()[0].mlm_loss == pytest.approx(5.0)
    members.add_result(2, "another", {"b": 10.0})  # nothing is known of the one that was reported
    members.add_rounds("b", [report(2, 99)])
    assert members.samples_by_peer()["b"] == 109


@pytest.mark.parametrize("claim_comes_first", [True, False])
@pytest.mark.parametrize(
    ("shares", "reported", "expected"),
    [
        ({"a": 30.0}, {}, {"a": 20, "c": 10}),
        ({"a": 30.0, "b": 50.0}, {"b": 50}, {"a": 20, "b": 50, "c": 10}),
        ({"a": 30.0, "b": 60.0}, {"b": 50}, {"a": 30, "b": 50, "c": 10}),
        ({"a": 30.0, "coordinator": 10.0}, {}, {"a": 30, "c": 10}),
        ({"a": 30.0, "b": 20.0}, {}, {"a": 24, "b": 16, "c": 10}),
        ({"a": 6.0}, {}, {"c": 10}),
    ],
    ids=["to the silent one", "not to the one that reports", "to that", "to the coordinator", "to either", "lost"],
)
def test_what_a_leaver_handed_in_counts_once(
    members: Ledger,
    clock: Clock,
    shares: dict[str, float],
    reported: dict[str, int],
    expected: dict[str, int],
    claim_comes_first: bool,
) -> None:
    """c left, and handed 10 samples in to one that stayed: in the result they are that one's, in reports c's."""
    members.add_result(1, "after 1", shares)
    for peer, samples in reported.items():
        members.add_rounds(peer, [report(1, samples)])
    if claim_comes_first:
        members.add_rounds("c", [handed_in(1, 10)])
        assert after_a_while(members, clock) == expected
    else:
        after_a_while(members, clock)
        members.add_rounds("c", [handed_in(1, 10)])
        assert {peer: samples for peer, samples in members.samples_by_peer().items() if samples} == expected


def test_no_sample_counts_twice_whoever_is_killed_or_leaves(tmp_path: Path, clock: Clock) -> None:
    """Swarms of five, in which what leavers hand in counts up to two rounds later, and reports are late or lost."""
    rng = random.Random(5)
    everybody = [*"abcde", "coordinator"]
    for attempt in range(25):
        ledger = Ledger(tmp_path / f"{attempt}.sqlite")
        for peer in everybody[:-1]:
            ledger.add_member(membership(peer, peer))
        peers = everybody[:-1]
        computed, entries, gifts = 0, [], Counter[tuple[int, str]]()
        for number in range(1, 9):
            if len(peers) > 2 and rng.random() < 0.4:
                gift = handed_in(number, rng.randint(1, 50))
                entries.append((peers.pop(), gift))
                gifts[number + rng.randint(0, 2), rng.choice([*peers, "coordinator"])] += gift.samples
                computed += gift.samples
            own = {peer: rng.choice([0, 20, 30]) for peer in peers}
            computed += sum(own.values())
            entries += [(peer, report(number, samples)) for peer, samples in own.items() if rng.random() < 0.6]
            shares = {peer: float(own.get(peer, 0) + gifts[number, peer]) for peer in everybody}
            ledger.add_result(number, f"after {number}", shares)
        rng.shuffle(entries)
        for peer, entry in entries:
            if rng.random() < 0.2:
                after_a_while(ledger, clock)
            ledger.add_rounds(peer, [entry])
        credited = sum(after_a_while(ledger, clock).values())
        assert 0.6 * computed <= credited <= computed, attempt
        ledger.close()


def test_the_ledger_outlives_the_program(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger.sqlite")
    first.add_member(membership("a", "Asha"))
    first.add_rounds("a", [report(1, 10)])
    first.set_device("a", "CPU")
    first.close()
    second = Ledger(tmp_path / "ledger.sqlite")
    assert second.members() == {"a": "Asha"}
    assert second.samples_by_peer() == {"a": 10}
    assert second.seconds_by_device(1) == {"CPU": 1.0}
    second.close()


def test_two_threads_may_write_while_a_third_reads(ledger: Ledger) -> None:
    failures: list[Exception] = []
    start, done = threading.Barrier(3), threading.Event()

    def write(peer: str) -> None:
        try:
            start.wait(timeout=10)
            for number in range(40):
                ledger.add_rounds(peer, [report(number, 2)])
                ledger.add_rounds("both", [report(number, 1)])
                ledger.add_member(membership("both", peer))
        except Exception as error:  # noqa: BLE001  told to the main thread
            failures.append(error)

    def read() -> None:
        try:
            start.wait(timeout=10)
            while not done.is_set():
                assert all(1 <= entry.samples <= 5 for entry in ledger.rounds())
        except Exception as error:  # noqa: BLE001  told to the main thread
            failures.append(error)

    writers = [threading.Thread(target=write, args=(peer,)) for peer in ("a", "b")]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join(timeout=30)
    done.set()
    reader.join(timeout=30)
    assert failures == []
    assert ledger.samples_by_peer() == {"a": 80, "b": 80, "both": 40}
    assert ledger.members().keys() == {"both"}
