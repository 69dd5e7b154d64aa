import pytest

from kantha.swarm.groups import Member
from kantha.swarm.rounds import (
    ATTEMPTS,
    BACKOFF,
    FORK,
    LEAVE,
    LOST,
    REPAIR,
    SUSPECT,
    UPDATES_KEPT,
    Action,
    Apply,
    Attempt,
    Drop,
    End,
    Failed,
    FetchSnapshot,
    FetchUpdates,
    HandIn,
    Left,
    Lost,
    PeerView,
    Phase,
    Push,
    Rounds,
    RoundSettings,
    Thaw,
    next_lineage,
)

SETTINGS = RoundSettings(target=100, patience=5.0, averaging_timeout=30.0)


def view(
    number: int = 4,
    lineage: str = "x",
    *,
    role: str = "trainer",
    dialable: bool = True,
    ready: bool = True,
    samples: int = 0,
    rate: float = 0.0,
    sketch: tuple[float, ...] = (),
) -> PeerView:
    return PeerView(role, dialable, ready, number, lineage, samples, rate, 0.0, sketch)


def peer(number: int | None = 4, *, dialable: bool = True, trains: bool = True, **others: PeerView) -> Rounds:
    """A peer at round 4 that has seen some others."""
    rounds = Rounds(Member("me", dialable), SETTINGS, 0.0, trains=trains, round_number=number, lineage="x")
    rounds.seen(0.0, others)
    return rounds


def only(actions: list[Action]) -> Action:
    assert len(actions) == 1, actions
    return actions[0]


def averaging(**others: PeerView) -> Rounds:
    """A peer in an attempt with its 60 samples frozen."""
    rounds = peer(**(others or {"a": view(samples=60)}))
    rounds.computed(60, 1.0)
    assert isinstance(only(rounds.poll(0.0)), Attempt)
    assert rounds.frozen()
    return rounds


def test_peers_average_when_all_together_are_near_the_target() -> None:
    rounds = peer(a=view(samples=40, rate=5.0))
    rounds.computed(39, 5.0)
    assert rounds.poll(0.0) == []  # 79 of 100, 10 a second: more than two seconds
    rounds.computed(2, 5.0)
    attempt = only(rounds.poll(0.0))
    assert isinstance(attempt, Attempt)
    assert (attempt.round, attempt.lineage, attempt.here) == (5, "x", frozenset({"a", "me"}))
    assert attempt.not_before == pytest.approx(1.9)
    assert rounds.phase is Phase.AVERAGING


def test_samples_of_another_round_do_not_count_towards_this_one() -> None:
    rounds = peer(a=view(3, samples=1000))
    rounds.computed(10, 1.0)
    assert rounds.poll(0.0) == []


def test_averagers_lead_then_trainers_in_an_order_that_all_share() -> None:
    first = peer(a=view(samples=200), b=view(role="averager"), c=view(dialable=False))
    attempt = only(first.poll(0.0))
    assert isinstance(attempt, Attempt)
    assert attempt.leaders[0] == "b"
    assert "c" not in attempt.leaders


def test_a_peer_that_is_called_comes_though_it_sees_no_progress() -> None:
    rounds = peer(a=view())
    assert rounds.poll(0.0) == []
    rounds.called()
    assert isinstance(only(rounds.poll(0.0)), Attempt)


def test_nobody_meets_without_a_peer_that_can_be_dialled() -> None:
    rounds = peer(dialable=False, a=view(dialable=False))
    rounds.computed(1000, 1.0)
    assert rounds.poll(0.0) == []


def test_a_counted_result_is_applied_and_what_came_meanwhile_waits_for_the_next() -> None:
    rounds = averaging()
    rounds.computed(7, 1.0)
    rounds.attempt_ended(1.0, End.COMMITTED)
    assert only(rounds.poll(1.0)) == Apply(5)
    rounds.applied(2.0, 5, "y", contributed=True)
    assert (rounds.round, rounds.lineage, rounds.samples, rounds.frozen_samples) == (5, "y", 7, 0)
    assert rounds.phase is Phase.COMPUTING


def test_a_failed_attempt_is_tried_again_with_the_same_samples_and_no_others() -> None:
    rounds = averaging()
    rounds.computed(7, 1.0)
    rounds.attempt_ended(1.0, End.BROKEN, ["a"], "why")
    again = only(rounds.poll(1.0))
    assert isinstance(again, Attempt)
    assert again.round == 5
    assert again.suspects == {"a"}
    assert not rounds.frozen()
    assert (rounds.frozen_samples, rounds.samples) == (60, 7)


