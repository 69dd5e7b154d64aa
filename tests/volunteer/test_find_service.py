import os
import stat
from pathlib import Path

import pytest

from kantha.swarm.identity import PeerIdentity
from kantha.volunteer.membership import Applicant
from kantha.volunteer.service import find_service


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def smi(folder: Path, script: str) -> None:
    """A driver's program that says what it is told to."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("environment", "service", "name"),
    [
        ({}, "local", "own machine"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, "kaggle", "Kaggle notebook"),
        ({"COLAB_RELEASE_TAG": "release-colab_2026"}, "colab", "Colab notebook"),
        # Kaggle's image is made from Colab's
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch", "COLAB_RELEASE_TAG": "x"}, "kaggle", "Kaggle notebook"),
        ({"PAPERSPACE_NOTEBOOK_REPO_ID": "r1"}, "hosted", "Paperspace Gradient"),
        ({"LIGHTNING_CLOUD_SPACE_ID": "01"}, "hosted", "Lightning AI"),
        ({"DEEPNOTE_PROJECT_ID": "p"}, "hosted", "Deepnote"),
        ({"DATALORE_USER": "datalore"}, "hosted", "JetBrains Datalore"),
        ({"CODESPACES": "true"}, "hosted", "GitHub Codespaces"),
        ({"GITPOD_WORKSPACE_ID": "w"}, "hosted", "Gitpod"),
        ({"BINDER_LAUNCH_HOST": "https://mybinder.org/"}, "hosted", "Binder"),
        ({"SPACE_AUTHOR_NAME": "asha"}, "hosted", "Hugging Face Spaces"),
        ({"CODESPACES": ""}, "local", "own machine"),
    ],
)
def test_where_this_machine_is(
    environment: dict[str, str], service: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert find_service(environment, tmp_path / "none") == (service, f"{name}, CPU, 4 cores")


@pytest.mark.usefixtures("no_gpu")
def test_a_service_that_is_only_known_by_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert find_service({}, tmp_path) == ("hosted", "SageMaker Studio Lab, CPU, 1 core")


@pytest.mark.parametrize(
    ("script", "environment", "device"),
    [
        ("echo Tesla T4; echo Tesla T4", {}, "Tesla T4"),
        ("echo Tesla T4", {"CUDA_VISIBLE_DEVICES": "1"}, "Tesla T4"),
        ("echo Tesla T4", {"CUDA_VISIBLE_DEVICES": ""}, "CPU"),
        ("echo Tesla T4", {"CUDA_VISIBLE_DEVICES": "-1"}, "CPU"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", {}, "CPU"),
        ("true", {}, "CPU"),
    ],
    ids=["two", "one", "hidden", "hidden too", "no driver", "none"],
)
def test_the_label_has_the_device(
    script: str, environment: dict[str, str], device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    smi(tmp_path, script)
    _, label = find_service(environment, tmp_path / "none")
    assert label.startswith(f"own machine, {device}, ")


def test_a_label_is_one_that_a_request_can_hold(
    identity: PeerIdentity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And has no name of this machine."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    smi(tmp_path, f"printf 'GPU \\033[2J\\342\\200\\256 {'x' * 80}'")
    service, label = find_service({}, tmp_path / "none")
    assert Applicant(identity, "0f" * 32, service, label, "Asha").request().instance == label
    assert os.uname().nodename not in label
