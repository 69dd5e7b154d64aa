from collections.abc import Callable
from pathlib import Path

import pytest

from kantha.coordinator.rundir import RunDirectory
from kantha.spec import ScheduleState
from kantha.swarm.orders import Order
from kantha.training import Replica

Kantha = Callable[..., tuple[int, str, str]]


def at(run_path: Path, state: ScheduleState) -> RunDirectory:
    """A run whose newest checkpoint is at this place of its schedule."""
    run = RunDirectory.open(run_path)
    run.save_checkpoint(Replica(run.spec), 5, "after 5", state)
    return run


def order_of(run: RunDirectory) -> Order:
    text = run.read_order()
    assert text is not None
    return Order.model_validate_json(text)


def test_annealing_is_ordered_once_and_can_be_taken_back(run_path: Path, kantha: Kantha) -> None:
    run = at(run_path, ScheduleState(samples=6_400))
    code, said, _ = kantha("anneal", run_path, "--samples", 640)
    assert code == 0
    assert "640 samples, about 10 rounds" in said
    assert "next round" in said
    first = order_of(run)
    assert first.anneal_samples == 640

    code, _, error = kantha("anneal", run_path)
    assert code == 29
    assert "--cancel" in error
    assert order_of(run) == first

    code, said, _ = kantha("anneal", run_path, "--cancel")
    assert code == 0
    assert "full learning rate" in said
    assert order_of(run).anneal_samples == 0
    assert order_of(run).number > first.number
    code, _, error = kantha("anneal", run_path, "--cancel")
    assert code == 29
    assert "nothing to cancel" in error


def test_by_default_a_fifth_of_the_whole_is_annealed(run_path: Path, kantha: Kantha) -> None:
    run = at(run_path, ScheduleState(samples=6_400))
    assert kantha("anneal", run_path)[0] == 0
    assert order_of(run).anneal_samples == 1_600


@pytest.mark.parametrize(
    ("state", "why"),
    [(ScheduleState(), "nothing to anneal"), (ScheduleState(samples=90).obey(1, 10).advance(10), "to its end")],
)
def test_a_run_before_its_first_round_or_after_its_end_is_not_annealed(
    run_path: Path, kantha: Kantha, state: ScheduleState, why: str
) -> None:
    run = at(run_path, state)
    code, _, error = kantha("anneal", run_path, "--samples", 64)
    assert code == 29
    assert why in error
    assert run.read_order() is None


def test_an_order_counts_though_the_clock_went_back(
    run_path: Path, kantha: Kantha, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = at(run_path, ScheduleState(samples=6_400))
    assert kantha("anneal", run_path)[0] == 0
    first = order_of(run)
    monkeypatch.setattr("time.time_ns", lambda: 10**15)
    assert kantha("anneal", run_path, "--cancel")[0] == 0
    assert order_of(run).number > first.number


def test_a_damaged_order_is_given_anew(run_path: Path, kantha: Kantha) -> None:
    run = at(run_path, ScheduleState(samples=6_400))
    run.order.write_text("{")
    assert kantha("anneal", run_path, "--samples", 64)[0] == 0
    assert order_of(run).anneal_samples == 64