def test_after_some_failures_the_round_is_counted_as_failed_and_put_off() -> None:
    rounds = averaging()
    for _ in range(ATTEMPTS - 1):
        rounds.attempt_ended(1.0, End.BROKEN)
        assert isinstance(only(rounds.poll(1.0)), Attempt)
    rounds.attempt_ended(1.0, End.BROKEN, reason="why")
    assert rounds.poll(1.0) == [Failed(5, "why")]
    assert rounds.poll(1.0 + BACKOFF - 0.1) == []
    assert isinstance(only(rounds.poll(1.0 + BACKOFF)), Attempt)


def test_who_breaks_attempts_again_and_again_is_left_out_for_longer() -> None:
    rounds = averaging()
    rounds.attempt_ended(0.0, End.BROKEN, ["a"])
    rounds.poll(0.0)
    rounds.attempt_ended(0.0, End.BROKEN, ["a"])
    rounds.seen(SUSPECT + 1, {"a": view(samples=60)})
    attempt = only(rounds.poll(SUSPECT + 1))
    assert isinstance(attempt, Attempt)
    assert attempt.suspects == {"a"}


def test_a_peer_that_missed_a_round_fetches_its_result() -> None:
    rounds = peer(a=view(6), b=view(6, dialable=False))
    assert only(rounds.poll(0.0)) == FetchUpdates(5, 6, ("a",))
    assert rounds.phase is Phase.CATCHING_UP
    assert rounds.poll(1.0) == []
    for number in (5, 6):
        rounds.applied(2.0, number, f"after {number}", contributed=False)
    rounds.fetched(3.0, 6, "after 6", snapshot=False)
    rounds.seen(3.0, {"a": view(6, "after 6")})
    assert rounds.poll(3.0) == []
    assert rounds.phase is Phase.COMPUTING


def test_samples_that_were_in_a_missed_round_are_gone_and_others_wait_again() -> None:
    counted, not_counted = averaging(), averaging()
    for rounds in (counted, not_counted):
        rounds.attempt_ended(1.0, End.BEHIND)
    counted.applied(2.0, 5, "y", contributed=True)
    assert (counted.samples, counted.frozen_samples) == (0, 0)
    not_counted.applied(2.0, 5, "y", contributed=False)
    assert (not_counted.samples, not_counted.frozen_samples) == (60, 0)
    assert Thaw() in not_counted.poll(2.0)


def test_a_peer_that_missed_too_much_or_cannot_have_the_results_loads_the_state() -> None:
    far = peer(a=view(4 + UPDATES_KEPT + 1))
    assert only(far.poll(0.0)) == FetchSnapshot(4 + UPDATES_KEPT + 1, ("a",))
    near = peer(a=view(5))
    near.poll(0.0)
    near.fetched(1.0, None, snapshot=False)
    assert only(near.poll(1.0)) == FetchSnapshot(5, ("a",))


def test_samples_whose_fate_a_loaded_state_does_not_tell_are_dropped() -> None:
    rounds = averaging(a=view(samples=60))
    rounds.attempt_ended(1.0, End.BROKEN)
    rounds.seen(1.0, {"a": view(4 + UPDATES_KEPT + 1)})
    assert isinstance(only(rounds.poll(1.0)), FetchSnapshot)
    rounds.fetched(2.0, 4 + UPDATES_KEPT + 1, "y", snapshot=True)
    assert Drop() in rounds.poll(2.0)
    assert (rounds.samples, rounds.frozen_samples) == (0, 0)


def test_a_newcomer_loads_the_state_and_computes_from_when_it_has_the_weights() -> None:
    rounds = peer(None, a=view(6), b=view(6))
    fetch = only(rounds.poll(0.0))
    assert isinstance(fetch, FetchSnapshot)
    assert set(fetch.sources) == {"a", "b"}
    rounds.weights_here(6, "x")
    rounds.computed(5, 1.0)
    assert rounds.phase is Phase.LOADING
    rounds.fetched(9.0, 6, "x", snapshot=True)
    assert rounds.ready
    assert (rounds.round, rounds.samples, rounds.phase) == (6, 5, Phase.COMPUTING)


def test_a_newcomer_that_nobody_gives_the_state_gives_up_and_says_so() -> None:
    rounds = peer(None)
    assert rounds.poll(LOST - 1) == []
    assert isinstance(only(rounds.poll(LOST + 1)), Lost)


