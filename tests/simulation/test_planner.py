import pytest
from typer.testing import CliRunner

from kantha.cli.main import app
from kantha.errors import SpecError
from kantha.model import build_model
from kantha.simulation import planner
from kantha.simulation.planner import Plan, Population, Volunteers, count_values, find_limit, simulate
from kantha.spec import PRESETS, RunSpec


@pytest.mark.parametrize("preset", ["demo", "albert-base"])
def test_the_values_are_those_of_the_built_model(preset: str) -> None:
    spec = PRESETS[preset]
    assert count_values(spec) == sum(parameter.numel() for parameter in build_model(spec).parameters())


def test_a_population_is_given_in_a_word() -> None:
    assert Volunteers.parse("20x8@50") == Volunteers(20, 8.0, 50.0)
    assert Volunteers.parse("1x0.5@1.5") == Volunteers(1, 0.5, 1.5)


@pytest.mark.parametrize("text", ["", "20", "20x8", "x8@50", "0x8@50", "20x0@50", "20x8@0", "-1x8@50", "20x8@50 "])
def test_what_is_no_population_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SpecError, match="20x8@50"):
        Volunteers.parse(text)


def plan(spec: RunSpec, *volunteers: str, mbit: float = 1000.0, seed: int = 0) -> Plan:
    population = Population([Volunteers.parse(text) for text in volunteers], 4.0, 0.0, mbit)
    return simulate(spec, population, 0.1, seed, lambda done: None)


def with_target(target: int) -> RunSpec:
    spec = PRESETS["albert-base"]
    return spec.model_copy(update={"swarm": spec.swarm.model_copy(update={"target_batch_size": target})})


def test_good_links_lose_little_and_bad_ones_much() -> None:
    good, bad = plan(with_target(1024), "4x8@1000"), plan(with_target(1024), "4x8@2")
    assert good.share_of_ideal > 0.85
    assert bad.share_of_ideal < good.share_of_ideal - 0.2
    assert good.failed == 0


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    assert plan(with_target(512), "4x8@50") == plan(with_target(512), "4x8@50")
    assert plan(with_target(512), "4x8@50") != plan(with_target(512), "4x8@50", seed=1)


def test_a_population_grows_until_a_round_no_longer_finishes_in_time() -> None:
    population = Population([Volunteers(4, 64.0, 4.0)], 4.0, 0.5, 100.0)
    plans, broke = find_limit(with_target(2048), population, 0, lambda size, done: None)
    assert broke
    assert plans[-1].share_of_ideal < 0.5


def test_the_command_shows_a_table_and_says_what_the_run_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_MOST_PEERS", 8)
    result = CliRunner().invoke(app, ["simulate", "demo", "--group", "4x8@100", "--hours", "0.05"])
    assert result.exit_code == 0, result.output
    assert "MB/h" in result.output
    assert "It bears 8 volunteers" in result.output
