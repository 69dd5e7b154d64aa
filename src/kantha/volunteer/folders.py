"""Where a volunteer's files are: one folder a run, below the user's data folder (`KANTHA_HOME` overrides it).

<run>/run-key                 the run's newest public key, as it was seen
<run>/<name>-<slot>/          one peer of this machine: peer.key (its libp2p identity), volunteer.log,
                              data.json (where it is in the run's text), notice.json (the organizer's newest),
                              given.json (how many of its samples count, by its own count),
                              announced.json (what of it was told)
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
from pydantic import TypeAdapter

from kantha.errors import StorageError, SwarmError
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MOST_NOTICE, Announcement

_log = logging.getLogger(__name__)
_ANNOUNCED = TypeAdapter(tuple[Announcement, ...])
_SLOTS = 64  # peers of one name on one machine
_NAME_LENGTH = 40  # of a folder; too long a name is for the membership to refuse, not for the file system


def home() -> Path:
    """The folder that holds everything Kantha keeps for this user."""
    override = os.environ.get("KANTHA_HOME")
    return Path(override) if override else user_data_path("kantha")


class PeerFolder:
    """The first peer folder of this name that no running program uses; held until the program ends."""

    def __init__(self, run: str, username: str) -> None:
        """:param username: empty where people sign in: whose peer it is, the coordinator knows"""
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
        raise SwarmError(f"{_SLOTS} volunteers named {safe} run on this machine already; end one of them")

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
        _note(self.path / "data.json", json.dumps(place))

    def load_given(self) -> int:
        """How many of this peer's samples count, since it first joined; 0 where that was not noted."""
        return _given(self.path)

    def save_given(self, samples: int) -> None:
        """The ledger has it, too, so a failure is only logged."""
        _note(self.path / "given.json", json.dumps({"samples": samples}))

    def load_run_key(self) -> str | None:
        """The run's public key, in hex, that was seen last; None: this is the first time. Raises `StorageError`."""
        path = self.run_folder / "run-key"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):
            key = ""
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise StorageError(f"{path}: damaged; delete it, and join with the run's key in the link: URL#KEY")
        return key

    def save_run_key(self, key: str) -> None:
        """Without it the coordinator is believed the next time, as at the first, so a failure is only logged."""
        _note(self.run_folder / "run-key", key)

    def load_notice(self) -> str:
        """The organizer's newest notice, as JSON; empty where there is none that can be read."""
        try:
            with (self.path / "notice.json").open(encoding="utf-8") as file:
                return file.read(MOST_NOTICE)
        except (OSError, UnicodeDecodeError):
            return ""

    def save_notice(self, notice: str) -> None:
        """The coordinator and the peers tell it again, so a failure is only logged."""
        if notice:
            _note(self.path / "notice.json", notice)

    def load_announced(self) -> tuple[Announcement, ...]:
        """Announcements that were told here the last time; none where the note is damaged."""
        try:
            return _ANNOUNCED.validate_json((self.path / "announced.json").read_bytes())
        except (OSError, ValueError):
            return ()

    def save_announced(self, announcements: tuple[Announcement, ...]) -> None:
        """Without this note they are told once more, so a failure is only logged."""
        _note(self.path / "announced.json", _ANNOUNCED.dump_json(announcements).decode())

    @property
    def log(self) -> Path:
        return self.path / "volunteer.log"


def samples_given(run: str, folder: Path) -> int:
    """How many samples count of all peers of this run that have their files here, as they counted themselves.

    :param folder: what `KANTHA_HOME` was for them
    """
    return sum(_given(path.parent) for path in (folder / run[:16]).glob("*/given.json"))


def _given(folder: Path) -> int:
    try:
        note = json.loads((folder / "given.json").read_text(encoding="utf-8"))
        return int(note["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _note(path: Path, text: str) -> None:
    """Write a file that can be done without: whole, or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        _log.warning("%s: cannot be written (%s)", new, error.strerror)
