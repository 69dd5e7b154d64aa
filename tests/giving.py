"""Volunteers whose machines have given something, for tests of what is told of them."""

import time
from collections.abc import Sequence

from kantha.coordinator.allowlist import Allowlist, Person
from kantha.coordinator.contributions import Change
from kantha.coordinator.ledger import Ledger
from kantha.swarm.membership import Membership

DAY = 86_400.0


def give(ledger: Ledger, allowlist: Allowlist, name: str, *gifts: tuple[float, int], machine: int = 0) -> int:
    """What one machine of somebody has given, who is entered where nobody has that name. Returns the person's number.

    :param gifts: how many days ago, and how many samples; an hour of computing each
    """
    now = time.time()
    number = allowlist.sign_in(Person(name, "", "local", ())).number
    peer_id = f"machine {machine} of {number}"
    membership = Membership(
        serial="0" * 16,
        run="ab" * 32,
        username=name,
        peer_id=peer_id,
        service="local",
        roles=("trainer",),
        issued=0,
        expires=100,
    )
    ledger.add_member(membership, number)
    with ledger.database.session() as session:
        change = Change(session)
        change.put([_row(peer_id, 1 + index, now - days * DAY, samples) for index, (days, samples) in enumerate(gifts)])
        change.close()
    return number


def on_days(*days: float) -> Sequence[tuple[float, int]]:
    """Ten samples on each."""
    return [(each, 10) for each in days]


def _row(peer_id: str, number: int, seen: float, samples: int) -> dict[str, object]:
    return {
        "round": number,
        "peer_id": peer_id,
        "lineage": "x",
        "samples": samples,
        "seconds": 3600.0,
        "waited": 0.0,
        "mlm_loss_sum": 1.0,
        "sop_loss_sum": 1.0,
        "peers": 2,
        "seen": seen,
    }
