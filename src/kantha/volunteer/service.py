"""Where this machine is: a notebook that somebody lends, or one's own. A run may limit how many of each one uses."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from kantha.errors import printable
from kantha.spec import Service

# by what the services themselves put into the environment of a notebook. Kaggle first: its image is made from Colab's
_KAGGLE = "KAGGLE_KERNEL_RUN_TYPE"  # github.com/Kaggle/kagglehub, env.py
_COLAB = "COLAB_RELEASE_TAG"  # the same
_HOSTED = {
    "CODESPACES": "GitHub Codespaces",  # docs.github.com: always true in a codespace
    "GITPOD_WORKSPACE_ID": "Gitpod",
    "PAPERSPACE_NOTEBOOK_REPO_ID": "Paperspace Gradient",
    "LIGHTNING_CLOUD_SPACE_ID": "Lightning AI",  # as Lightning's own libraries look for it
    "DEEPNOTE_PROJECT_ID": "Deepnote",
    "DATALORE_USER": "JetBrains Datalore",
    "BINDER_LAUNCH_HOST": "Binder",  # set by BinderHub when it starts a notebook
    "SPACE_AUTHOR_NAME": "Hugging Face Spaces",  # huggingface.co/docs/hub/spaces-overview
}
_STUDIO_LAB = Path("/home/studio-lab-user")  # SageMaker Studio Lab has no variable of its own
_LONGEST = 60  # characters of a label
_QUERY_SECONDS = 10.0


def find_service(environment: Mapping[str, str] = os.environ, studio_lab: Path = _STUDIO_LAB) -> tuple[Service, str]:
    """The service that this machine belongs to, and a label for its owner to know it by.

    The label has no name of a machine or a person: what runs there is shown in refusals, and kept by the coordinator.
    """
    service: Service
    if _KAGGLE in environment:
        service, name = "kaggle", "Kaggle notebook"
    elif _COLAB in environment:
        service, name = "colab", "Colab notebook"
    elif (variable := next((name for name in _HOSTED if environment.get(name)), None)) is not None:
        service, name = "hosted", _HOSTED[variable]
    elif studio_lab.is_dir():
        service, name = "hosted", "SageMaker Studio Lab"
    else:
        service, name = "local", "own machine"
    cores = os.cpu_count() or 1
    device = _gpu(environment) or "CPU"
    return service, printable(f"{name}, {device}, {cores} core{'s' * (cores != 1)}", _LONGEST)


def _gpu(environment: Mapping[str, str]) -> str | None:
    """The first GPU's name. Not asked of PyTorch, which would begin to use CUDA before the swarm's processes fork."""
    program = shutil.which("nvidia-smi")
    if program is None or environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    try:
        answer = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_QUERY_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # a driver that does not work; it is only a label
    return answer.stdout.strip().partition("\n")[0] or None
