"""Starts peers without a model (peer.py) as real processes, and compares what they hold."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from commands import wait_for

from kantha.swarm.membership import RunKey
from kantha.swarm.processes import signal_when_parent_dies

PROGRAM = Path(__file__).with_name("peer.py")
VALUES = 4_000_000  # an all-reduce that takes long enough to be struck in its middle
NEAR = 2e-3  # relative distance of replicas; a snapshot is fp16


class Peer:
    """One running peer.py."""

    def __init__(self, folder: Path, name: str, prefix: list[str] | None = None, **options: Any) -> None:
        self.name = name
        self._said = folder / f"{name}.said"
        self._log = folder / f"{name}.log"
        settings = {"name": name, "folder": str(folder), "values": VALUES, "target": 64, "role": "trainer", **options}
        with self._said.open("ab") as out, (folder / f"{name}.errors").open("ab") as errors:
            self.process = subprocess.Popen(
                [*(prefix or []), sys.executable, str(PROGRAM), json.dumps(settings)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
                preexec_fn=lambda: signal_when_parent_dies(signal.SIGKILL),
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        self._skip = len(self.said(everything=True))

    def said(self, *, everything: bool = False) -> list[dict[str, Any]]:
        lines = self._said.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in (lines if everything else lines[self._skip :]) if line.endswith("}")]

    def last(self, key: str) -> Any:
        return next((event[key] for event in reversed(self.said()) if key in event), None)

    @property
    def round(self) -> int:
        found = self.last("round")
        return -1 if found is None else int(found)

    def lineages(self) -> dict[int, str]:
        return {event["round"]: event["lineage"] for event in self.said() if "round" in event}

    def head(self, number: int) -> list[float]:
        """The first weights that it had at a round."""
        return next(event["head"] for event in self.said() if event.get("round") == number)

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def family(self) -> list[psutil.Process]:
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def signal(self, signum: signal.Signals) -> None:
        """To the whole family, as a machine that is suspended, or a container that is paused."""
        for member in self.family():
            member.send_signal(signum)

    def kill(self) -> None:
        """As `kill -9` of the program; the kernel ends its children."""
        if self.process.poll() is None:
            family = self.family()
            self.process.kill()
            self.process.wait()
            psutil.wait_procs(family, timeout=10)


Start = Callable[..., Peer]


def starting(tmp_path: Path) -> Iterator[Start]:
    """Gives a function that starts peers, the first of which bootstraps the others; ends them all."""
    peers: list[Peer] = []
    RunKey.generate(tmp_path / "run.pem")

    def begin(name: str, **options: Any) -> Peer:
        options.setdefault("newcomer", bool(peers))
        if "bootstrap" not in options:
            options["bootstrap"] = [address for peer in peers[:1] for address in peer.last("addresses")]
        peer = Peer(tmp_path, name, **options)
        peers.append(peer)
        wait_for(lambda: peer.last("addresses") or peer.process.poll() is not None, 60, f"{name} starts")
        assert peer.process.poll() is None, (tmp_path / f"{name}.errors").read_text()
        return peer

    yield begin
    for peer in peers:
        if peer.process.poll() is None:
            peer.signal(signal.SIGCONT)
        peer.kill()


def reach(peers: list[Peer], number: int, seconds: float = 90) -> None:
    wait_for(
        lambda: all(peer.round >= number for peer in peers),
        seconds,
        f"all at round {number}: {[(peer.name, peer.round, peer.said()[-3:]) for peer in peers]}",
    )


def agree(peers: list[Peer]) -> None:
    """Whatever round two peers report, they have the same lineage there, and nearly the same weights."""
    lineages = [peer.lineages() for peer in peers]
    for found in lineages[1:]:
        for number in found.keys() & lineages[0].keys():
            assert found[number] == lineages[0][number], f"round {number}"
    near(peers)


def near(peers: list[Peer]) -> None:
    """At the newest round that all report they have the same lineage, and nearly the same weights."""
    lineages = [peer.lineages() for peer in peers]
    common = max(set.intersection(*(set(found) for found in lineages)))
    assert len({found[common] for found in lineages}) == 1, f"round {common}"
    reference = peers[0].head(common)
    norm = sum(value**2 for value in reference) ** 0.5
    for peer in peers[1:]:
        far = sum((a - b) ** 2 for a, b in zip(peer.head(common), reference, strict=True)) ** 0.5
        assert far <= NEAR * norm, f"{peer.name} is {far / norm:.1e} away at round {common}"


def swarm_of_three(start: Start) -> tuple[Peer, Peer, Peer]:
    averager = start("averager", role="averager")
    return averager, start("asha"), start("rafiq")


def strike(peer: Peer, blow: Callable[[], None]) -> None:
    """In the middle of the next all-reduce."""
    seen = sum("averaging" in event for event in peer.said())
    deadline = time.monotonic() + 60
    while sum("averaging" in event for event in peer.said()) == seen:
        assert time.monotonic() < deadline, "no averaging began"
        time.sleep(0.002)
    blow()
