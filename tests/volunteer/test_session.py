from types import SimpleNamespace
from typing import Any

import pytest

from kantha.spec import ScheduleState
from kantha.swarm.reports import LEFT, ROUNDS_KEPT, Report
from kantha.swarm.rounds import Phase
from kantha.swarm.rounds_engine import RoundResult
from kantha.training import Gradients
from kantha.volunteer.session import Session


def gradients(samples: int, mlm: float = 5.0, sop: float = 0.5) -> Gradients:
    return Gradients([], samples, mlm, sop, tokens=30 * samples, flops=1e9 * samples)


def result(number: int, samples: int, peers: int = 2, lost: int = 0) -> RoundResult:
    return RoundResult(round=number, lineage=f"after {number}", samples=samples, peers=peers, lost=lost)


def report(**changes: Any) -> Report:
    values = {
        "time": 1.0,
        "role": "trainer",
        "state": "computing",
        "dialable": True,
        "ready": True,
        "round": 7,
        "lineage": "x",
        "sketch": [],
        "samples": 0,
        "samples_per_second": 1.0,
        "device": "",
        "version": "1",
        "certificate": "{}",
        "rounds": [],
        "failed": [],
    }
    return Report(**{**values, **changes})


@pytest.fixture
def engine() -> SimpleNamespace:
    """What a session asks of its engine."""
    return SimpleNamespace(
        round=7, phase=Phase.COMPUTING, target=100, progress=lambda: (40.0, 3.0), schedule_state=ScheduleState()
    )


@pytest.fixture
def session(engine: SimpleNamespace) -> Session:
    return Session("CPU", engine)  # type: ignore[arg-type]


def test_a_round_counts_its_samples_and_their_mean_losses(session: Session) -> None:
    session.computed(gradients(8, mlm=6.0, sop=0.2), seconds=1.5, waited=0.1)
    session.computed(gradients(2, mlm=1.0, sop=0.7), seconds=0.5, waited=0.4)
    assert (session.samples, session.counted, session.loss) == (10, 0, None)
    session.ended(result(8, 10, peers=3))
    assert (session.samples, session.counted) == (0, 10)
    assert session.loss == pytest.approx((8 * 6.2 + 2 * 1.7) / 10)
    [reported] = session.complete(report()).rounds
    assert (reported.round, reported.lineage, reported.samples, reported.peers) == (8, "after 8", 10, 3)
    assert reported.seconds == pytest.approx(2.0)
    assert reported.waited == pytest.approx(0.5)
    assert reported.mlm_loss_sum == pytest.approx(50.0)
    assert reported.sop_loss_sum == pytest.approx(3.0)


def test_what_is_computed_while_a_round_is_averaged_counts_in_the_next(session: Session) -> None:
    session.computed(gradients(4, mlm=6.0, sop=0.0), 1.0, 0.0)
    session.computed(gradients(4, mlm=2.0, sop=0.0), 1.0, 0.0)
    session.ended(result(8, 4))
    assert (session.samples, session.counted, session.loss) == (4, 4, pytest.approx(6.0))
    session.ended(result(9, 4))
    assert (session.samples, session.counted, session.loss) == (0, 8, pytest.approx(2.0))


def test_lost_samples_never_count(session: Session) -> None:
    for mlm in (9.0, 3.0):
        session.computed(gradients(4, mlm=mlm, sop=0.0), 1.0, 0.0)
    session.ended(result(12, 4, lost=4))
    assert (session.samples, session.counted, session.loss) == (0, 4, pytest.approx(3.0))


def test_a_round_without_ones_own_samples_changes_no_loss(session: Session) -> None:
    session.computed(gradients(4, mlm=3.0, sop=0.0), 1.0, 0.0)
    session.ended(result(8, 4))
    session.ended(result(9, 0))
    assert session.loss == pytest.approx(3.0)
    assert [r.samples for r in session.complete(report()).rounds] == [4, 0]


def test_a_report_carries_the_last_rounds_only(session: Session) -> None:
    for number in range(ROUNDS_KEPT + 5):
        session.ended(result(number + 1, 0))
    rounds = session.complete(report()).rounds
    assert [r.round for r in rounds] == list(range(6, ROUNDS_KEPT + 6))


def test_the_computing_share_is_what_was_not_waited(session: Session) -> None:
    assert session.computing_share is None
    session.computed(gradients(4), seconds=9.0, waited=1.0)
    assert session.computing_share == pytest.approx(0.9)


def test_speeds_are_told_in_samples_and_tokens_and_on_a_known_gpu_as_a_share_of_its_peak(
    engine: SimpleNamespace,
) -> None:
    engine.samples_per_second = 4.0
    for peak, share in ((None, ""), (10e9, ", 30% of the device's peak")):
        session = Session("GPU", engine, peak)  # type: ignore[arg-type]
        assert session.pace == ""
        session.computed(gradients(20), seconds=5.0, waited=1.0)
        session.computed(gradients(10), seconds=4.0, waited=0.0)
        assert session.pace == f", 3.0 samples/s, 90 tokens/s{share}, computing 90% of the time"
        assert session.tokens_per_second == pytest.approx(4.0 * 30)
        assert session.utilisation == (pytest.approx(0.4) if peak else None)


@pytest.mark.parametrize(
    ("phase", "state"),
    [
        (Phase.LOADING, "loading"),
        (Phase.COMPUTING, "training"),
        (Phase.AVERAGING, "training"),
        (Phase.CATCHING_UP, "catching up"),
    ],
)
def test_people_read_what_the_peer_does(engine: SimpleNamespace, session: Session, phase: Phase, state: str) -> None:
    engine.phase = phase
    assert session.complete(report()).state == state
    assert session.next_event()


def test_a_goodbye_stays_one(session: Session) -> None:
    assert session.complete(report(state=LEFT)).state == LEFT


def test_the_next_event_is_told_in_a_sentence(engine: SimpleNamespace, session: Session) -> None:
    assert session.next_event() == "round 8 ends in about 20 s"
    engine.schedule_state = ScheduleState(samples=150, order=1, anneal_from=100, anneal_samples=200)
    assert session.next_event() == "round 8 ends in about 20 s; annealing, 25% done"
    engine.schedule_state = ScheduleState()
    engine.progress = lambda: (99.0, 3.0)
    assert session.next_event() == "round 8 is about to end"
    engine.progress = lambda: (0.0, 0.0)
    assert session.next_event() == "waiting for the swarm's first samples"
