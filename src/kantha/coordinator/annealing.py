"""The order to bring a run to its end: by `kantha anneal`, or at the moderators' desk.

It is left in the run's folder, where the coordinator looks for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kantha.coordinator.rundir import RunDirectory
from kantha.errors import OrderError, RunDirectoryError
from kantha.spec import Schedule, ScheduleState
from kantha.swarm.orders import Order
from kantha.training.checkpoint import list_checkpoints, read_manifest

MOST_SAMPLES = 10**15
# So that a fifth of the whole is annealed, as in Hägele et al. 2024, arXiv 2405.18392, section 3; see docs/recipe.md.
_SHARE_OF_WHAT_WAS = 4


@dataclass(frozen=True)
class Annealing:
    """What an order would mean."""

    samples: int
    rounds: int  # about


def anneal_run(path: Path, samples: int | None, cancel: bool, say: Callable[[str], None]) -> None:
    """`kantha anneal`. Raises `OrderError` and what `RunDirectory.open` raises.

    :param samples: over how many to anneal; None: a quarter of those that were seen
    """
    run = RunDirectory.open(path)
    when = f"a coordinator that serves {path} takes it up with the next round, else when it is served again"
    try:
        if cancel:
            cancel_annealing(run)
            say(f"ordered to go back to the full learning rate; {when}")
            return
        plan = plan_annealing(run, samples)
        order_annealing(run, plan)
    except OrderError as error:
        raise OrderError(f"{path}: {error}") from None
    rounds = f"about {plan.rounds:,} round{'s' * (plan.rounds != 1)}"
    say(f"ordered to anneal over {plan.samples:,} samples, {rounds}; {when}")
    say("the checkpoint from before is kept. When all is done the volunteers leave: `kantha publish` then")


def plan_annealing(run: RunDirectory, samples: int | None = None) -> Annealing:
    """What it would mean to anneal now. Raises `OrderError` where that cannot be.

    :param samples: over how many; None: a quarter of those that were seen
    """
    state = _newest_state(run)
    if state.is_finished:
        raise OrderError("is annealed to its end; docs/recipe.md tells how to go on from before")
    if given := ordered_annealing(run):
        raise OrderError(
            f"annealing over {given:,} samples was ordered already; `kantha anneal --cancel` takes it back"
        )
    if not state.samples:
        raise OrderError("no checkpoint with a finished round yet, there is nothing to anneal")
    samples = samples if samples is not None else max(1, state.samples // _SHARE_OF_WHAT_WAS)
    if not 1 <= samples <= MOST_SAMPLES:
        raise OrderError(f"annealing takes from 1 to {MOST_SAMPLES:,} samples")
    return Annealing(samples, -(-samples // Schedule(run.spec).target(state)))


def order_annealing(run: RunDirectory, plan: Annealing) -> None:
    """Raises `StorageError`."""
    run.give_order(Order.signed(run.key(), run.spec.fingerprint, plan.samples, _number(run)))


def cancel_annealing(run: RunDirectory) -> None:
    """Go back to the full learning rate. Raises `OrderError` where nothing was ordered, or it is done already."""
    if _newest_state(run).is_finished:
        raise OrderError("is annealed to its end; docs/recipe.md tells how to go on from before")
    if not ordered_annealing(run):
        raise OrderError("no annealing was ordered, there is nothing to cancel")
    run.give_order(Order.signed(run.key(), run.spec.fingerprint, 0, _number(run)))


def ordered_annealing(run: RunDirectory) -> int:
    """Samples of the order that stands; 0: there is none."""
    last = _last_order(run)
    return last.anneal_samples if last is not None else 0


def _number(run: RunDirectory) -> int:
    """Of the newest order, which the next one must exceed."""
    last = _last_order(run)
    return max(_newest_state(run).order, last.number if last is not None else 0)


def _last_order(run: RunDirectory) -> Order | None:
    """The one that was given last; None: none, or one that is damaged and is given anew."""
    try:
        text = run.read_order()
    except OrderError:
        return None
    return Order.model_validate_json(text) if text is not None else None


def _newest_state(run: RunDirectory) -> ScheduleState:
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        raise RunDirectoryError(f"{run.checkpoints}: no checkpoint; restore one from a copy")
    return read_manifest(checkpoints[0]).schedule
