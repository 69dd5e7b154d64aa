"""The organizer decides on the command line."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from kantha.coordinator.admission import Admission
from kantha.coordinator.allowlist import Allowlist, Person, State
from kantha.coordinator.database import Database
from kantha.coordinator.rundir import RunDirectory
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MembershipRequest, Notice

Kantha = Callable[..., tuple[int, str, str]]  # the fixture


@pytest.fixture
def run(run_path: Path) -> RunDirectory:
    return RunDirectory.open(run_path)


@pytest.fixture
def allowlist(run: RunDirectory) -> Allowlist:
    """As a coordinator that serves the run has it open."""
    allowlist = Allowlist(Database(run.ledger))
    for name in ("asha", "mitu"):
        allowlist.sign_in(Person(name, name, "huggingface", ()))
        allowlist.ask(name)
    return allowlist


def last(out: str) -> str:
    return out.rstrip("\n").rsplit("\n", 1)[-1]


def test_people_are_shown_with_where_they_stand(kantha: Kantha, run_path: Path, allowlist: Allowlist) -> None:
    allowlist.decide(["mitu"], "ban", "mod", "spam")
    code, out, _ = kantha("members", run_path, "list")
    assert code == 0
    assert "⏳ asked      asha" in out
    assert "banned     mitu" in out
    assert "by mod: spam" in out
    assert last(out) == "2 people shown; in all: 1 asked, 1 banned"
    code, out, _ = kantha("members", run_path, "list", "--state", "asked")
    assert last(out).startswith("1 person shown")
    assert "mitu" not in out
    assert kantha("members", run_path, "list", "--state", "happy")[0] == 2


def test_a_running_coordinator_sees_a_decision_at_once(kantha: Kantha, run_path: Path, allowlist: Allowlist) -> None:
    assert kantha("members", run_path, "approve", "asha", "@Mitu", "rahim") == (
        0,
        "approved: 3 people (asha, mitu, rahim)\n",
        "",
    )
    assert allowlist.standing("rahim").state is State.APPROVED
    assert kantha("members", run_path, "refuse", "rahim", "--reason", "who?")[1] == "refused: 1 person (rahim)\n"
    kantha("members", run_path, "suspend", "asha", "--reason", "on holiday")
    kantha("members", run_path, "ban", "mitu", "--reason", "spam")
    assert [allowlist.standing(name).state for name in ("rahim", "asha", "mitu")] == ["refused", "suspended", "banned"]
    assert {each.by for each in allowlist.log() if each.action != "ask"} == {"the organizer"}
    out = kantha("members", run_path, "log")[1]
    assert "the organizer  ban  mitu: spam" in out
    assert last(out) == "8 decisions shown"


def test_a_ban_revokes_the_certificates_of_a_run_that_is_served(
    kantha: Kantha, run_path: Path, run: RunDirectory, identity: PeerIdentity
) -> None:
    database = Database(run.ledger)
    admission = Admission(database, run.spec, run.key(), "local", Allowlist(database))
    admission.admit(MembershipRequest.signed(identity, run.spec.fingerprint, username="asha", instance="a laptop"))
    out = kantha("members", run_path, "leases", "ASHA")[1]
    assert "asha  local  a laptop  since 20" in out
    assert identity.peer_id in out
    assert last(out) == "1 machine with a lease"
    assert Notice.model_validate_json(admission.notice()).revoked == {}
    kantha("members", run_path, "ban", "asha", "--reason", "spam")
    assert len(Notice.model_validate_json(admission.notice()).revoked) == 1
    assert last(kantha("members", run_path, "leases")[1]) == "0 machines with a lease"
    assert kantha("members", run_path, "leases", "nobody")[0] == 24


def test_names_come_from_a_list_or_stdin(
    kantha: Kantha, run_path: Path, allowlist: Allowlist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "list.csv").write_text("name,username\nSima,sima\nRahim,@rahim\n", encoding="utf-8")
    assert "4 people" not in kantha("members", run_path, "approve", "--from", tmp_path / "list.csv")[1]
    assert allowlist.standing("rahim").state is State.APPROVED
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"karim\n")))
    assert kantha("members", run_path, "approve", "--from", "-")[1] == "approved: 1 person (karim)\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"asha\nno name\n", "line 2"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a\n" * 2**20, "larger than"),
        (None, "cannot be read"),
    ],
    ids=["no name", "no text", "too long", "no file"],
)
def test_a_list_that_cannot_be_used_changes_nothing(
    kantha: Kantha, run_path: Path, allowlist: Allowlist, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    code, _, error = kantha("members", run_path, "approve", "--from", tmp_path / "list")
    assert code == 24
    assert reason in error
    assert len(error.splitlines()) == 1
    assert allowlist.standing("asha").state is State.ASKED


def test_a_command_without_names_or_without_a_reason_is_refused(
    kantha: Kantha, run_path: Path, allowlist: Allowlist
) -> None:
    assert kantha("members", run_path, "approve")[0] == 2
    assert kantha("members", run_path, "ban", "asha")[0] == 2
    assert kantha("members", run_path, "ban", "asha", "--reason", " ")[0] == 24
    assert allowlist.standing("asha").state is State.ASKED


def test_moderators_and_rules(kantha: Kantha, run_path: Path, allowlist: Allowlist) -> None:
    assert kantha("members", run_path, "moderator", "asha")[1] == "asha is a moderator\n"
    assert allowlist.is_moderator("asha")
    assert "moderator" in kantha("members", run_path, "list")[1]
    kantha("members", run_path, "moderator", "asha", "--remove")
    assert not allowlist.is_moderator("asha")
    assert last(kantha("members", run_path, "rule", "bengal")[1]).endswith("members of bengal")
    assert allowlist.rules() == ["bengal"]
    assert last(kantha("members", run_path, "rule", "bengal", "--remove")[1]).endswith("members of no organisation")
    assert kantha("members", run_path, "rule", "no such/name")[0] == 24


def test_a_folder_that_is_no_run_is_told(kantha: Kantha, tmp_path: Path) -> None:
    code, _, error = kantha("members", tmp_path, "list")
    assert code == 11
    assert "no run here" in error


def test_the_key_is_changed(kantha: Kantha, run_path: Path, run: RunDirectory) -> None:
    before = run.key().public_key
    code, out, _ = kantha("rotate-key", run_path)
    assert code == 0
    assert run.key().public_key != before
    assert run.key().public_key in out
    assert "PRIVATE" not in out


def test_somebody_who_asks_for_it_is_forgotten(kantha: Kantha, run_path: Path, allowlist: Allowlist) -> None:
    allowlist.decide(["asha"], "ban", "mod", "spam")
    code, out, _ = kantha("members", run_path, "forget", "Asha", "--yes")
    assert code == 0
    assert "forgotten" in out
    assert allowlist.account("asha") is None
    code, out, _ = kantha("members", run_path, "list")
    assert "asha" not in out
    assert last(out).startswith("1 person shown")
    again = Allowlist(allowlist._database, accounts_key=RunDirectory.open(run_path).accounts_key())
    assert again.sign_in(Person("asha", "asha", "huggingface", ())).state is State.BANNED
    assert kantha("members", run_path, "forget", "nobody", "--yes")[0] == 24
