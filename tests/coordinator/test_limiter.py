import pickle
import time

import pytest
from limits import RateLimitItemPerMinute, RateLimitItemPerSecond

from kantha.coordinator.limiter import Limiter, TooManyRequestsError, network_of


def test_one_too_many_is_told_when_to_come_back_and_others_are_let_in() -> None:
    limiter, limit = Limiter(), RateLimitItemPerMinute(3)
    for _ in range(3):
        limiter.hit(limit, "join", "asha")
    for _ in range(2):
        with pytest.raises(TooManyRequestsError, match=r"try again in \d+ s") as caught:
            limiter.hit(limit, "join", "asha")
        assert 1 <= caught.value.seconds <= 61
    limiter.hit(limit, "join", "mitu")
    limiter.hit(limit, "leave", "asha")


def test_whoever_asked_is_forgotten_when_the_time_is_over() -> None:
    limiter, limit = Limiter(), RateLimitItemPerSecond(1_000_000)
    for number in range(500):
        limiter.hit(limit, "post", f"203.0.113.{number}")

    def kept() -> bytes:
        limiter.hit(limit, "post", "another")
        return pickle.dumps(limiter._limiter.storage)

    assert b"203.0.113.7" in kept()
    deadline = time.monotonic() + 10
    while b"203.0.113." in kept():
        assert time.monotonic() < deadline
    assert len(kept()) < 2_000


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("203.0.113.5", "203.0.113.5"),
        ("::ffff:203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
    ],
)
def test_of_ipv6_a_whole_network_is_one(address: str, network: str) -> None:
    assert network_of(address) == network
