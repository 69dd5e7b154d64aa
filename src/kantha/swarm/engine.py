"""What a volunteer needs from whatever turns many peers' gradients into one step: the engine's interface.

The only engine so far is `hivemind.Optimizer` (hivemind_engine.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class RoundResult:
    """How a round ended for this peer."""

    round: int  # rounds finished, this one included
    samples: int  # this peer's samples in it
    peers: int  # size of the group that averaged, this peer included
    whole: bool  # every part of every peer arrived; if not, the round counts as failed


@dataclass(frozen=True)
class Progress:
    """How far the swarm is on its way to the next update, as far as this peer knows."""

    samples: int
    target: int
    peers: int  # that compute
    seconds_left: float | None


class Engine(Protocol):
    """Accumulates one peer's gradients, averages them with the swarm's, and keeps a replica in step with the others."""

    @property
    def round(self) -> int:
        """Rounds that this peer's replica has finished; it jumps where the peer had to fetch the swarm's state."""

    def contribute(self, gradients: Sequence[torch.Tensor], samples: int) -> RoundResult | None:
        """Hand in the mean gradient over `samples` samples, in the order of the replica's parameters.

        Returns the result where this ended a round, else None. May block for as long as an averaging takes.
        Raises `SwarmError` when the swarm is lost for good.
        """

    def progress(self) -> Progress: ...

    def see_averagers(self, count: int, newest_round: int) -> None:
        """Tell how many averagers (peers without gradients) are here, and the newest round whose state one holds."""

    def is_alive(self) -> bool:
        """Whether the processes behind it still run; if not, it cannot finish another round."""

    def close(self) -> None: ...
