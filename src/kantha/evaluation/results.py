"""What was measured: one score for one method and seed, and their mean."""

import importlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from kantha.errors import MissingPackageError

_PACKAGES = {"sklearn": "scikit-learn", "seqeval": "seqeval", "sklearn_crfsuite": "sklearn-crfsuite"}


@dataclass(frozen=True)
class Score:
    """How one method did on a task's test data; `seed` is None for a method without chance."""

    method: str
    metrics: dict[str, float]  # by name: shares from 0 to 1, losses in nats
    seed: int | None = None


@dataclass(frozen=True)
class Spread:
    """A metric over seeds; `deviation` is the sample's standard deviation, None where there is one value only."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def by_method(scores: Sequence[Score]) -> dict[str, dict[str, Spread]]:
    """Method → metric → spread, in the order in which they were measured."""
    table: dict[str, dict[str, Spread]] = {}
    for score in scores:
        row = table.setdefault(score.method, {})
        for metric, value in score.metrics.items():
            row.setdefault(metric, Spread([])).values.append(value)
    return table


def import_extra(module: str) -> ModuleType:
    """Import a module of the optional extra `evaluate`. Raises `MissingPackageError` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = _PACKAGES[module.partition(".")[0]]
        raise MissingPackageError(
            f"{package}, which this task needs, is not installed; run: pip install {' '.join(_PACKAGES.values())}"
        ) from None
