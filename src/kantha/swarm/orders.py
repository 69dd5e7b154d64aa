"""What the organizer orders: to anneal, signed by the run's key. It travels with the results of rounds, so that all
follow it in the same round, and no peer can make one up."""

import json
import time

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kantha.errors import OrderError
from kantha.swarm.membership import RunKey

MOST_BYTES = 500  # of an order as JSON


class Order(BaseModel):
    """Anneal over so many samples from the round on in which it is followed; 0: go back to the stable phase."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: str = Field(pattern="^[0-9a-f]{64}$", description="The run's fingerprint.")
    number: int = Field(ge=1, le=2**53, description="Milliseconds since 1970; the newest order is followed.")
    anneal_samples: int = Field(ge=0, le=10**15)
    signature: str = Field("", max_length=128, description="By the run's key over all other fields, in hex.")

    @classmethod
    def signed(cls, key: RunKey, run: str, anneal_samples: int, after: int = 0) -> "Order":
        """:param after: number of the order before, which this one must exceed, whatever the clock says"""
        number = max(time.time_ns() // 10**6, after + 1)
        order = cls(run=run, number=number, anneal_samples=anneal_samples)
        return order.model_copy(update={"signature": key.sign(order._canonical()).hex()})

    def _canonical(self) -> bytes:
        fields = self.model_dump(exclude={"signature"})
        return b"order:" + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def read_order(text: str | bytes, run_key: str, run: str) -> Order:
    """An order that is genuine and for this run. Raises `OrderError`.

    :param run_key: the run's public key, in hex
    """
    try:
        order = Order.model_validate_json(text) if len(text) <= MOST_BYTES else None
        if order is None or order.run != run:
            raise OrderError("this order is damaged, or another run's; give it again with `kantha anneal`")
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(run_key))
        key.verify(bytes.fromhex(order.signature), order._canonical())
    except (ValidationError, ValueError, InvalidSignature) as error:
        raise OrderError(
            f"this order is not signed by the run's key ({type(error).__name__}); give it again with `kantha anneal`"
        ) from None
    return order
