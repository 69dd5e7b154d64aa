"""The run spec: pydantic models, YAML, presets, fingerprint. Imports no other room."""

from kantha.spec.files import dump_spec, load_spec, parse_spec
from kantha.spec.models import (
    BLANK,
    DataSpec,
    EvaluationSpec,
    FileSource,
    FilterSpec,
    HuggingFaceSource,
    Masking,
    ModelSpec,
    ObjectiveSpec,
    OneLine,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    Service,
    ServiceSpec,
    ShobdoSource,
    Source,
    SwarmSpec,
    TokenizerSpec,
)
from kantha.spec.presets import PRESETS
from kantha.spec.schedule import Schedule, ScheduleState

__all__ = [
    "BLANK",
    "PRESETS",
    "DataSpec",
    "EvaluationSpec",
    "FileSource",
    "FilterSpec",
    "HuggingFaceSource",
    "Masking",
    "ModelSpec",
    "ObjectiveSpec",
    "OneLine",
    "OptimizerSpec",
    "RunSpec",
    "Schedule",
    "ScheduleSpec",
    "ScheduleState",
    "Service",
    "ServiceSpec",
    "ShobdoSource",
    "Source",
    "SwarmSpec",
    "TokenizerSpec",
    "dump_spec",
    "load_spec",
    "parse_spec",
]
