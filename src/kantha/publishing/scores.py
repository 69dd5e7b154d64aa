"""Scores that the model card shows, as a JSON file has them."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from kantha.errors import PublishingError, printable


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)  # what else a file says is no matter of the card


class Metric(_Part):
    """One measured number: the mean over `n` repetitions, and the spread of these."""

    mean: float
    std: float | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)


class Score(_Part):
    """What one way of using the model reached on one task."""

    task: str = Field(min_length=1, max_length=200, description="What was measured, as people read it.")
    method: str = Field("", max_length=200, description="How, for example which head was trained on the model.")
    type: str | None = Field(None, max_length=100, description="The kind of task in the hub's words.")
    dataset: str | None = Field(None, max_length=200, description="The dataset's name on the hub.")
    metrics: dict[str, Metric] = Field(min_length=1)

    @field_validator("metrics", mode="before")
    @classmethod
    def _bare_numbers(cls, metrics: object) -> object:
        if not isinstance(metrics, dict):
            return metrics
        return {
            name: {"mean": value} if isinstance(value, int | float) else value
            for name, value in metrics.items()
            if value is not None  # not measured
        }


_SCORES = TypeAdapter(list[Score])


def load_scores(path: Path) -> list[Score]:
    """Read scores: a list, or an object whose field `scores` is one. Raises `PublishingError`.

    An item is {"task": …, "method": …, "metrics": {name: {"mean": …, "std": …, "n": …}}}; a bare number may stand for a
    metric, `type` and `dataset` may be given, and fields of other names are not looked at.
    """
    try:
        content = json.loads(path.read_bytes())
        return _SCORES.validate_python(content.get("scores") if isinstance(content, dict) else content)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except ValidationError as error:
        mistake = error.errors()[0]
        place = ".".join(map(str, mistake["loc"])) or "at the top"
        problem = f"does not hold scores ({printable(place)}: {mistake['msg']})"
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({printable(error)})"
    raise PublishingError(f"{path}: {problem}; give what `kantha evaluate --json` wrote")
