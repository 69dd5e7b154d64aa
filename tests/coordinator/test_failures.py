"""Whatever happens to the program, its disk or its database: no entry of the ledger is lost or counted twice."""

import contextlib
import itertools
import multiprocessing
import random
import resource
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from postgres import PostgresServer

from kantha.coordinator.database import Database
from kantha.coordinator.ledger import Ledger
from kantha.errors import StorageError
from kantha.swarm.reports import RoundReport

PATIENCE = 60.0  # seconds
ROUNDS = 30
PEERS = ("a", "b", "c")


def a_report(number: int) -> RoundReport:
    return RoundReport(
        round=number,
        lineage=f"after {number}",
        samples=number,
        seconds=0.5,
        waited=0.25,
        mlm_loss_sum=5.0,
        sop_loss_sum=0.5,
        peers=3,
    )


def write(ledger: Ledger, entered: Callable[[int, str], object], refused: Callable[[str], object]) -> None:
    """Enter all rounds of all peers, each until it is in. What was in before is entered again: reports repeat it."""
    for number in range(1, ROUNDS + 1):
        for peer in PEERS:
            while True:
                try:
                    ledger.add_rounds(peer, [a_report(number)])
                    break
                except StorageError as error:
                    refused(str(error))
            entered(number, peer)


class Writer:
    """A process that writes, and says what is in. Forked: to import everything anew takes seconds."""

    def __init__(self, place: Path | str, largest_file: int = 0) -> None:
        context = multiprocessing.get_context("fork")
        self.said, said = context.Pipe(duplex=False)
        self.room = context.Event()
        self.process = context.Process(target=self._work, args=(place, largest_file, said))
        self.process.start()
        said.close()

    def _work(self, place: Path | str, largest_file: int, said: Connection) -> None:
        def refused(reason: str) -> None:
            said.send(reason)
            self.room.wait(PATIENCE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        ledger = Ledger(Database(place))
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        write(ledger, lambda number, peer: said.send((number, peer)), refused)
        ledger.close()

    def sayings(self) -> Iterator[Any]:
        """Until it ends."""
        with contextlib.suppress(EOFError):
            while True:
                yield self.said.recv()

    def end(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        self.process.join(PATIENCE)


def entries(ledger: Ledger) -> dict[tuple[int, str], int]:
    return {(entry.round, entry.peer_id): entry.samples for entry in ledger.export_contributions()}


def assert_in_step(ledger: Ledger) -> None:
    """The sums are those of what was entered."""
    known = entries(ledger)
    assert ledger.totals().samples == sum(known.values())
    assert sum(entry.samples for entry in ledger.rounds()) == sum(known.values())
    assert ledger.totals().rounds == len({number for number, _ in known})
    assert sum(ledger.samples_by_peer().values()) == sum(known.values())
    assert sum(entry.samples for entry in ledger.contributors()) == sum(known.values())
    assert ledger.totals().seconds == 0.5 * len(known)


def assert_whole(ledger: Ledger) -> None:
    assert entries(ledger) == {(number, peer): number for number in range(1, ROUNDS + 1) for peer in PEERS}
    assert_in_step(ledger)


def test_who_is_killed_while_it_writes_loses_nothing_and_counts_nothing_twice(place: Path | str) -> None:
    chance = random.Random(3)
    ledger = Ledger(Database(place))
    for said in [*(chance.randint(1, 50) for _ in range(4)), None]:
        writer = Writer(place)
        told = set(itertools.islice(writer.sayings(), said))
        writer.end(kill=said is not None)  # in the middle of something
        told |= set(writer.sayings())
        assert entries(ledger).keys() >= told
        assert_in_step(ledger)
    assert_whole(ledger)
    ledger.close()


def test_a_disk_that_is_full_for_a_while_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    written = path.with_name("ledger.sqlite-wal").stat().st_size  # where SQLite writes first
    writer = Writer(path, largest_file=written + 200_000)
    refused = next(said for said in writer.sayings() if isinstance(said, str))
    assert "make room on that disk" in refused
    assert_in_step(ledger)  # what is known can be read all the while
    assert 0 < ledger.totals().rounds < ROUNDS
    writer.room.set()
    writer.end()
    assert writer.process.exitcode == 0
    assert_whole(ledger)
    ledger.close()


def test_a_database_that_dies_and_comes_back_loses_nothing(postgres: PostgresServer) -> None:
    ledger = Ledger(Database(postgres.make_database()))
    refused: list[str] = []
    up = threading.Event()
    up.set()

    def note(reason: str) -> None:
        refused.append(reason)
        up.wait(PATIENCE)

    writer = threading.Thread(target=write, args=(ledger, lambda *_: None, note))
    writer.start()
    try:
        for rounds in (5, 15):
            wait_for(lambda rounds=rounds: ledger.totals().rounds >= rounds, PATIENCE, "it writes")
            up.clear()
            before = len(refused)
            postgres.stop()
            try:
                wait_for(lambda before=before: len(refused) > before, PATIENCE, "that it is gone is noticed")
                with pytest.raises(StorageError, match="KANTHA_DATABASE_URL"):
                    ledger.totals()
            finally:
                postgres.start()
                up.set()
    finally:
        writer.join(PATIENCE)
    assert all(len(reason.splitlines()) == 1 for reason in refused)
    assert_whole(ledger)
    ledger.close()
