"""The losses of a run as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SMOOTHED_SHARE = 1 / 30  # of the rounds, which the smoothed curve averages over; at least three of them
_COLOUR, _HELDOUT_COLOUR = "#a4343a", "#2f3f86"


@dataclass(frozen=True)
class RoundLoss:
    """Mean training losses of one round, nats."""

    round: int
    mlm: float  # per masked token
    sop: float  # per sentence pair


@dataclass(frozen=True)
class HeldoutLoss(RoundLoss):
    """Mean losses of the model after a round on held-out text."""

    mlm_accuracy: float  # shares from 0 to 1
    sop_accuracy: float
    pairs: int  # examples that were measured


def draw_losses(losses: Sequence[RoundLoss], heldout: Sequence[RoundLoss], path: Path) -> None:
    """Draw both losses by round, raw and smoothed, and where they are known on held-out text, to a PNG file; the same
    losses give the same bytes.

    There is no text of the run in it: fonts that come with matplotlib have no Bengali.
    """
    figure = Figure(figsize=(8.0, 6.0), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    rounds, measured = [loss.round for loss in losses], [loss.round for loss in heldout]
    _draw(upper, rounds, [loss.mlm for loss in losses], "masked tokens (nats)")
    _draw(lower, rounds, [loss.sop for loss in losses], "sentence order (nats)")
    if heldout:
        _draw_heldout(upper, measured, [loss.mlm for loss in heldout])
        _draw_heldout(lower, measured, [loss.sop for loss in heldout])
    upper.set_title("Loss by round")
    upper.legend(frameon=False)
    lower.set_xlabel("round")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, metadata={"Software": None})


def _draw(axes: Axes, rounds: Sequence[int], values: Sequence[float], label: str) -> None:
    axes.plot(rounds, values, color=_COLOUR, alpha=0.3, linewidth=1, label="training, of the round")
    axes.plot(rounds, _smooth(values), color=_COLOUR, linewidth=2, label="training, smoothed")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_heldout(axes: Axes, rounds: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(
        rounds,
        values,
        color=_HELDOUT_COLOUR,
        linewidth=1,
        marker="o",
        markersize=5,
        fillstyle="none",
        label="held-out text",
    )


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over a window around every round; at the ends over as much of the window as there is."""
    window = np.ones(2 * max(1, round(len(values) * _SMOOTHED_SHARE / 2)) + 1)[: len(values)]
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
