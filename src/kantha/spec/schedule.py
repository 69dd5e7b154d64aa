"""Learning rate and batch size by the samples that the swarm has seen: warm-up, stable, annealing when it is ordered.

Nobody knows when a community's time runs out, so no rate is a function of a last step: it is kept at its peak until the
organizer orders the annealing (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395, section 4), in which it falls
as 1 − √x (Hägele et al. 2024, arXiv 2405.18392, section 3). Every peer follows the same order in the same round.
"""

from math import sqrt

from pydantic import BaseModel, ConfigDict, Field

from kantha.spec.models import RunSpec

_MOST_SAMPLES = 10**15


class ScheduleState(BaseModel):
    """Where a run is in its schedule. Part of the replicated state: a function of the rounds that were finished."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    samples: int = Field(0, ge=0, le=_MOST_SAMPLES, description="In all finished rounds.")
    order: int = Field(0, ge=0, le=2**53, description="Number of the last order that was followed; 0: none.")
    anneal_from: int = Field(0, ge=0, le=_MOST_SAMPLES, description="Samples at which annealing began.")
    anneal_samples: int = Field(0, ge=0, le=_MOST_SAMPLES, description="How many it takes; 0: it was not ordered.")

    @property
    def annealed(self) -> float | None:
        """Share of the annealing that is done, 0 to 1; None where there is none."""
        if not self.anneal_samples:
            return None
        return min(1.0, (self.samples - self.anneal_from) / self.anneal_samples)

    @property
    def is_finished(self) -> bool:
        """Whether the rate has come down to zero: nothing more is learned."""
        return self.annealed == 1.0

    def obey(self, order: int, anneal_samples: int) -> "ScheduleState":
        """The state in which the next round begins, after an order: anneal over so many samples from here; 0: go back
        to the stable phase. Orders not newer than the last are known already; after the end none is followed."""
        if order <= self.order or self.is_finished:
            return self
        return self.model_copy(
            update={
                "order": order,
                "anneal_from": self.samples if anneal_samples else 0,
                "anneal_samples": anneal_samples,
            }
        )

    def advance(self, samples: int) -> "ScheduleState":
        """The state after a round of so many samples."""
        return self.model_copy(update={"samples": self.samples + samples})


class Schedule:
    """A spec's learning rate and batch size in each state."""

    def __init__(self, spec: RunSpec) -> None:
        self._schedule, self._peak, self._full = spec.schedule, spec.optimizer.learning_rate, spec.swarm

    def target(self, state: ScheduleState) -> int:
        """Samples that make the next round."""
        full, first = self._full.target_batch_size, self._schedule.first_batch_size
        if state.samples >= self._schedule.ramp_samples:
            return full
        return first + (full - first) * state.samples // self._schedule.ramp_samples

    def rate(self, state: ScheduleState) -> float:
        """Learning rate of the step that ends the next round."""
        rate, warmup = self._peak, self._schedule.warmup_samples
        if state.samples < warmup:  # by its end, so that the first step is not lost
            rate *= min(1.0, (state.samples + self.target(state)) / warmup)
        if (annealed := state.annealed) is not None:
            rate *= 1.0 - sqrt(annealed)
        return rate
