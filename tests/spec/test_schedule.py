import pytest

from kantha.spec import RunSpec, Schedule, ScheduleSpec, ScheduleState, SwarmSpec


def schedule(spec: RunSpec, **values: int) -> Schedule:
    return Schedule(
        spec.model_copy(
            update={
                "schedule": ScheduleSpec(**{"warmup_samples": 0, **values}),
                "swarm": SwarmSpec(target_batch_size=100),
                "optimizer": spec.optimizer.model_copy(update={"learning_rate": 1.0}),
            }
        )
    )


def rates(rules: Schedule, state: ScheduleState, rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        found.append(rules.rate(state))
        state = state.advance(rules.target(state))
    return found


def test_the_rate_rises_to_its_peak_and_stays(tiny_spec: RunSpec) -> None:
    found = rates(schedule(tiny_spec, warmup_samples=400), ScheduleState(), 8)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])  # the first round is not lost


def test_without_warm_up_the_first_round_has_the_peak(tiny_spec: RunSpec) -> None:
    assert rates(schedule(tiny_spec), ScheduleState(), 2) == [1.0, 1.0]


def test_annealing_falls_as_one_minus_a_root_from_where_it_was_ordered(tiny_spec: RunSpec) -> None:
    rules = schedule(tiny_spec)
    state = ScheduleState(samples=1_000).obey(1, 400)
    assert rates(rules, state, 6) == pytest.approx([1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0, 0])
    assert [state.advance(done).annealed for done in (0, 100, 400, 500)] == [0, 0.25, 1, 1]
    assert [state.advance(done).is_finished for done in (0, 399, 400)] == [False, False, True]


def test_annealing_that_is_ordered_during_the_warm_up_begins_where_the_rate_is(tiny_spec: RunSpec) -> None:
    rules = schedule(tiny_spec, warmup_samples=1_000)
    state = ScheduleState(samples=100).obey(1, 400)
    assert rates(rules, state, 4) == pytest.approx([0.2, 0.3 * 0.5, 0.4 * (1 - 0.5**0.5), 0.5 * (1 - 0.75**0.5)])


def test_an_order_is_followed_once_and_can_be_taken_back(tiny_spec: RunSpec) -> None:
    stable = ScheduleState(samples=1_000)
    annealing = stable.obey(5, 400)
    assert annealing.advance(100).obey(5, 400) == annealing.advance(100)  # it comes with every result from then on
    assert annealing.advance(100).obey(4, 9_000) == annealing.advance(100)  # an older one
    back = annealing.advance(100).obey(6, 0)
    assert back.annealed is None
    assert schedule(tiny_spec).rate(back) == 1.0
    assert back.obey(5, 400) == back
    again = back.obey(7, 200)
    assert (again.anneal_from, again.anneal_samples) == (1_100, 200)


def test_after_the_end_no_order_is_followed() -> None:
    finished = ScheduleState(samples=1_000).obey(5, 400).advance(400)
    assert finished.obey(6, 0) == finished


def test_rounds_grow_to_their_full_size(tiny_spec: RunSpec) -> None:
    rules = schedule(tiny_spec, ramp_samples=300, first_batch_size=40)
    sizes = [rules.target(ScheduleState(samples=samples)) for samples in (0, 40, 150, 299, 300, 10**9)]
    assert sizes == [40, 48, 70, 99, 100, 100]
    assert schedule(tiny_spec).target(ScheduleState()) == 100


def test_rounds_cannot_grow_from_more_than_their_full_size(tiny_spec: RunSpec) -> None:
    values = tiny_spec.model_dump()
    values["schedule"] = {"ramp_samples": 300, "first_batch_size": 65}
    with pytest.raises(ValueError, match=r"first_batch_size 65 is larger than swarm\.target_batch_size 64"):
        RunSpec.model_validate(values)
