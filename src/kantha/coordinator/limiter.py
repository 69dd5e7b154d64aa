"""How often somebody may ask. Kept in memory only: addresses are stored nowhere."""

import ipaddress
import time

from fastapi import Request
from limits import RateLimitItem, RateLimitItemPerHour, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

POSTS = RateLimitItemPerMinute(600)  # of one address
TOKENS = RateLimitItemPerMinute(20)  # sign-ins by token from one address
SIGN_INS = RateLimitItemPerMinute(100)  # in browsers at one address; each makes us ask Hugging Face
REQUESTS = RateLimitItemPerMinute(40)  # of one peer, for each purpose: one that waits asks 20 times a minute
# Whoever asks without being known leaves something in the database for some minutes. From many addresses at once,
# these two bound it.
STRANGERS = RateLimitItemPerMinute(6_000)  # requests of all peers together that nobody called his, for each purpose
PAIRINGS = RateLimitItemPerMinute(300)  # new codes
# New certificates of one person: each may be revoked, and all peers are told of at most 5,000.
CERTIFICATES = RateLimitItemPerHour(60)
EXPORTS = RateLimitItemPerMinute(6)  # of the ledger, to one address elsewhere; a large one takes seconds of computing
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


class TooManyRequestsError(Exception):
    """Come back later: HTTP status 429."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        super().__init__(f"too many requests; try again in {seconds} s")


class Limiter:
    """Counts by minutes or hours, from the first request on; what was counted is forgotten then. Safe to use from
    several threads."""

    def __init__(self) -> None:
        # not by moving windows, for which this storage keeps the name of everybody who ever asked
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def hit(self, limit: RateLimitItem, *who: str) -> None:
        """Count one more. Raises `TooManyRequestsError`, and does not count it, where it is one too many."""
        if not self._limiter.hit(limit, *who):
            until = self._limiter.get_window_stats(limit, *who).reset_time
            raise TooManyRequestsError(max(1, round(until - time.time() + 0.5)))


def address_of(request: Request) -> str:
    """For the limits alone: it is kept in memory for a minute, and said nowhere."""
    return network_of(request.client.host) if request.client is not None else ""


def is_local(request: Request) -> bool:
    """Whether the request comes from this machine itself; behind a proxy everything seems to, so that is refused."""
    if any(header in request.headers for header in _PROXY_HEADERS) or request.client is None:
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback  # mapped: as an IPv6 socket sees IPv4
    except ValueError:
        return False


def network_of(address: str) -> str:
    """Whose address it is: of IPv6 everybody has a whole network of 64 bits."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(getattr(ip, "ipv4_mapped", None) or ip)
