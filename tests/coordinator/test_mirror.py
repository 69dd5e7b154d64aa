"""The mirror at Weights & Biases: its real client, offline, in its real process."""

import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from canaries import API_KEY

from kantha.coordinator.mirror import Mirror
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.status import HeldoutStatus, RoundStatus

DEADLINE = 60.0  # seconds for the client, whose own program takes some to start


class Books:
    """A ledger of so many rounds that were finished long ago, and some that just were."""

    def __init__(self, old: int, new: int = 0) -> None:
        self.rounds = [_round(number, finished=1.7e9 + number) for number in range(1, old + 1)]
        self.rounds += [_round(old + number, finished=time.time()) for number in range(1, new + 1)]
        self.scores = [_scores(number) for number in range(0, old, 5)]

    def last_rounds(self, count: int) -> list[RoundStatus]:
        return self.rounds[-count:]

    def export_rounds(self, after: int) -> Iterator[RoundStatus]:
        yield from (entry for entry in self.rounds if entry.round > after)

    def heldout(self) -> list[HeldoutStatus]:
        return self.scores


def _round(number: int, finished: float) -> RoundStatus:
    loss = 8 - number / 100
    return RoundStatus(
        round=number,
        samples=256 + number,
        loss=None if number == 7 else loss + 0.5,
        mlm_loss=None if number == 7 else loss,
        sop_loss=None if number == 7 else 0.5,
        volunteers=3,
        finished=finished,
        failed=number == 9,
        reason="a peer of রহিম stalled" if number == 9 else None,
    )


def _scores(number: int) -> HeldoutStatus:
    return HeldoutStatus(
        round=number,
        loss=8.5,
        mlm_loss=8.0,
        mlm_accuracy=0.1,
        sop_loss=0.5,
        sop_accuracy=0.6,
        masked=100,
        pairs=10,
    )


@pytest.fixture(autouse=True)
def _client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody's real key
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def mirror(run_path: Path, books: Books) -> list[str]:
    """All that there is, once; returns what was said."""
    said: list[str] = []
    stop = threading.Event()
    stop.set()
    Mirror(RunDirectory.open(run_path), books, "project", said.append).work_until(stop)  # type: ignore[arg-type]
    return said


def kept(run_path: Path) -> list[dict[str, Any]]:
    """What the client keeps to be sent some day, in the order in which it came."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((run_path / "wandb").glob("offline-run-*/*.wandb")):
        for content in _log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                found.append({name: json.loads(value) for name, value in row.items() if not name.startswith("_")})
    return found


def _log_records(content: bytes) -> Iterator[bytes]:
    """Of a log in the format of LevelDB: blocks of 32 KiB, in them parts, of which the last of each record has type 1
    (it is whole) or 4."""
    record = b""
    for start in range(0, len(content), 32_768):
        block = content[start : start + 32_768]
        at = 7 if start == 0 else 0  # the client's own name
        while at + 7 <= len(block) and block[at + 6]:
            length, kind = int.from_bytes(block[at + 4 : at + 6], "little"), block[at + 6]
            record += block[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                yield record
                record = b""


def test_rounds_and_scores_are_mirrored_and_no_person_or_machine(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mirror(run_path, Books(old=60, new=2)) == []  # the last two may still change
    rows = kept(run_path)
    rounds = [row for row in rows if "round/samples" in row]
    assert [row["round"] for row in rounds] == list(range(1, 61))
    assert rounds[0]["round/loss"] == pytest.approx(8.49)
    assert "round/loss" not in rounds[6]
    assert [row["round"] for row in rounds if row["round/failed"]] == [9]
    assert sum(row["round/samples"] for row in rounds) == sum(256 + number for number in range(1, 61))
    assert [row["round"] for row in rows if "heldout/loss" in row] == list(range(0, 60, 5))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    content = b"".join(path.read_bytes() for path in (run_path / "wandb").rglob("*") if path.is_file())
    for private in (socket.gethostname(), "রহিম"):
        assert private.encode() not in content


@pytest.mark.parametrize(
    ("key", "said"),
    [("", "UsageError"), pytest.param(API_KEY * 3, "does not answer", marks=pytest.mark.slow)],
    ids=["no key", "nobody there"],
)
def test_a_mirror_that_fails_is_said_once_without_its_key(
    run_path: Path, key: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    lines = mirror(run_path, Books(old=3))
    assert len(lines) == 1
    assert re.match(f"wandb: .*{said}.*the run goes on", lines[0])
    assert API_KEY not in lines[0] + (run_path / "log" / "wandb.log").read_text()


@pytest.mark.slow
def test_a_process_that_was_killed_is_started_again_and_repeats_nothing(
    run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("kantha.coordinator.mirror._RETRY_SECONDS", 0.1)
    said: list[str] = []
    stop = threading.Event()
    books = Books(old=3)
    one = Mirror(RunDirectory.open(run_path), books, "project", said.append, look_seconds=0.1)  # type: ignore[arg-type]
    thread = threading.Thread(target=one.work_until, args=(stop,))
    thread.start()
    state = run_path / "wandb" / "mirrored.json"

    def wait_until_mirrored(number: int) -> None:
        deadline = time.monotonic() + DEADLINE
        while not (state.exists() and json.loads(state.read_text()).get("round") == number):
            assert time.monotonic() < deadline, said
            time.sleep(0.05)

    try:
        wait_until_mirrored(3)
        assert one._process is not None
        one._process.kill()
        one._process.wait()
        books.rounds = Books(old=5).rounds
        wait_until_mirrored(5)
    finally:
        stop.set()
        thread.join()
    assert len(said) == 1
    assert "its process ended" in said[0]
    rounds = [row["round"] for row in kept(run_path) if "round/samples" in row]
    assert [number for number in rounds if number > 3] == [4, 5]
