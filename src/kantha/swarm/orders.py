"""What the organizer orders: to anneal, signed by the run's key. It travels with the results of rounds, so that all
follow it in the same round, and no peer can make one up."""

import json
import time

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kantha.errors import OrderError
from kantha.swarm.membership import RunKey, Trust

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
        return cls(run=run, number=number, anneal_samples=anneal_samples).signed_again(key)

    def signed_again(self, key: RunKey) -> "Order":
        """The same order, for peers that know a new key of the run."""
        return self.model_copy(update={"signature": key.sign(self.content).hex()})

    @property
    def content(self) -> bytes:
        """What is signed."""
        fields = self.model_dump(exclude={"signature"})
        return b"order:" + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def parse_order(text: str | bytes) -> Order:
    """An order, whoever made it. Raises `OrderError`."""
    try:
        order = Order.model_validate_json(text) if len(text) <= MOST_BYTES else None
    except ValidationError:
        order = None
    if order is None:
        raise OrderError("this order is damaged; give it again with `kantha anneal`")
    return order


def read_order(text: str | bytes, trust: Trust) -> Order:
    """An order that is genuine and for this run. Raises `OrderError`."""
    order = parse_order(text)
    if order.run != trust.run or not trust.is_signed(order.content, order.signature):
        raise OrderError("this order is another run's, or not signed by this run's key; give it with `kantha anneal`")
    return order
