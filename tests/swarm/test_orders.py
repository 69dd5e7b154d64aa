from pathlib import Path

import pytest

from kantha.errors import OrderError
from kantha.swarm.membership import RunKey, Trust
from kantha.swarm.orders import MOST_BYTES, Order, read_order

RUN, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def key(tmp_path: Path) -> RunKey:
    return RunKey.generate(tmp_path / "run.pem")


def test_an_order_of_the_run_s_key_is_genuine(key: RunKey) -> None:
    order = Order.signed(key, RUN, 1_000)
    text = order.model_dump_json()
    assert len(text) <= MOST_BYTES
    assert read_order(text, Trust(RUN, key.public_key)) == order


def test_a_later_order_has_a_larger_number(key: RunKey) -> None:
    first = Order.signed(key, RUN, 1_000)
    while (second := Order.signed(key, RUN, 0)).number == first.number:
        pass
    assert second.number > first.number


def test_an_order_that_was_changed_made_up_or_meant_for_another_run_is_refused(key: RunKey, tmp_path: Path) -> None:
    good = Order.signed(key, RUN, 1_000)
    stranger = RunKey.generate(tmp_path / "stranger.pem")
    bad = [
        good.model_copy(update={"anneal_samples": 2_000}).model_dump_json(),
        good.model_copy(update={"number": good.number + 1}).model_dump_json(),
        good.model_copy(update={"signature": ""}).model_dump_json(),
        good.model_copy(update={"signature": "xyz"}).model_dump_json(),
        Order.signed(stranger, RUN, 1_000).model_dump_json(),
        Order.signed(key, OTHER, 1_000).model_dump_json(),
        good.model_copy(update={"run": OTHER}).model_dump_json(),
        good.model_dump_json() + " " * MOST_BYTES,
        "",
        "{}",
        "[" * 400,
        "null",
    ]
    for text in bad:
        with pytest.raises(OrderError):
            read_order(text, Trust(RUN, key.public_key))
