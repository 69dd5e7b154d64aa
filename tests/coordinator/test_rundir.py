import contextlib
import errno
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kantha.coordinator import rundir
from kantha.coordinator.rundir import RunDirectory
from kantha.corpus import load_tokenizer
from kantha.errors import (
    CorpusError,
    DigestError,
    KanthaError,
    NewerRunError,
    OrderError,
    RunDirectoryError,
    StorageError,
)
from kantha.spec import RunSpec, dump_spec, parse_spec
from kantha.swarm.membership import RunKey, Trust
from kantha.swarm.orders import Order, read_order
from kantha.training import Replica
from kantha.training.checkpoint import list_checkpoints, read_manifest


def silent(_: str) -> None:
    pass


def change_run_file(path: Path, **changes: object) -> None:
    file = path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


def without(spec: RunSpec, **changes: Any) -> RunSpec:
    return spec.model_copy(update={"data": spec.data.model_copy(update=changes)})


# ---- making one


def test_a_created_run_can_be_opened(tiny_run: RunDirectory, tiny_spec: RunSpec) -> None:
    run = RunDirectory.open(tiny_run.path)
    assert run.spec.tokenizer.sha256 is not None
    unfrozen = run.spec.model_copy(update={"tokenizer": tiny_spec.tokenizer})
    assert unfrozen == tiny_spec
    tokenizer = load_tokenizer(run.tokenizer, run.spec.tokenizer.sha256)
    assert tokenizer.encode("লাল কাঁথা").ids
    assert run.p2p_port is None
    assert run.tokenizer_digest().matches(run.tokenizer)


def test_a_created_run_starts_with_the_weights_that_its_seed_draws(tiny_run: RunDirectory) -> None:
    [folder] = list_checkpoints(tiny_run.checkpoints)
    first, loaded = Replica(tiny_run.spec), Replica(tiny_run.spec.model_copy())
    with torch.no_grad():
        for parameter in loaded.parameters:
            parameter.zero_()
    loaded.load(folder)
    assert loaded.round == 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, loaded.parameters, strict=True))
    assert {"run.yaml", "tokenizer.json"} <= read_manifest(folder).files.keys()


