"""Faults as they happen, to real peers in real processes: training goes on, it is said what failed, replicas agree."""

import signal
import time

import pytest
from commands import wait_for
from peers import Start, agree, reach, strike, swarm_of_three

pytestmark = [pytest.mark.swarm, pytest.mark.slow]


def test_a_trainer_that_is_killed_in_mid_averaging(start: Start) -> None:
    averager, asha, rafiq = swarm_of_three(start)
    reach([averager, asha, rafiq], 2)
    strike(rafiq, rafiq.kill)
    before = asha.round
    reach([averager, asha], before + 3)
    agree([averager, asha])


def test_the_averager_that_is_killed_in_mid_averaging(start: Start) -> None:
    averager, asha, rafiq = swarm_of_three(start)
    reach([averager, asha, rafiq], 2)
    strike(asha, averager.kill)
    before = asha.round
    reach([asha, rafiq], before + 3)
    agree([asha, rafiq])


def test_the_coordinator_is_gone_for_several_rounds_and_comes_back_with_an_old_state(start: Start) -> None:
    averager, asha, rafiq = swarm_of_three(start)
    reach([averager, asha, rafiq], 2)
    port = int(averager.last("addresses")[0].split("/")[4])
    averager.kill()
    away = asha.round
    reach([asha, rafiq], away + 3)
    again = start("averager", role="averager", newcomer=False, port=port, bootstrap=[])
    assert again.process.poll() is None
    reach([again], asha.round)
    reach([again, asha, rafiq], asha.round + 2)
    for number, lineage in again.lineages().items():
        assert number == 0 or asha.lineages().get(number, lineage) == lineage


def test_a_trainer_that_stands_still_for_30_seconds_comes_back(start: Start) -> None:
    averager, asha, rafiq = swarm_of_three(start)
    reach([averager, asha, rafiq], 2)
    strike(rafiq, lambda: rafiq.signal(signal.SIGSTOP))
    frozen_at, since = asha.round, time.monotonic()
    wait_for(lambda: time.monotonic() - since > 30, 40, "thirty seconds")
    assert asha.round >= frozen_at + 2, "the others went on"
    rafiq.signal(signal.SIGCONT)
    reach([rafiq], asha.round)
    reach([averager, asha, rafiq], asha.round + 2)
    agree([averager, asha, rafiq])


def test_a_peer_whose_p2pd_is_killed_says_so_and_ends(start: Start) -> None:
    """`kantha join` starts itself again then, see test_walking_swarm.py."""
    averager, asha, rafiq = swarm_of_three(start)
    reach([averager, asha, rafiq], 1)
    daemon = next(member for member in rafiq.family() if member.name() == "p2pd")
    daemon.kill()
    wait_for(lambda: rafiq.process.poll() is not None, 30, "it ends")
    assert rafiq.last("error") == "ProcessEndedError"
    before = asha.round
    reach([averager, asha], before + 2)
    agree([averager, asha])


@pytest.mark.parametrize("kind", ["truncated", "nan"])
def test_a_peer_that_sends_damaged_parts_is_named_and_left_out(start: Start, kind: str) -> None:
    averager, asha, rafiq = swarm_of_three(start)
    reach([averager, asha, rafiq], 1)
    bad = start("bad", misbehave=kind)
    wait_for(lambda: bad.last("averaging") is not None, 90, "the bad peer takes part")
    before = asha.round
    reach([averager, asha, rafiq], before + 3, 180)
    word = "not finite" if kind == "nan" else "bytes where"
    assert any(word in peer.log() for peer in (averager, asha, rafiq))
    agree([averager, asha, rafiq])
