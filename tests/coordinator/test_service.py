"""What the coordinator saves."""

from types import SimpleNamespace
from typing import Any

import torch

from kantha.coordinator.service import Coordinator
from kantha.training import Replica
from kantha.training.checkpoint import list_checkpoints, read_manifest


def test_a_diverged_model_does_not_replace_a_good_checkpoint(web_coordinator: Any) -> None:
    coordinator: Coordinator = web_coordinator
    said: list[str] = []
    web_coordinator._say = said.append
    web_coordinator._no_save_before = 0.0
    web_coordinator._averager = SimpleNamespace(round=5, state_round=5)
    web_coordinator._replica = Replica(coordinator.run.spec)
    with torch.no_grad():
        web_coordinator._replica.parameters[0][0] = float("nan")
    before = list_checkpoints(coordinator.run.checkpoints)
    coordinator._save_if_newer()
    assert list_checkpoints(coordinator.run.checkpoints) == before
    assert "not finite" in said[0]

    web_coordinator._replica = Replica(coordinator.run.spec)
    web_coordinator._no_save_before = 0.0
    coordinator._save_if_newer()
    assert read_manifest(list_checkpoints(coordinator.run.checkpoints)[0]).round == 5