def test_the_keys_of_a_run_are_its_owners_alone(tiny_spec: RunSpec, tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        run = RunDirectory.create(tmp_path / "run", tiny_spec, silent)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((run.path / "keys").stat().st_mode) == 0o700
    for name in ("run.pem", "peer.key"):
        assert stat.S_IMODE((run.path / "keys" / name).stat().st_mode) & 0o077 == 0
    assert run.key().public_key == RunKey.load(run.path / "keys" / "run.pem").public_key


def test_the_same_spec_gives_the_same_run_with_other_keys(
    tiny_run: RunDirectory, tiny_spec: RunSpec, tmp_path: Path
) -> None:
    again = RunDirectory.create(tmp_path / "again", tiny_spec, silent)
    assert again.spec.fingerprint == tiny_run.spec.fingerprint
    assert again.tokenizer.read_bytes() == tiny_run.tokenizer.read_bytes()
    assert again.key().public_key != tiny_run.key().public_key
    assert again.identity.peer_id != tiny_run.identity.peer_id


def test_a_run_is_made_in_an_empty_folder(tiny_spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert RunDirectory.create(Path("empty"), tiny_spec, silent).spec.name == "tiny"


def test_a_run_is_made_in_the_current_folder_or_refused(
    tiny_spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with contextlib.suppress(KanthaError):  # refusing is all right, if it is said
        RunDirectory.create(Path(), tiny_spec, silent)
        assert RunDirectory.open(tmp_path / "here").spec.name == "tiny"


def test_what_is_there_already_is_not_overwritten(tiny_spec: RunSpec, tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    file.write_text("years of work")
    for path in (folder, file):
        with pytest.raises(RunDirectoryError, match="choose another folder") as caught:
            RunDirectory.create(path, tiny_spec, silent)
        assert caught.value.exit_code == 11
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}
    assert (folder / "thesis.txt").read_text() == file.read_text() == "years of work"


def test_a_creation_that_is_broken_off_leaves_nothing(tiny_spec: RunSpec, tmp_path: Path) -> None:
    said: list[str] = []

    def break_off(line: str) -> None:
        said.append(line)
        if "first weights" in line:  # the tokenizer is trained, the spec is written, the keys are drawn
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunDirectory.create(tmp_path / "run", tiny_spec, break_off)
    assert list(tmp_path.iterdir()) == []


def test_a_creation_without_text_leaves_nothing(tiny_spec: RunSpec, tmp_path: Path) -> None:
    missing = tiny_spec.data.sources[0].model_copy(update={"path": str(tmp_path / "none.txt")})
    with pytest.raises(CorpusError, match=r"none\.txt"):
        RunDirectory.create(tmp_path / "run", without(tiny_spec, sources=(missing,)), silent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("addition", ["services: {}", "goal: 'a\\nb'", "model: {hidden_size: 16, attention_heads: 2}"])
def test_a_spec_that_is_accepted_gives_a_run_that_opens(tiny_spec: RunSpec, tmp_path: Path, addition: str) -> None:
    source = f"data: {{sources: [{{kind: file, path: {tiny_spec.data.sources[0].path}}}], sequence_length: 32}}\n"  # type: ignore[union-attr]
    text = f"name: x\n{source}tokenizer: {{vocab_size: 200}}\n{addition}\n"
    if "model" not in addition:
        text += "model: {hidden_size: 16, attention_heads: 2}\n"
    spec = parse_spec(text, "run.yaml")
    run = RunDirectory.create(tmp_path / "run", spec, silent)
    assert run.spec.services == spec.services
    assert run.spec.goal == spec.goal


def test_an_unknown_activation_is_told_and_leaves_nothing(tiny_spec: RunSpec, tmp_path: Path) -> None:
    text = dump_spec(tiny_spec).replace("activation: gelu_new", "activation: gelu_newer")
    with pytest.raises(KanthaError, match="gelu_newer"):
        RunDirectory.create(tmp_path / "run", parse_spec(text, "run.yaml"), silent)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told(tiny_spec: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        RunDirectory.create(tmp_path / "file" / "run", tiny_spec, silent)
    assert caught.value.exit_code == 16


# ---- opening one


def test_where_no_run_is_the_commands_that_make_one_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(RunDirectoryError, match="kantha create") as caught:
            RunDirectory.open(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert caught.value.exit_code == 11


@pytest.mark.parametrize("changes", [{}, {"invented": "later"}])
def test_a_run_of_a_newer_kantha_is_refused_before_anything_else(run_path: Path, changes: dict[str, object]) -> None:
    change_run_file(run_path, format=rundir.FORMAT + 1, **changes)
    (run_path / "run.yaml").unlink()
    with pytest.raises(NewerRunError, match="pip install --upgrade") as caught:
        RunDirectory.open(run_path)
    assert caught.value.exit_code == 12


def test_a_run_of_an_older_kantha_is_refused_with_what_is_left_to_do(run_path: Path) -> None:
    change_run_file(run_path, format=1)
    with pytest.raises(RunDirectoryError, match=r"older Kantha.*kantha export") as caught:
        RunDirectory.open(run_path)
    assert str(caught.value).startswith(f"{run_path}: ")
    assert caught.value.exit_code == 11
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"format": 1}', b"\xff\xfe", b'{"format": "x"}'])
def test_a_damaged_run_file_is_told_by_its_path(run_path: Path, content: bytes) -> None:
    (run_path / "run.json").write_bytes(content)
    with pytest.raises(RunDirectoryError, match="damaged") as caught:
        RunDirectory.open(run_path)
    assert str(caught.value).startswith(f"{run_path / 'run.json'}: ")
    assert caught.value.exit_code == 11
    assert len(str(caught.value).splitlines()) == 1


def test_an_edited_spec_is_refused(run_path: Path) -> None:
    file = run_path / "run.yaml"
    text = file.read_text(encoding="utf-8")
    file.write_text(f"{text}\n# a comment changes nothing\n", encoding="utf-8")
    RunDirectory.open(run_path)
    file.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="was changed") as caught:
        RunDirectory.open(run_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda file: file.write_text("name: ["), lambda file: file.write_text("")]
)
def test_a_damaged_spec_is_a_matter_of_the_run(run_path: Path, damage: Callable[[Path], object]) -> None:
    damage(run_path / "run.yaml")
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.open(run_path)
    assert str(run_path / "run.yaml") in str(caught.value)


def test_another_tokenizer_is_refused(run_path: Path) -> None:
    with (run_path / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DigestError) as caught:
        RunDirectory.open(run_path)
    assert str(caught.value).startswith(f"{run_path / 'tokenizer.json'}: ")


def test_a_missing_tokenizer_is_told_by_its_path(run_path: Path) -> None:
    (run_path / "tokenizer.json").unlink()
    with pytest.raises((DigestError, RunDirectoryError)) as caught:
        RunDirectory.open(run_path)
    assert str(run_path / "tokenizer.json") in str(caught.value)


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"garbage")])
def test_a_damaged_key_is_told_by_its_path(run_path: Path, damage: Callable[[Path], object]) -> None:
    damage(run_path / "keys" / "run.pem")
    with pytest.raises(RunDirectoryError, match="restore it") as caught:
        RunDirectory.open(run_path).key()
    assert str(run_path / "keys" / "run.pem") in str(caught.value)