def test_the_lineage_that_more_peers_have_wins_after_a_while() -> None:
    rounds = peer()
    others = {"a": view(lineage="y"), "b": view(lineage="y")}
    rounds.seen(0.0, others)
    assert rounds.poll(0.0) == []
    rounds.seen(FORK, others)
    assert isinstance(only(rounds.poll(FORK)), FetchSnapshot)


def test_a_replica_that_drifted_is_repaired_and_the_others_are_not() -> None:
    good, bad = (1.0, 2.0, 3.0), (1.0, 2.0, 3.1)
    drifted, sound = peer(), peer()
    drifted.sketch, sound.sketch = bad, good
    others = {"a": view(sketch=good), "b": view(sketch=good)}
    drifted.seen(1.0, others)
    assert isinstance(only(drifted.poll(1.0)), FetchSnapshot)
    sound.seen(1.0, {"a": view(sketch=bad), "b": view(sketch=good)})
    assert sound.poll(1.0) == []


def test_where_rounds_are_short_replicas_are_compared_while_they_average() -> None:
    good, bad = (1.0, 2.0, 3.0), (1.0, 2.0, 3.1)
    drifted = averaging(a=view(samples=60), b=view())
    drifted.sketch = bad
    drifted.seen(1.0, {"a": view(sketch=good), "b": view(sketch=good)})
    drifted.attempt_ended(2.0, End.COMMITTED)
    assert only(drifted.poll(2.0)) == Apply(5)
    drifted.applied(3.0, 5, "y", contributed=True)
    drifted.computed(200, 1.0)
    assert drifted.poll(3.0) == []  # not another averaging: the others have not yet said that they are as far
    drifted.seen(4.0, {"a": view(5, "y"), "b": view()})
    assert only(drifted.poll(4.0)) == FetchSnapshot(5, ("a",))

    nobody = averaging(a=view(samples=60), b=view())
    nobody.sketch = bad
    nobody.seen(1.0, {"a": view(sketch=good), "b": view(sketch=good)})
    nobody.attempt_ended(2.0, End.BROKEN)
    nobody.seen(3.0, {})
    nobody.computed(200, 1.0)
    assert nobody.poll(3.0) == []
    nobody.seen(1.0 + REPAIR, {})
    assert isinstance(only(nobody.poll(1.0 + REPAIR)), Attempt)  # it does not wait for ever


def test_who_still_loads_does_not_bring_the_target_nearer() -> None:
    rounds = peer(trains=False, a=view(samples=500, ready=False))
    assert rounds.poll(0.0) == []  # a group of this averager alone would have nothing to average


def test_one_that_cannot_be_dialled_sends_the_state_to_an_averager_that_cannot_fetch_it() -> None:
    rounds = peer(dialable=False)
    behind = {"a": view(2, role="averager")}
    for now in (0.0, 4.0, 8.0, 12.0):
        rounds.seen(now, behind)
    assert only(rounds.poll(12.0)) == Push("a")
    reachable = peer()
    for now in (0.0, 4.0, 8.0, 12.0):
        reachable.seen(now, behind)
    assert reachable.poll(12.0) == []


def test_a_leaver_hands_in_what_waits_and_is_gone() -> None:
    rounds = peer(a=view(role="averager"))
    rounds.computed(9, 1.0)
    rounds.leave(1.0)
    assert only(rounds.poll(1.0)) == HandIn("a")
    rounds.handed_in(2.0, 9)
    assert only(rounds.poll(2.0)) == Left()
    assert rounds.phase is Phase.LEFT
    assert rounds.poll(3.0) == []


def test_a_leaver_finishes_the_averaging_under_way_and_never_waits_for_ever() -> None:
    rounds = averaging()
    rounds.leave(1.0)
    assert rounds.poll(2.0) == []
    rounds.attempt_ended(3.0, End.COMMITTED)
    assert only(rounds.poll(3.0)) == Apply(5)
    rounds.applied(4.0, 5, "y", contributed=True)
    assert only(rounds.poll(4.0)) == Left()

    stuck = peer(a=view(role="averager"))
    stuck.computed(9, 1.0)
    stuck.leave(1.0)
    assert only(stuck.poll(1.0)) == HandIn("a")
    assert only(stuck.poll(1.0 + LEAVE)) == Left()


def test_equal_results_in_equal_order_make_equal_lineages() -> None:
    assert next_lineage("a", "d") == next_lineage("a", "d")
    assert len({next_lineage("a", "d"), next_lineage("b", "d"), next_lineage("a", "e")}) == 3
