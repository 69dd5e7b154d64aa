"""Where a volunteer's files are: one folder a run, below the user's data folder (`KANTHA_HOME` overrides it).

<run>/<name>-<slot>/          one peer of this machine: peer.key (its libp2p identity), volunteer.log,
                              data.json (where it is in the run's text)
<run>/<name>-<slot>/snapshot/ the run's tokenizer, and the coordinator's checkpoint where no peer gave the state
<run>/<name>-<slot>/swarm/    snapshots that this peer loads, and makes for others
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_data_path

from kantha.errors import StorageError, SwarmError
from kantha.swarm.identity import PeerIdentity

_log = logging.getLogger(__name__)
_SLOTS = 64  # peers of one name on one machine
_NAME_LENGTH = 40  # of a folder; too long a name is for the membership to refuse, not for the file system


def home() -> Path:
    """The folder that holds everything Kantha keeps for this user."""
    override = os.environ.get("KANTHA_HOME")
    return Path(override) if override else user_data_path("kantha")


class PeerFolder:
    """The first peer folder of this name that no running program uses; held until the program ends."""

    def __init__(self, run: str, username: str) -> None:
        self.run_folder = home() / run[:16]
        safe = re.sub(r"[^\w.-]+", "_", username).strip("._")[:_NAME_LENGTH] or "volunteer"
        try:
            for slot in range(_SLOTS):
                self.path = self.run_folder / f"{safe}-{slot}"
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = FileLock(self.path / ".lock", timeout=0)
                try:
                    self._lock.acquire()
                except Timeout:
                    continue
                return
        except OSError as error:
            raise StorageError(
                f"{error.filename or self.run_folder}: cannot be written ({error.strerror}); "
                "make room, or set KANTHA_HOME to another folder"
            ) from None
        raise SwarmError(f"{_SLOTS} volunteers named {username} run on this machine already; end one of them")

    @property
    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.path / "peer.key")

    def load_place(self) -> object:
        """Where this peer was in the run's text; None where it has not been, or the note is damaged."""
        try:
            return json.loads((self.path / "data.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_place(self, place: Mapping[str, Any]) -> None:
        """Note where this peer is. Without a note some examples are seen twice, so a failure is only logged."""
        new = self.path / ".data.json"
        try:
            new.write_text(json.dumps(place), encoding="utf-8")
            new.replace(self.path / "data.json")
        except OSError as error:
            _log.warning("%s: cannot be written (%s)", new, error.strerror)

    @property
    def log(self) -> Path:
        return self.path / "volunteer.log"
