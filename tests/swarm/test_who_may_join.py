"""Who may take part, with real processes: one instance on a service, bans, a new key, a coordinator that is away."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import Command, Run, served, small_run, wait_for

from kantha.coordinator.rundir import RunDirectory
from kantha.errors import LeaseError, MembershipError
from kantha.swarm.identity import PeerIdentity

pytestmark = [pytest.mark.swarm, pytest.mark.slow, pytest.mark.timeout(600)]

KAGGLE, COLAB = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, {"COLAB_RELEASE_TAG": "release-colab"}
HOSTILE = Path(__file__).with_name("hostile.py")
LEASE_SECONDS = 180  # after which the place of one that was killed is free
REVOKED_SECONDS = 120  # in which a ban reaches everybody


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with served(tmp_path, small_run(tmp_path)) as run:
        yield run


def ended(command: Command, seconds: float) -> int:
    """Its exit code."""
    wait_for(lambda: command.process.poll() is not None, seconds, f"{command.name} ends\n{command.output()}")
    return int(command.process.returncode)


def trains(command: Command, seconds: float, story: str = "") -> None:
    wait_for(
        lambda: "samples of mine" in command.output(), seconds, f"{command.name} trains\n{command.output()}{story}"
    )


def members(run: Run, *arguments: str) -> str:
    """`kantha members`."""
    command = run.start(f"organizer-{len(run.commands)}", "members", str(run.run_dir), *arguments)
    assert ended(command, 60) == 0, command.output()
    return command.output()


def test_a_member_has_one_place_on_each_service(run: Run) -> None:
    run.serve()
    first = run.join("Asha", label="kaggle-1", env=KAGGLE)
    trains(first, 90)
    second = run.join("Asha", label="kaggle-2", env=KAGGLE)
    assert ended(second, 60) == LeaseError.exit_code
    assert "Kaggle notebook" in second.output()
    assert "--take-over" in second.output()
    assert "Traceback" not in second.output()
    colab = run.join("Asha", label="colab", env=COLAB)  # side by side
    trains(colab, 90)
    assert first.process.poll() is None

    first.kill()  # as a notebook that is killed: nobody says goodbye
    killed = time.monotonic()
    third = run.join("Asha", label="kaggle-3-0", env=KAGGLE)
    for attempt in range(1, 100):
        wait_for(lambda c=third: c.process.poll() is not None or "samples of mine" in c.output(), 90, third.output())
        if third.process.poll() is None:
            break
        assert third.process.returncode == LeaseError.exit_code, third.output()
        assert time.monotonic() - killed < LEASE_SECONDS + 20, "its place is not free"  # the time of a start
        third = run.join("Asha", label=f"kaggle-3-{attempt}", env=KAGGLE)
    trains(third, 10)

    fourth = run.join("Asha", "--take-over", label="kaggle-4", env=KAGGLE)
    trains(fourth, 90, run.story())
    assert ended(third, 90) == LeaseError.exit_code
    assert colab.process.poll() is None
    assert fourth.process.poll() is None


def test_who_is_banned_is_out_and_stays_out(run: Run) -> None:
    coordinator = run.serve()
    port = int(run.url.rsplit(":", 1)[1])
    asha, rafiq = run.join("Asha"), run.join("Rafiq")
    run.wait_for_volunteer("Rafiq", 90)
    run.wait_for_volunteer("Asha", 60)
    members(run, "ban", "Rafiq", "--reason", "sends noise")
    assert ended(rafiq, REVOKED_SECONDS) == MembershipError.exit_code
    assert "sends noise" in rafiq.output()
    coordinator.kill()
    run.serve(port)
    again = run.join("Rafiq", label="Rafiq-again")
    assert ended(again, 60) == MembershipError.exit_code
    assert "sends noise" in again.output()
    assert asha.process.poll() is None
    members(run, "approve", "Rafiq")
    trains(run.join("Rafiq", label="Rafiq-forgiven"), 90)


def test_members_train_on_and_refuse_strangers_while_the_coordinator_is_away(run: Run, tmp_path: Path) -> None:
    coordinator = run.serve()
    port = int(run.url.rsplit(":", 1)[1])
    asha, rafiq = run.join("Asha"), run.join("Rafiq")
    run.wait_for_volunteer("Asha", 90)
    run.wait_for_volunteer("Rafiq", 60)
    coordinator.kill()
    said = asha.output().count("\nround ")
    wait_for(lambda: asha.output().count("\nround ") >= said + 2, 120, f"they train on\n{run.story()}")
    heard = knock(asha, run, tmp_path / "stranger")
    assert heard.pop("greet the DHT")["refused"]
    assert heard
    for call, result in heard.items():
        assert "MembershipError" in result.get("refused", ""), (call, result)
    run.serve(port)
    wait_for(
        lambda: (s := run.status()) and {v.name for v in s.volunteers} == {"Asha", "Rafiq"}, 60, f"both\n{run.story()}"
    )
    mitu = run.join("Mitu")
    trains(mitu, 90, run.story())
    assert asha.process.poll() is None
    assert rafiq.process.poll() is None


def test_the_run_s_key_is_replaced_while_the_run_goes_on(run: Run) -> None:
    run.serve()
    asha, rafiq = run.join("Asha"), run.join("Rafiq")
    run.wait_for_volunteer("Asha", 90)
    run.wait_for_volunteer("Rafiq", 60)
    before = RunDirectory.open(run.run_dir).key().public_key
    rotation = run.start("rotation", "rotate-key", str(run.run_dir))
    assert ended(rotation, 60) == 0, rotation.output()
    now = RunDirectory.open(run.run_dir).key().public_key
    assert now != before
    # all have certificates by the new key, when they have renewed
    kept = run.folder / "home"
    wait_for(
        lambda: len([p for p in kept.rglob("notice.json") if now in p.read_text()]) == 2,
        120,
        f"it is heard\n{run.story()}",
    )
    status = run.status()
    assert status is not None
    end = run.wait_for_round(status.round + 3, 90)
    assert end.failed_rounds - status.failed_rounds <= 1
    trains(run.join("Mitu"), 90, run.story())
    assert asha.process.poll() is None
    assert rafiq.process.poll() is None
    assert asha.leave() == 0


def knock(volunteer: Command, run: Run, folder: Path) -> dict[str, dict[str, str]]:
    """What a stranger hears who calls everything that a volunteer's peer has."""
    folder.mkdir()
    daemon = next(process for process in volunteer.family() if process.name() == "p2pd")
    port = next(
        each.laddr.port
        for each in daemon.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and each.laddr.port
    )
    spec = RunDirectory.open(run.run_dir).spec
    key = next((run.folder / "home").glob(f"{spec.fingerprint[:16]}/{volunteer.name}-0/peer.key"))
    options = {
        "folder": str(folder),
        "target": f"/ip4/127.0.0.1/tcp/{port}/p2p/{PeerIdentity(key).peer_id}",
        "run": spec.fingerprint,
        "certificate": "",
        "schema": "",
        "round": 1,
        "lineage": "",
    }
    done = subprocess.run(
        [sys.executable, str(HOSTILE), json.dumps(options)],
        capture_output=True,
        timeout=180,
        check=True,
    )
    heard: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return heard
