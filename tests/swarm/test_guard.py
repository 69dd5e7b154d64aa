"""Who is no member learns nothing and changes nothing: a hostile hivemind process calls every RPC of real peers."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from peer import RUN
from peers import Peer, Start, reach, starting

from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import RunKey
from kantha.swarm.processes import signal_when_parent_dies

pytestmark = [pytest.mark.swarm, pytest.mark.slow]

HOSTILE, FUZZER = Path(__file__).with_name("hostile.py"), Path(__file__).with_name("fuzzer.py")
NONSENSE = 100  # calls to each RPC
MOST_GROWTH = 64e6  # bytes
NOTICE_SECONDS = 120  # in which a revocation reaches every peer
CALLS = [
    "ping",
    "find",
    "store",
    "join a group",
    "send and receive parts",
    "ask",
    "fetch a result",
    "fetch a manifest",
    "fetch the weights",
    "push",
    "hivemind's own download",
]
STRANGERS = {
    "without a certificate": "damaged",
    "with an expired one": "ended",
    "with one of another run": "another run",
    "with one of another peer": "another peer",
    "with one by another key": "not signed by the run",
    "with a revoked one": "revoked",
}
LIES = [
    "a report with another's certificate",
    "a report under another's name",
    "a report under two names",
    "a report without a name",
    "a report off the schema",
    "another record",
]


@dataclass
class Swarm:
    folder: Path
    averager: Peer
    asha: Peer
    key: RunKey
    heard: dict[str, dict[str, Any]]  # what a hostile peer of some kind got, by its calls

    def call_all(self, kind: str) -> dict[str, Any]:
        """Once for each kind: it calls everything that a peer has."""
        if kind not in self.heard:
            folder = self.folder / kind
            folder.mkdir()
            identity = PeerIdentity(folder / "peer.key")
            self.heard[kind] = self.run(HOSTILE, folder, self._certificate(kind, folder, identity))
        return self.heard[kind]

    def _certificate(self, kind: str, folder: Path, identity: PeerIdentity) -> str:
        good = self.key.certify(RUN, "Eve", identity.peer_id)
        match kind:
            case "without a certificate":
                return ""
            case "with an expired one":
                good = self.key.certify(RUN, "Eve", identity.peer_id, lifetime=-70)
            case "with one of another run":
                good = self.key.certify("cd" * 32, "Eve", identity.peer_id)
            case "with one of another peer":
                good = self.key.certify(RUN, "Eve", PeerIdentity(folder / "another.key").peer_id)
            case "with one by another key":
                good = RunKey.generate(folder / "another.pem").certify(RUN, "Eve", identity.peer_id)
            case "with a revoked one":
                notice = self.key.notify(RUN, {good.membership.serial: good.membership.expires})
                partial = self.folder / ".notice"
                partial.write_text(notice.model_dump_json())
                partial.rename(self.folder / "asha.notice")  # the organizer tells one peer, which tells the others
                wait_for(
                    lambda: self.averager.last("notice") == notice.number,
                    NOTICE_SECONDS,
                    "the notice goes from peer to peer",
                )
        return good.model_dump_json()

    def run(self, program: Path, folder: Path, certificate: str, **more: object) -> dict[str, Any]:
        """What the program says that calls the averager."""
        asha = PeerIdentity(self.folder / "asha.key")
        options = {
            "folder": str(folder),
            "target": self.averager.last("addresses")[0],
            "run": RUN,
            "certificate": certificate,
            "schema": self.averager.last("schema"),
            "round": self.averager.round,
            "lineage": self.averager.lineages()[self.averager.round],
            "victim": {
                "public_key": asha.public_key,
                "certificate": self.key.certify(RUN, "Asha", asha.peer_id).model_dump_json(),
            },
            **more,
        }
        done = subprocess.run(
            [sys.executable, str(program), json.dumps(options)],
            capture_output=True,
            timeout=240,
            check=True,
            preexec_fn=lambda: signal_when_parent_dies(9),
        )
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("swarm")
    with contextlib.contextmanager(starting)(folder) as start:
        options: dict[str, Any] = {"values": 200_000}
        averager = _started(start, "averager", role="averager", **options)
        asha = _started(start, "asha", **options)
        reach([averager, asha], 2)
        yield Swarm(folder, averager, asha, RunKey.load(folder / "run.pem"), {})
        for peer in (averager, asha):  # whatever was tried, both are well
            assert peer.process.poll() is None, peer.log()[-3000:]
            assert "Traceback" not in peer.log()
        reach([averager, asha], max(averager.round, asha.round) + 1)


def _started(start: Start, name: str, **options: Any) -> Peer:
    return start(name, **options)


@pytest.mark.parametrize("call", ["greet the DHT", "greet the averager", *CALLS])
def test_a_member_is_answered(swarm: Swarm, call: str) -> None:
    """Else the refusals below would prove nothing: whatever is refused to a member is so for what it says."""
    result = swarm.call_all("member")[call]
    if "answered" not in result:
        assert "MembershipError" not in result["refused"], result
        assert "TimeoutError" not in result["refused"], result


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_stranger_s_greeting_is_refused_with_the_reason(swarm: Swarm, kind: str) -> None:
    heard = swarm.call_all(kind)
    for greeting in ("greet the DHT", "greet the averager"):
        assert STRANGERS[kind] in heard[greeting]["refused"]


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("call", CALLS)
def test_a_stranger_is_refused(swarm: Swarm, kind: str, call: str) -> None:
    result = swarm.call_all(kind)[call]
    assert "answered" not in result, result
    assert "MembershipError" in result["refused"]


@pytest.mark.parametrize("lie", LIES)
def test_a_member_stores_its_own_report_and_nothing_else(swarm: Swarm, lie: str) -> None:
    heard = swarm.call_all("member")
    assert heard["store"]["stored"] == [True]
    assert heard[lie].get("stored", [False]) == [False]


def test_nonsense_from_a_member_hurts_nobody(swarm: Swarm) -> None:
    """Random, cut, changed and oversized input to every RPC: no traceback, no hang, no growth of memory."""
    folder = swarm.folder / "nonsense"
    folder.mkdir()
    certificate = swarm.key.certify(RUN, "Eve", PeerIdentity(folder / "peer.key").peer_id).model_dump_json()

    def memory() -> int:
        return sum(process.memory_full_info().uss for process in swarm.averager.family())

    swarm.run(FUZZER, folder, certificate, calls=NONSENSE // 10, seed=1)  # what is made once has been made then
    before = memory()
    said = swarm.run(FUZZER, folder, certificate, calls=NONSENSE, seed=2)
    assert memory() - before < MOST_GROWTH
    assert len(said) == 11
    for name, outcomes in said.items():
        assert sum(outcomes.values()) == NONSENSE + 1
        assert "hung" not in outcomes, (name, outcomes)
    round_number = swarm.averager.round
    reach([swarm.averager, swarm.asha], round_number + 1)
    assert "Traceback" not in swarm.averager.log(), swarm.averager.log()[-5000:]
