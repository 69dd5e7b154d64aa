"""What a peer tells the swarm about itself: one signed, schema-checked DHT record, renewed while it lives.

A report carries the peer's last rounds, not only the newest, so that a coordinator that was away for some minutes
misses nothing. The schema uses pydantic 1, because hivemind's validator does.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Dict, List, Optional  # noqa: UP035  pydantic 1 wants the classic names

from hivemind.dht.schema import BytesWithPublicKey
from pydantic.v1 import BaseModel, Field, StrictBool, confloat, conint, constr

from kantha.swarm.membership import MOST_CERTIFICATE

LIFETIME = 300.0  # seconds a report stays in the DHT after its peer fell silent, for the coordinator to collect
PRESENT = 20.0  # seconds after which a peer that fell silent is no longer counted as here
RENEWAL = 3.0  # seconds between two reports of a peer
UNCONFIRMED = 3 * RENEWAL  # as PRESENT, while a peer's report was never seen to change
ROUNDS_KEPT = 32  # rounds that a report carries
LEFT = "left"  # the state of a peer that said goodbye

if TYPE_CHECKING:  # pydantic 1 makes its constrained types at run time, where no type checker sees them
    from builtins import float as _Amount
    from builtins import float as _Weight
    from builtins import int as _Count
    from builtins import int as _Peers
    from builtins import str as _Certificate
    from builtins import str as _Device
    from builtins import str as _Lineage
    from builtins import str as _Reason
    from builtins import str as _Role
    from builtins import str as _State
    from builtins import str as _Version
else:
    _Count = conint(strict=True, ge=0, le=10**9)
    _Peers = conint(strict=True, ge=1, le=10**6)
    _Amount = confloat(strict=True, ge=0, lt=1e12)
    _Role = constr(strict=True, regex="^(trainer|averager)$")
    _State = constr(strict=True, max_length=40)
    _Weight = confloat(strict=True, gt=-1e12, lt=1e12)
    _Lineage = constr(strict=True, max_length=64)
    _Reason = constr(strict=True, max_length=100)
    _Device = constr(strict=True, max_length=60)
    _Certificate = constr(strict=True, max_length=MOST_CERTIFICATE)
    _Version = constr(strict=True, max_length=20)


class RoundReport(BaseModel):
    """What one peer did in one round."""

    round: _Count
    lineage: _Lineage  # after it
    samples: _Count
    seconds: _Amount  # spent computing
    waited: _Amount  # seconds between computing, lost to whatever else
    mlm_loss_sum: _Amount  # loss × samples, nats
    sop_loss_sum: _Amount
    peers: _Peers  # that put samples into it


class FailedRound(BaseModel):
    """A round that no group could finish, and was tried again later."""

    round: _Count
    reason: _Reason


class Report(BaseModel):
    """The state of one peer."""

    time: _Amount  # swarm time, seconds since 1970
    role: _Role
    state: _State
    dialable: StrictBool  # accepts connections
    ready: StrictBool  # holds the whole state of `round`
    round: _Count  # rounds finished by this peer
    lineage: _Lineage  # digest of all results that led there
    sketch: List[_Weight] = Field(max_items=64)  # noqa: UP006  of its weights; near for near replicas
    samples: _Count  # that wait for the next averaging
    samples_per_second: _Amount
    device: _Device
    version: _Version
    certificate: _Certificate  # the peer's membership, without which nobody stores or believes this
    rounds: List[RoundReport] = Field(max_items=ROUNDS_KEPT)  # noqa: UP006
    failed: List[FailedRound] = Field(max_items=8)  # noqa: UP006


class ReportSchema(BaseModel):
    """The DHT key `{prefix}_reports`: one record a peer, under a subkey that names the key that must have signed it."""

    reports: Dict[BytesWithPublicKey, Optional[Report]]  # noqa: UP006, UP045


class Roster:
    """Who is in the swarm now, judged by this machine's clock alone: a peer is here while its report keeps changing.

    A report that was there already at the first look may be a dead peer's: it is believed for a moment only.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Report, float]] = {}
        self._changed: set[str] = set()  # peers whose report was seen to change

    def update(self, reports: Mapping[str, Report]) -> list[str]:
        """Take in what the DHT holds; returns the peers whose report is new."""
        changed = []
        for peer_id, report in reports.items():
            if peer_id not in self._seen or self._seen[peer_id][0].time != report.time:
                if peer_id in self._seen:
                    self._changed.add(peer_id)
                self._seen[peer_id] = (report, time.monotonic())
                changed.append(peer_id)
        return changed

    def present(self, role: str) -> dict[str, tuple[Report, float]]:
        """Report and seconds since it changed, by peer id, of every peer of this role that is here."""
        now = time.monotonic()
        return {
            peer_id: (report, now - seen)
            for peer_id, (report, seen) in list(self._seen.items())
            if report.role == role
            and report.state != LEFT
            and now - seen < (PRESENT if peer_id in self._changed else UNCONFIRMED)
        }
