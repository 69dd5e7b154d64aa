"""`kantha anneal`: the organizer's order to bring a run to its end."""

from collections.abc import Callable
from pathlib import Path

from kantha.coordinator.rundir import RunDirectory
from kantha.errors import OrderError, RunDirectoryError
from kantha.spec import Schedule, ScheduleState
from kantha.swarm.orders import Order
from kantha.training.checkpoint import list_checkpoints, read_manifest

# So that a fifth of the whole is annealed, as in Hägele et al. 2024, arXiv 2405.18392, section 3; see docs/recipe.md.
_SHARE_OF_WHAT_WAS = 4


def anneal_run(path: Path, samples: int | None, cancel: bool, say: Callable[[str], None]) -> None:
    """Leave the order in the run's folder, where the coordinator looks for it. Raises `OrderError` and what
    `RunDirectory.open` raises.

    :param samples: over how many to anneal; None: a quarter of those that were seen
    """
    run = RunDirectory.open(path)
    state = _newest_state(run)
    if state.is_finished:
        raise OrderError(f"{path}: is annealed to its end; docs/recipe.md tells how to go on from before")
    last = _last_order(run)
    given = last.anneal_samples if last is not None else 0
    after = max(state.order, last.number if last is not None else 0)
    when = f"a coordinator that serves {path} takes it up with the next round, else when it is served again"
    if cancel:
        if not given:
            raise OrderError(f"{path}: no annealing was ordered, there is nothing to cancel")
        run.give_order(Order.signed(run.key(), run.spec.fingerprint, 0, after))
        say(f"ordered to go back to the full learning rate; {when}")
        return
    if given:
        raise OrderError(f"{path}: annealing over {given:,} samples was ordered already; --cancel takes it back")
    if not state.samples:
        raise OrderError(f"{path}: no checkpoint with a finished round yet, there is nothing to anneal")
    samples = samples if samples is not None else max(1, state.samples // _SHARE_OF_WHAT_WAS)
    run.give_order(Order.signed(run.key(), run.spec.fingerprint, samples, after))
    rounds = -(-samples // Schedule(run.spec).target(state))
    say(f"ordered to anneal over {samples:,} samples, about {rounds:,} round{'s' * (rounds != 1)}; {when}")
    say("the checkpoint from before is kept. When all is done the volunteers leave: `kantha publish` then")


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
