"""A small model, and labelled data that it can learn in seconds."""

import pytest
from labelled_data import sentences, texts

from kantha.coordinator.rundir import RunDirectory
from kantha.evaluation.labelled import Sentence, Splits, Text
from kantha.publishing import export_model
from kantha.spec import ModelSpec, RunSpec


@pytest.fixture(scope="session")
def run(tiny_spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run whose model is just large enough to learn from labels; it was never trained."""
    model = ModelSpec(
        embedding_size=32, hidden_size=64, intermediate_size=128, layers=2, attention_heads=2, max_positions=40
    )
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return RunDirectory.create(folder, tiny_spec.model_copy(update={"model": model}), lambda _: None)


@pytest.fixture(scope="session")
def model_folder(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its model as plain `transformers` loads it."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_model(run.path, folder)
    return str(folder)


@pytest.fixture(scope="session")
def topics() -> Splits[Text]:
    return Splits("topics", texts(120, 1), texts(30, 2), texts(40, 3), [])


@pytest.fixture(scope="session")
def entities() -> Splits[Sentence]:
    return Splits("entities", sentences(120, 1), sentences(30, 2), sentences(40, 3), [])
