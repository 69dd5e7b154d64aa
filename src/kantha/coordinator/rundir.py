"""A run on the coordinator's disk.

run.json          format, fingerprint, the swarm's port; its presence makes the folder a run
run.yaml          the frozen run spec
tokenizer.json    trained when the run was created, or before; its digest is in the spec
keys/             (owner only)
  run.pem         the run's Ed25519 key, signs membership certificates; run-1.pem … were it before `kantha rotate-key`
  changes.json    which key followed which, each change signed by the key before
  peer.key        the coordinator's libp2p identity
  session.key     signs the sessions of browsers; made when it is first served with sign-in
  accounts.key    hides which accounts were kept out when their owners left for good; made when it is first served
  oauth.json      the organizer's: under which client Hugging Face knows this run
  notify.txt      the organizer's: which chats are told of those who ask to join
order.json        the organizer's last order, signed by the run's key: to anneal
ledger.sqlite     people and decisions about them, machines and leases, what each did in each round (owner only)
ledger.elsewhere  in its place, where they are in PostgreSQL
checkpoints/      round-*/, newest last
swarm/            snapshots for peers that join
log/              what hivemind says, and what the evaluator's process does
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kantha.corpus import check_tokenizer, read_tokenizer, save_tokenizer, train_tokenizer
from kantha.digests import FileDigest, check_file, digest_of
from kantha.errors import NewerRunError, OrderError, RunDirectoryError, SpecError, StorageError
from kantha.spec import RunSpec, ScheduleState, dump_spec, load_spec
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import KeyChange, RunKey, Trust
from kantha.swarm.orders import Order, read_order
from kantha.training import Replica
from kantha.training.checkpoint import SPEC_FILE, TOKENIZER_FILE, checkpoint_folder

RUN_FILE = "run.json"
LEDGER_FILE = "ledger.sqlite"
ORDER_FILE = "order.json"
CHANGES_FILE = "changes.json"
FORMAT = 5  # 1 had no lineage, and other rounds; 2 to 4 had other specs
_KEY = "run.pem"
_NEXT_KEY = "run-next.pem"  # drawn, and not in its place yet
_MOST_CHANGES = 100  # of the key: a notice has all of them
_CHANGES = TypeAdapter(list[KeyChange])
_BEGINNING = ScheduleState()
_SECRET_BYTES = 32
_LOCK_SECONDS = 5.0  # the children of a coordinator that was killed hold the lock until they have died, too


class _RunFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: int
    fingerprint: str
    p2p_port: int | None = Field(None, description="TCP port of the swarm, chosen when the run is first served.")


class RunDirectory:
    """An existing run; `open` checks it, `create` makes one."""

    def __init__(self, path: Path, spec: RunSpec, file: _RunFile) -> None:
        self.path = path
        self.spec = spec
        self._file = file
        self.tokenizer = path / TOKENIZER_FILE
        self.keys = path / "keys"
        self.checkpoints = path / "checkpoints"
        self.ledger = path / LEDGER_FILE
        self.elsewhere = path / "ledger.elsewhere"
        self.order = path / ORDER_FILE
        self.log = path / "log" / "coordinator.log"
        self._lock = FileLock(path / ".lock", timeout=_LOCK_SECONDS)

    @classmethod
    def create(
        cls, path: Path, spec: RunSpec, say: Callable[[str], None], tokenizer: Path | None = None
    ) -> "RunDirectory":
        """Make a run: train its tokenizer, freeze its spec, draw its keys and its first weights.

        `say` is told in a sentence what happens. The folder appears only when it is whole.

        :param tokenizer: a file to take instead of training one. Raises `TokenizerError` if it does not fit the spec
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunDirectoryError(f"{path}: exists already and is not empty; choose another folder for the run")
        if path.resolve() == Path.cwd():  # it would be replaced under the feet of the shell
            raise RunDirectoryError(f"{path}: is the folder you are in; name another one, which is made")
        made = None
        if tokenizer is not None:
            made = read_tokenizer(tokenizer)
            check_tokenizer(made, spec, tokenizer)
        partial = path.with_name(f".partial-{path.name}")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "keys").mkdir(parents=True, mode=0o700)
            if made is None:
                say(f"training the tokenizer on up to {spec.tokenizer.training_documents:,} documents …")
                made = train_tokenizer(spec, say)
            digest = save_tokenizer(made, partial / TOKENIZER_FILE)
            spec = spec.model_copy(update={"tokenizer": spec.tokenizer.model_copy(update={"sha256": digest})})
            (partial / SPEC_FILE).write_text(dump_spec(spec), encoding="utf-8")
            RunKey.generate(partial / "keys" / _KEY)
            PeerIdentity(partial / "keys" / "peer.key")
            say("drawing the first weights …")
            run = cls(partial, spec, _RunFile(format=FORMAT, fingerprint=spec.fingerprint))
            run.save_checkpoint(Replica(spec), 0)
            run._write()
            if path.exists():
                path.rmdir()
            partial.rename(path)
        except OSError as error:
            raise StorageError(
                f"{path}: the run could not be written ({error}); make room, or choose another folder"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Read and check a run. Raises `RunDirectoryError`, `NewerRunError` or `DigestError`."""
        try:
            content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
            if isinstance(content, dict) and isinstance(content.get("format"), int) and content["format"] > FORMAT:
                raise NewerRunError(
                    f"{path}: written by a newer Kantha (format {content['format']}, this one reads {FORMAT}); "
                    "update with `pip install --upgrade kantha`"
                )
            file = _RunFile.model_validate(content)
            if file.format < FORMAT:
                raise RunDirectoryError(
                    f"{path}: written by an older Kantha (format {file.format}, this one reads {FORMAT}); "
                    "`kantha export` its model with that version, or `kantha create` a new run"
                )
        except FileNotFoundError:
            raise RunDirectoryError(
                f"{path}: no run here; `kantha init run.yaml` and `kantha create run.yaml {path}` make one"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
            raise RunDirectoryError(
                f"{path / 'run.json'}: damaged ({str(error).splitlines()[0]}); restore it from a copy"
            ) from None
        try:
            spec = load_spec(path / SPEC_FILE)
        except SpecError as error:
            raise RunDirectoryError(f"{str(error).splitlines()[0]}; restore it from a copy") from None
        if spec.fingerprint != file.fingerprint:
            raise RunDirectoryError(
                f"{path / SPEC_FILE}: was changed after the run was created; "
                "restore it, or `kantha create` a new run from the changed spec"
            )
        run = cls(path, spec, file)
        try:
            check_file(run.tokenizer, run.tokenizer_digest())
        except OSError as error:
            raise RunDirectoryError(
                f"{run.tokenizer}: cannot be read ({error.strerror}); restore it from a copy"
            ) from None
        return run

    @property
    def identity(self) -> PeerIdentity:
        return PeerIdentity(self.keys / "peer.key")

    def key(self) -> RunKey:
        """The run's newest. Raises `RunDirectoryError`."""
        changes = self.key_changes()
        if not changes:
            return self._load_key(_KEY)
        # A change counts once it is signed. Before or while the files are renamed, the key has one name or the other.
        for name in (_KEY, _NEXT_KEY, _KEY):
            with suppress(FileNotFoundError):
                key = self._load_key(name)
                if key.public_key == changes[-1].new:
                    return key
        raise RunDirectoryError(f"{self.keys}: no key is the one that {CHANGES_FILE} names; restore it from a copy")

    def key_changes(self) -> list[KeyChange]:
        """Of the run's key, oldest first. Raises `RunDirectoryError`."""
        path = self.keys / CHANGES_FILE
        try:
            changes = _CHANGES.validate_json(path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            raise RunDirectoryError(
                f"{path}: cannot be used ({str(error).splitlines()[0]}); restore it from a copy"
            ) from None
        follow = all(before.new == after.old for before, after in pairwise(changes))
        if not follow or not all(change.is_genuine(self.spec.fingerprint) for change in changes):
            raise RunDirectoryError(f"{path}: is not the run's; restore it from a copy")
        return changes

    def key_changed(self) -> float:
        """When the key was changed last, seconds since 1970; 0: never."""
        try:
            return (self.keys / CHANGES_FILE).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def rotate_key(self) -> KeyChange:
        """Draw a new key for the run; the old one confirms it. Raises `RunDirectoryError` or `StorageError`.

        The change is done when keys/changes.json has it. Whatever is killed before or after leaves a run whose `key`
        is the one that file names.
        """
        try:
            with FileLock(self.keys / ".lock", timeout=_LOCK_SECONDS):
                self._finish_rotation()
                changes = self.key_changes()
                if len(changes) >= _MOST_CHANGES:
                    raise RunDirectoryError(f"{self.path}: its key was changed {len(changes)} times; create a new run")
                change = self.key().change_to(RunKey.generate(self.keys / _NEXT_KEY).public_key, self.spec.fingerprint)
                with (self.keys / _NEXT_KEY).open("rb") as drawn:
                    os.fsync(drawn.fileno())
                self._write_whole(f"keys/{CHANGES_FILE}", _CHANGES.dump_json([*changes, change], indent=1).decode())
                self._finish_rotation()
        except Timeout:
            raise RunDirectoryError(f"{self.path}: another program changes the run's key; wait for it") from None
        except OSError as error:
            raise self._refused("keys", error) from None
        return change

    def _finish_rotation(self) -> None:
        """Rename the key files as keys/changes.json has it, or drop a key that did not get so far."""
        fresh, current = self.keys / _NEXT_KEY, self.keys / _KEY
        if not fresh.exists():
            return
        changes = self.key_changes()
        if not changes or self._load_key(_NEXT_KEY).public_key != changes[-1].new:
            fresh.unlink()
            return
        old = self.keys / f"run-{len(changes)}.pem"
        if not old.exists():
            os.link(current, old)  # run.pem itself is there at every moment
        fresh.replace(current)

    def _load_key(self, name: str) -> RunKey:
        try:
            return RunKey.load(self.keys / name)
        except (OSError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and name == _NEXT_KEY:
                raise
            raise RunDirectoryError(f"{self.keys / name}: cannot be used ({error}); restore it from a copy") from None

    def accounts_key(self) -> bytes:
        """Of the hashes of accounts, for `Allowlist`. Raises `RunDirectoryError`."""
        path = self.keys / "accounts.key"
        return bytes.fromhex(kept_secret(path, "who was kept out and left for good could come back"))

    @property
    def p2p_port(self) -> int | None:
        return self._file.p2p_port

    def set_p2p_port(self, port: int) -> None:
        """Keep the swarm's port, so that volunteers find the coordinator again after a restart.

        Raises `StorageError`.
        """
        if port != self._file.p2p_port:
            self._file.p2p_port = port
            try:
                self._write()
            except OSError as error:
                raise self._refused(RUN_FILE, error) from None

    def tokenizer_digest(self) -> FileDigest:
        found = digest_of(self.tokenizer)
        return found.model_copy(update={"sha256": self.spec.tokenizer.sha256 or found.sha256})

    def give_order(self, order: Order) -> None:
        """For the coordinator to take up, now or when it starts. Raises `StorageError`."""
        try:
            self._write_whole(ORDER_FILE, order.model_dump_json())
        except OSError as error:
            raise self._refused(ORDER_FILE, error) from None

    def read_order(self) -> str | None:
        """The organizer's last order, signed by the run's key; None: none was given. Raises `OrderError`."""
        try:
            text = self.order.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise OrderError(f"{self.order}: cannot be read ({error}); give it again with `kantha anneal`") from None
        key = self.key()
        for change in self.key_changes():
            with suppress(OrderError):  # by a key that was the run's when it was given
                order = read_order(text, Trust(self.spec.fingerprint, change.old))
                return order.signed_again(key).model_dump_json()
        read_order(text, Trust(self.spec.fingerprint, key.public_key))
        return text

    def save_checkpoint(
        self, replica: Replica, round_number: int, lineage: str = "", schedule: ScheduleState = _BEGINNING
    ) -> Path:
        """Raises `StorageError`; the checkpoints before are untouched then."""
        folder = checkpoint_folder(self.checkpoints, round_number)
        replica.save(
            folder,
            round_number,
            lineage,
            {SPEC_FILE: dump_spec(self.spec).encode(), TOKENIZER_FILE: self.tokenizer.read_bytes()},
            schedule=schedule,
        )
        return folder

    def lock(self) -> None:
        """Make sure that no other program serves this run. Raises `RunDirectoryError` or `StorageError`."""
        try:
            self._lock.acquire()
        except Timeout:
            raise RunDirectoryError(f"{self.path}: another `kantha serve` has this run open; stop it first") from None
        except OSError as error:
            raise self._refused(".lock", error) from None

    def _refused(self, name: str, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path}: {name} cannot be written ({error.strerror}); make room on that disk, or make it writable"
        )

    def _write(self) -> None:
        self._write_whole(RUN_FILE, self._file.model_dump_json(indent=1))

    def _write_whole(self, name: str, text: str) -> None:
        """Whole or not at all, even where the machine loses power."""
        partial = (self.path / name).with_name(f".{Path(name).name}")
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / name)


def kept_secret(path: Path, loses: str) -> str:
    """A secret in a file that only its owner can read, as hexadecimal digits; made when it is first needed.

    :param loses: what happens when it is made anew
    :raises RunDirectoryError: where it cannot be used
    """
    try:
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            partial.touch(mode=0o600, exist_ok=False)
            partial.write_text(secrets.token_hex(_SECRET_BYTES), encoding="ascii")
            partial.rename(path)
        is_open = path.stat().st_mode & 0o077
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{path}: cannot be used ({type(error).__name__}); make the folder writable") from None
    if is_open or not re.fullmatch(f"[0-9a-f]{{{2 * _SECRET_BYTES}}}", secret):
        problem = "other users of this machine can read it" if is_open else "damaged"
        raise RunDirectoryError(f"{path}: {problem}; delete it, it is made anew and {loses}")
    return secret
