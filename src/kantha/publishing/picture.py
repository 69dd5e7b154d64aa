"""The losses of a run as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_SMOOTHED_SHARE = 1 / 30  # of the rounds, which the smoothed curve averages over; at least three of them
_COLOUR = "#a4343a"


@dataclass(frozen=True)
class RoundLoss:
    """Mean training losses of one round, nats."""

    round: int
    mlm: float  # per masked token
    sop: float  # per sentence pair


def draw_losses(losses: Sequence[RoundLoss], path: Path) -> None:
    """Draw both losses by round, raw and smoothed, to a PNG file; the same losses give the same bytes.

    There is no text of the run in it: fonts that come with matplotlib have no Bengali.
    """
    figure = Figure(figsize=(8.0, 6.0), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    rounds = [loss.round for loss in losses]
    _draw(upper, rounds, [loss.mlm for loss in losses], "masked tokens (nats)")
    _draw(lower, rounds, [loss.sop for loss in losses], "sentence order (nats)")
    upper.set_title("Training loss by round")
    upper.legend(frameon=False)
    lower.set_xlabel("round")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, metadata={"Software": None})


def _draw(axes: Axes, rounds: Sequence[int], values: Sequence[float], label: str) -> None:
    axes.plot(rounds, values, color=_COLOUR, alpha=0.3, linewidth=1, label="of the round")
    axes.plot(rounds, _smooth(values), color=_COLOUR, linewidth=2, label="smoothed")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over a window around every round; at the ends over as much of the window as there is."""
    window = np.ones(2 * max(1, round(len(values) * _SMOOTHED_SHARE / 2)) + 1)[: len(values)]
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
