"""How often somebody may ask. Kept in memory only: addresses are stored nowhere."""

import ipaddress
import time

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

POSTS = RateLimitItemPerMinute(600)  # of one address
TOKENS = RateLimitItemPerMinute(20)  # sign-ins by token from one address
REQUESTS = RateLimitItemPerMinute(40)  # of one peer, for each purpose: one that waits asks 20 times a minute


class TooManyRequestsError(Exception):
    """Come back later: HTTP status 429."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"too many requests; try again in {seconds} s")


class Limiter:
    """Counts over the last minute. Safe to use from several threads."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def hit(self, limit: RateLimitItem, *who: str) -> None:
        """Count one more. Raises `TooManyRequestsError`, and does not count it, where it is one too many."""
        if not self._limiter.hit(limit, *who):
            until = self._limiter.get_window_stats(limit, *who).reset_time
            raise TooManyRequestsError(max(1, round(until - time.time() + 0.5)))


def network_of(address: str) -> str:
    """Whose address it is: of IPv6 everybody has a whole network of 64 bits."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(getattr(ip, "ipv4_mapped", None) or ip)
