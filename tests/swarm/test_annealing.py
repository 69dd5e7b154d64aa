"""The organizer's order to anneal, followed by real peers in real processes: all in the same round, newcomers too."""

from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from peer import RUN
from peers import Peer, Start, agree, reach

from kantha.swarm.membership import RunKey
from kantha.swarm.orders import Order

pytestmark = [pytest.mark.swarm, pytest.mark.slow]


@pytest.fixture
def key(start: Start, tmp_path: Path) -> RunKey:
    return RunKey.load(tmp_path / "run.pem")


def give(folder: Path, peer: Peer, order: Order) -> None:
    partial = folder / f".{peer.name}.order"
    partial.write_text(order.model_dump_json())
    partial.rename(folder / f"{peer.name}.order")


def schedules(peer: Peer) -> dict[int, dict[str, Any]]:
    """What it had counted and followed, by round."""
    return {event["round"]: event["schedule"] for event in peer.said() if "round" in event}


def test_all_follow_an_order_in_the_same_round_whoever_heard_it(start: Start, key: RunKey, tmp_path: Path) -> None:
    growing = {"ramp_samples": 300, "first_batch_size": 16}
    options = {"values": 200_000, "schedule": growing}
    averager = start("averager", role="averager", **options)
    asha, rafiq = start("asha", **options), start("rafiq", **options)
    reach([averager, asha, rafiq], 2)
    give(tmp_path, rafiq, Order.signed(key, RUN, 400))  # one that follows, not one that leads
    wait_for(lambda: schedules(averager)[averager.round]["anneal_samples"] == 400, 60, "the order is followed")
    mitu = start("mitu", **options)  # comes when the order was given, and knows nothing of it
    wait_for(
        lambda: all(peer.last("rate") == 0.0 for peer in (averager, asha, rafiq, mitu)),
        90,
        "all are at the end",
    )
    agree([averager, asha, rafiq])
    everybody = [schedules(peer) for peer in (averager, asha, rafiq, mitu)]
    for number in set.intersection(*(set(found) for found in everybody[:3])):
        assert len({str(found[number]) for found in everybody[:3]}) == 1, f"round {number}"
    targets = [event["target"] for event in averager.said() if "round" in event]
    assert targets == sorted(targets), "rounds grow"
    assert (targets[0], targets[-1]) == (16, 64)
    ends = {str(found[max(found)]) for found in everybody}
    assert len(ends) == 1
    last = averager.round
    assert schedules(averager)[last]["samples"] >= schedules(averager)[last]["anneal_from"] + 400


def test_an_order_that_is_not_the_organizer_s_is_refused(start: Start, key: RunKey, tmp_path: Path) -> None:
    """A peer that leads a group with an order of its own making leads nobody; the others go on without it."""
    options = {"values": 200_000}
    averager, asha = start("averager", role="averager", **options), start("asha", **options)
    stranger_key = RunKey.generate(tmp_path / "stranger.pem")
    stranger = start("stranger", misbehave="obedient", **options)
    reach([averager, asha, stranger], 2)
    give(tmp_path, stranger, Order.signed(stranger_key, RUN, 100))
    wait_for(lambda: not (tmp_path / "stranger.order").exists(), 30, "it has its order")
    reach([averager, asha], averager.round + 3, seconds=150)
    assert all(schedule["order"] == 0 for peer in (averager, asha) for schedule in schedules(peer).values())
    agree([averager, asha])