def test_the_swarms_port_is_kept(run_path: Path) -> None:
    RunDirectory.open(run_path).set_p2p_port(4711)
    assert RunDirectory.open(run_path).p2p_port == 4711


def test_the_run_file_is_written_only_when_it_changes(run_path: Path) -> None:
    run = RunDirectory.open(run_path)
    run.set_p2p_port(4711)
    written = (run_path / "run.json").stat()
    run.set_p2p_port(4711)
    assert (run_path / "run.json").stat() == written
    assert not (run_path / ".run.json").exists()


def test_a_run_on_a_disk_that_refuses_is_told(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = RunDirectory.open(run_path)
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(run._lock, "_acquire", refuse)
    for write in (lambda: run.set_p2p_port(4711), run.lock):
        with pytest.raises(StorageError, match="No space left on device"):
            write()
    assert RunDirectory.open(run_path).p2p_port is None


def test_a_run_may_be_moved(run_path: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(run_path.rename(tmp_path / "elsewhere"))
    run.save_checkpoint(Replica(run.spec), 3)
    assert [read_manifest(folder).round for folder in list_checkpoints(tmp_path / "elsewhere" / "checkpoints")] == [
        3,
        0,
    ]


# ---- one program at a time


def test_a_run_is_served_once(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_LOCK_SECONDS", 0.1)
    (run_path / ".lock").touch()  # left behind by a program that was killed
    first, second = RunDirectory.open(run_path), RunDirectory.open(run_path)
    first.lock()
    with pytest.raises(RunDirectoryError, match="another `kantha serve`") as caught:
        second.lock()
    assert caught.value.exit_code == 11
    del first
    second.lock()


def test_the_lock_of_a_coordinator_that_is_dying_is_waited_for(run_path: Path) -> None:
    dying, restarted = RunDirectory.open(run_path), RunDirectory.open(run_path)
    locked = threading.Event()

    def die() -> None:
        dying.lock()
        locked.set()
        time.sleep(0.3)
        dying._lock.release()

    thread = threading.Thread(target=die)
    thread.start()
    assert locked.wait(10)
    restarted.lock()
    thread.join()


# ---- another key


def kill_at(monkeypatch: pytest.MonkeyPatch, where: object, name: str, after: bool) -> None:
    """The program ends just before, or just after it did this."""
    real = getattr(where, name)

    def killed(*arguments: object) -> None:
        if after:
            real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, killed)


def test_a_run_gets_another_key_which_the_old_one_confirms(run_path: Path) -> None:
    run = RunDirectory.open(run_path)
    keys = [run.key().public_key]
    assert run.key_changes() == []
    assert run.key_changed() == 0.0
    for number in (1, 2):
        change = run.rotate_key()
        keys.append(run.key().public_key)
        assert (change.old, change.new) == tuple(keys[-2:])
        kept = run_path / "keys" / f"run-{number}.pem"
        assert RunKey.load(kept).public_key == keys[-2]
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE((run_path / "keys" / "run.pem").stat().st_mode) == 0o600
    assert len(set(keys)) == 3
    assert [change.new for change in run.key_changes()] == keys[1:]
    assert run.key_changed() > 0
    trust = Trust(run.spec.fingerprint, keys[0])
    assert trust.take(run.key().notify(run.spec.fingerprint, {}, run.key_changes()).model_dump_json())
    assert trust.run_key == keys[2]
    assert "PRIVATE" not in (run_path / "keys" / "changes.json").read_text()


@pytest.mark.parametrize(
    ("where", "name", "after", "is_changed"),
    [
        (RunKey, "generate", False, False),
        (RunKey, "generate", True, False),
        (RunDirectory, "_write_whole", False, False),
        (RunDirectory, "_write_whole", True, True),
        (os, "link", False, True),
        (os, "link", True, True),
        (Path, "replace", True, True),
    ],
)
def test_a_change_of_the_key_that_is_killed_leaves_a_run_that_works(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, name: str, after: bool, is_changed: bool
) -> None:
    run = RunDirectory.open(run_path)
    before = run.key().public_key
    with monkeypatch.context() as patch:
        kill_at(patch, where, name, after)
        with pytest.raises(KeyboardInterrupt):
            run.rotate_key()
    run = RunDirectory.open(run_path)
    now = run.key().public_key
    assert (now != before) == is_changed
    assert [change.new for change in run.key_changes()] == ([now] if is_changed else [])
    # and it can be changed again
    change = run.rotate_key()
    assert (change.old, change.new) == (now, run.key().public_key)
    assert not (run_path / "keys" / "run-next.pem").exists()
    olds = [before, now] if is_changed else [before]
    kept = [RunKey.load(run_path / "keys" / f"run-{number}.pem") for number in range(1, len(olds) + 1)]
    assert [key.public_key for key in kept] == olds


def test_an_order_from_before_the_change_is_the_same_order_by_the_new_key(run_path: Path) -> None:
    run = RunDirectory.open(run_path)
    given = Order.signed(run.key(), run.spec.fingerprint, 100)
    run.give_order(given)
    for _ in range(2):
        run.rotate_key()
    text = run.read_order()
    assert text is not None
    order = read_order(text, Trust(run.spec.fingerprint, run.key().public_key))
    assert (order.number, order.anneal_samples) == (given.number, 100)


def test_an_order_by_a_strangers_key_is_none_after_a_change_either(run_path: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(run_path)
    run.rotate_key()
    run.give_order(Order.signed(RunKey.generate(tmp_path / "stranger.pem"), run.spec.fingerprint, 100))
    with pytest.raises(OrderError, match="not signed"):
        run.read_order()


@pytest.mark.parametrize("text", ["[]x", "[{}]", '{"a": 1}'])
def test_a_damaged_list_of_changes_is_told(run_path: Path, text: str) -> None:
    (run_path / "keys" / "changes.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"changes\.json: cannot be used"):
        RunDirectory.open(run_path).key()


def test_a_change_that_the_old_key_did_not_sign_is_told(run_path: Path, tmp_path: Path) -> None:
    run = RunDirectory.open(run_path)
    change = run.rotate_key()
    forged = change.model_copy(update={"new": RunKey.generate(tmp_path / "stranger.pem").public_key})
    (run_path / "keys" / "changes.json").write_text(f"[{forged.model_dump_json()}]")
    with pytest.raises(RunDirectoryError, match="not the run's"):
        run.key()
