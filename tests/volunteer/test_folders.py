from pathlib import Path

import pytest

from kantha.errors import StorageError, SwarmError
from kantha.volunteer import folders
from kantha.volunteer.folders import PeerFolder, home, samples_given

RUN = "0f" * 32


def test_two_peers_of_one_name_have_identities_of_their_own() -> None:
    first, second = PeerFolder(RUN, "Asha"), PeerFolder(RUN, "Asha")
    assert first.path != second.path
    assert first.identity.peer_id != second.identity.peer_id
    assert first.run_folder == second.run_folder
    assert first.log != second.log


def test_who_comes_back_is_the_same_peer() -> None:
    first, second = PeerFolder(RUN, "Asha"), PeerFolder(RUN, "Asha")
    peer_id, path = first.identity.peer_id, first.path
    del first
    back = PeerFolder(RUN, "Asha")
    assert (back.path, back.identity.peer_id) == (path, peer_id)
    assert second.path != path


def test_runs_and_names_have_folders_of_their_own() -> None:
    paths = {PeerFolder(run, name).path for run in (RUN, "1e" * 32) for name in ("Asha", "Rafiq")}
    assert len(paths) == 4
    assert len({path.parent for path in paths}) == 2


@pytest.mark.parametrize(
    "name", ["..", ".", "../../etc", "/etc/passwd", "a/b", "", " ", "\n", "\x00", "-rf", "~", "আশা", "a" * 40, "💥"]
)
def test_any_name_is_a_folder_of_this_run(name: str) -> None:
    folder = PeerFolder(RUN, name)
    assert folder.path.resolve().parent == home().resolve() / RUN[:16]
    assert folder.path.is_dir()
    assert not folder.path.name.startswith(".")


def test_the_folders_are_where_the_user_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANTHA_HOME", str(tmp_path / "there"))
    assert PeerFolder(RUN, "Asha").path.is_relative_to(tmp_path / "there")
    monkeypatch.delenv("KANTHA_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert home() == tmp_path / "data" / "kantha"


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KANTHA_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="KANTHA_HOME") as caught:
        PeerFolder(RUN, "Asha")
    assert str(tmp_path / "file") in str(caught.value)


def test_there_is_a_limit_to_peers_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_SLOTS", 2)
    held = [PeerFolder(RUN, "Asha") for _ in range(2)]
    with pytest.raises(SwarmError, match="2 volunteers named Asha"):
        PeerFolder(RUN, "Asha")
    assert len({folder.path for folder in held}) == 2


def test_a_peer_remembers_what_it_has_given() -> None:
    folder = PeerFolder(RUN, "Asha")
    assert folder.load_given() == 0
    folder.save_given(64)
    other = PeerFolder(RUN, "Asha")  # the first is in use
    other.save_given(8)
    PeerFolder("b" * 64, "Asha").save_given(1_000)
    assert folder.load_given() == 64
    assert samples_given(RUN, home()) == 72
    (folder.path / "given.json").write_text('{"samples": "many"}')
    assert folder.load_given() == 0
