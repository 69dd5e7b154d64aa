import time
from types import SimpleNamespace

import pytest

from kantha.swarm.engine import Progress, RoundResult
from kantha.swarm.reports import LEFT, ROUNDS_KEPT, Report
from kantha.training import Gradients
from kantha.volunteer import session as session_module
from kantha.volunteer.session import Session


def gradients(samples: int, mlm: float = 5.0, sop: float = 0.5) -> Gradients:
    return Gradients([], samples, mlm, sop)


def result(number: int, samples: int = 0, peers: int = 2, whole: bool = True) -> RoundResult:
    return RoundResult(round=number, samples=samples, peers=peers, whole=whole)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 500.0
        monkeypatch.setattr(session_module, "time", SimpleNamespace(monotonic=lambda: self.now, time=time.time))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def session(clock: Clock) -> Session:
    return Session("CPU", 7)


def test_a_round_counts_its_samples_and_their_mean_losses(session: Session) -> None:
    session.computed(gradients(8, mlm=6.0, sop=0.2), 1.5)
    session.handed_over(None, 7)
    session.computed(gradients(2, mlm=1.0, sop=0.7), 0.5)
    assert (session.samples, session.counted, session.loss) == (10, 0, None)
    session.handed_over(result(8, 10, peers=3), 8)
    assert (session.round, session.samples, session.counted) == (8, 0, 10)
    assert session.loss == pytest.approx((8 * 6.2 + 2 * 1.7) / 10)
    [reported] = session.report().rounds
    assert (reported.round, reported.samples, reported.peers, reported.whole) == (8, 10, 3, True)
    assert reported.seconds == pytest.approx(2.0)
    assert reported.mlm_loss_sum == pytest.approx(50.0)
    assert reported.sop_loss_sum == pytest.approx(3.0)


def test_a_round_starts_from_nothing(session: Session) -> None:
    for number, mlm in ((8, 6.0), (9, 4.0)):
        session.computed(gradients(4, mlm=mlm, sop=0.0), 1.0)
        session.handed_over(result(number, 4), number)
    assert session.loss == pytest.approx(4.0)
    assert session.counted == 8
    assert [(r.round, r.samples, r.seconds) for r in session.report().rounds] == [(8, 4, 1.0), (9, 4, 1.0)]


def test_a_round_that_failed_is_reported_as_such(session: Session) -> None:
    session.computed(gradients(4), 1.0)
    session.handed_over(result(8, 4, peers=1, whole=False), 8)
    assert [r.whole for r in session.report().rounds] == [False]
    assert session.last_round is not None
    assert not session.last_round.whole


def test_a_jump_without_a_result_loses_what_was_computed_for_the_old_round(session: Session) -> None:
    """The peer had to fetch the swarm's state: its samples are in nobody's average, so they must not count."""
    session.computed(gradients(4), 1.0)
    session.handed_over(None, 12)
    assert (session.round, session.samples, session.counted) == (12, 0, 0)
    assert session.report().rounds == []
    session.computed(gradients(2, mlm=3.0, sop=0.0), 1.0)
    session.handed_over(result(13, 2), 13)
    [reported] = session.report().rounds
    assert (reported.round, reported.samples, reported.mlm_loss_sum) == (13, 2, pytest.approx(6.0))


def test_only_so_many_rounds_are_kept_as_a_report_may_carry(session: Session) -> None:
    for number in range(8, 8 + ROUNDS_KEPT + 5):
        session.computed(gradients(2), 0.1)
        session.handed_over(result(number, 2), number)
    report = session.report()
    assert [r.round for r in report.rounds] == list(range(13, 13 + ROUNDS_KEPT))
    assert session.counted == 2 * (ROUNDS_KEPT + 5)
    Report.parse_obj(report.dict())


def test_a_report_says_how_things_are(session: Session, clock: Clock) -> None:
    session.computed(gradients(4), 1.0)
    session.handed_over(None, 7)
    first = session.report()
    assert (first.role, first.state, first.round, first.samples, first.device) == ("trainer", "training", 7, 4, "CPU")
    assert first.time == pytest.approx(time.time(), abs=60)
    session.leave()
    assert session.report().state == LEFT


def test_two_reports_differ_even_if_nothing_happened(session: Session) -> None:
    assert session.report().time < session.report().time  # by this, the others know that the peer is here


def test_a_long_hand_over_is_an_averaging(session: Session, clock: Clock) -> None:
    progress = Progress(samples=3, target=10, peers=2, seconds_left=12.0)
    session.computed(gradients(4), 1.0)
    clock.now += 0.1
    assert session.state == "training"
    clock.now += 1.0
    assert session.state == "averaging"
    assert "averaging round 8" in session.next_event(progress)
    session.handed_over(result(8, 4), 8)
    assert session.state == "training"
    assert "round 9 ends in about 12 s" in session.next_event(progress)


def test_speed_is_measured_over_the_last_minute(session: Session, clock: Clock) -> None:
    assert session.speed == 0.0
    session.computed(gradients(100), 1.0)
    assert session.speed == 0.0  # one batch has no interval
    for _ in range(20):
        clock.now += 2.0
        session.computed(gradients(8), 1.0)
    assert session.speed == pytest.approx(4.0)
    for _ in range(60):
        clock.now += 2.0
        session.computed(gradients(2), 1.0)
    assert session.speed == pytest.approx(1.0)
