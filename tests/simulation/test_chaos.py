"""The invariants hold under faults, and a rule that is broken on purpose is found out."""

import pytest

from kantha.simulation.chaos import Chaos, Violation, timeline
from kantha.simulation.peers import Rules
from kantha.swarm.groups import Agreement, Status
from kantha.swarm.rounds import Rounds

MOST_SEEDS = 300


class _CountsAlone(Agreement):
    """A result counts although nobody else holds it."""

    def hold(self, now: float) -> None:
        super().hold(now)
        if self.status is Status.HELD:
            self.status = Status.COMMITTED


class _CountsTwice(Rounds):
    """Samples that are in a round's result wait for the next one again."""

    def applied(self, now: float, round_number: int, lineage: str, *, contributed: bool) -> None:
        super().applied(now, round_number, lineage, contributed=False)


class _NeverCatchesUp(Rounds):
    """A peer that missed a round does not fetch it."""

    def _newest(self) -> int:
        return self.round if self.ready else super()._newest()


def first_violation(rules: Rules) -> tuple[int, str] | None:
    for seed in range(MOST_SEEDS):
        try:
            Chaos(seed, rules).run()
        except Violation as violation:
            return seed, str(violation)
    return None


@pytest.mark.parametrize("seed", range(25))
def test_the_rules_hold(seed: int) -> None:
    Chaos(seed, Rules()).run()


@pytest.mark.parametrize(
    ("rules", "invariants"),
    [
        pytest.param(Rules(agreement=_CountsAlone), "(d)", id="a result counts without a second holder"),
        pytest.param(Rules(rounds=_CountsTwice), "(b)", id="samples are counted twice"),
        pytest.param(Rules(rounds=_NeverCatchesUp), "(a)(c)(d)", id="nobody catches up"),
    ],
)
def test_a_broken_rule_is_found_out_with_a_timeline(rules: Rules, invariants: str) -> None:
    found = first_violation(rules)
    assert found is not None
    seed, text = found
    assert text[:3] in invariants
    assert any(text[:3] in line for line in timeline(seed, rules))


def test_a_seed_is_the_same_every_time() -> None:
    assert timeline(3) == timeline(3)
