"""How quickly do a large run's pages answer, and what do two hundred of them cost that are open?

The ledger of a large run is made, with SQLite and with PostgreSQL: 1,000 volunteers, 100,000 rounds in 29 days, ten
reports a round. The real application serves it, in a process of its own, while reports keep arriving: of 50 volunteers
that are here, ten finish a round every second, as of a swarm twenty times as fast as any. The swarm alone is made up.

* Every address is asked 40 times, an export 20 times, one after the other, and nobody else asks. What a browser waits
  for is measured: until the whole answer is here; of an export, which streams the whole ledger, until its first bytes
  are. p95 is that of each address; the largest is printed and counts.
* Then 200 pages are open for half a minute, each doing what its scripts do: the numbers every 3 s, what is new in the
  charts every 2 s. CPU seconds of the coordinator's process, its collecting of reports included, over the seconds
  that passed, are the cores that they cost. Where this machine is too busy for all of the 200 to ask as often, the
  cores are those for the ones that did, times what is missing.

PostgreSQL is a server of this script's own, on this machine, as Debian installs it (and durable as it is by default).
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import uvicorn
from sqlalchemy import URL, create_engine, insert, text

from kantha.coordinator.admission import Admission
from kantha.coordinator.allowlist import Allowlist, Person
from kantha.coordinator.contributions import (
    Contribution,
    FailedRound,
    PeerDay,
    Result,
    Round,
    Tally,
    day_of,
)
from kantha.coordinator.database import Database, Table, open_database
from kantha.coordinator.leases import LEASE_SECONDS, Lease, Stay
from kantha.coordinator.ledger import Device, HeldoutRound, Ledger, Member, Share
from kantha.coordinator.notifier import Notifier
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.service import Coordinator
from kantha.spec import (
    DataSpec,
    FileSource,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    ScheduleState,
    SwarmSpec,
    TokenizerSpec,
)
from kantha.swarm.processes import signal_when_parent_dies
from kantha.swarm.reports import Report, Roster, RoundReport
from kantha.web.app import build_app

PAGES = [
    "/",
    "/volunteers",
    "/volunteers?window=today",
    "/volunteers?window=month&by=streak",
    "/volunteers?of=teams&window=week",
    "/volunteers?page=3",
    "/volunteers/1",
    "/volunteers/1/certificate",
    "/volunteers/1/certificate.svg",
    "/api/v1/volunteers?size=500",
    "/name",
    "/polls",
    "/join",
    "/sign-in",
    "/milestones",
    "/charts",
    "/chart-data",
    "/chart-data?after=99900",
    "/live",
    "/metrics",
    "/feed.atom",
    "/badge/samples.svg",
    "/badge/volunteers.svg",
    "/api/v1/run",
    "/api/v1/status",
    "/api/v1/blanks",
]
EXPORTS = [  # answers as long as the ledger: their first bytes count
    "/api/v1/export/rounds.csv",
    "/api/v1/export/rounds.json",
    "/api/v1/export/volunteers.csv",
    "/api/v1/export/volunteers.json",
]
LIVE = [("/live", 3.0), ("/chart-data?after={newest}", 2.0)]  # what an open page asks for, and every how many seconds
TIMES = 40  # that each address is asked
EXPORT_TIMES = 20  # that each export is
HERE_NOW = 50  # volunteers
PEERS_A_ROUND = 10
SECONDS_A_ROUND = 25.0
_SAMPLES = 64  # of one peer in a round
_DAY = 86_400.0


# ---- a large ledger


def make_run(folder: Path) -> RunDirectory:
    """One whose model is as small as can be."""
    text_file = folder / "text.txt"
    text_file.write_text(
        "\n".join(f"আমার ভাই আজ সকালে {number} নম্বর বাড়ি দেখে হাসল।" for number in range(500)), encoding="utf-8"
    )
    spec = RunSpec(
        name="a large run",
        goal="To see how quickly its pages are.",
        seed=7,
        model=ModelSpec(
            embedding_size=8, hidden_size=16, intermediate_size=32, layers=2, attention_heads=2, max_positions=32
        ),
        tokenizer=TokenizerSpec(vocab_size=130, training_documents=500),
        data=DataSpec(
            sources=(FileSource(kind="file", path=str(text_file)),),
            sequence_length=32,
            heldout_share=0.1,
            shuffle_buffer=10,
        ),
        optimizer=OptimizerSpec(learning_rate=1e-2, beta2=0.98),
        schedule=ScheduleSpec(warmup_samples=64),
        swarm=SwarmSpec(target_batch_size=_SAMPLES * PEERS_A_ROUND),
    )
    return RunDirectory.create(folder / "run", spec, lambda _: None)


def peer_of(volunteer: int) -> str:
    return f"QmVolunteer{volunteer:035d}"


@dataclass
class Sums:
    """As `Change` would have entered them, one contribution after the other."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    tallies: dict[str, dict[str, Any]] = field(default_factory=dict)
    days: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    shares: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=64 * PEERS_A_ROUND))


def fill(database: Database, volunteers: int, rounds: int, reports: int) -> None:
    """The whole ledger, to now."""
    chance = random.Random(1)
    allowlist = Allowlist(database)
    with database.session() as session:
        people = [
            allowlist.identify(session, Person(f"volunteer-{number}", "", "local", ()))[0]
            for number in range(volunteers)
        ]
    allowlist.decide([f"volunteer-{number}" for number in range(volunteers)], "approve", "the organizer")
    now = time.time()
    sums = Sums()
    began = now - rounds * SECONDS_A_ROUND
    _enter(database, Contribution, _contributions(chance, sums, volunteers, rounds, reports, began))
    _enter(database, Round, sums.rounds)
    _enter(database, Tally, sums.tallies.values())
    _enter(database, PeerDay, sums.days.values())
    failed = [row["round"] for row in sums.rounds if row["reason"]]
    _enter(database, FailedRound, ({"round": number, "reason": "a peer stalled"} for number in failed))
    last = range(rounds - 63, rounds + 1)
    _enter(
        database,
        Result,
        ({"round": n, "lineage": f"after {n}", "seen": now - 60.0, "learning_rate": 1e-3} for n in last),
    )
    _enter(
        database,
        Share,
        ({"round": n, "peer_id": peer_id, "samples": _SAMPLES} for n, peer_id in sums.shares if n >= last[0]),
    )
    _enter(
        database,
        Member,
        (
            {
                "peer_id": peer_of(number),
                "username": f"volunteer-{number}",
                "person": people[number],
                "service": "local",
                "joined": began,
                "expires": int(now + _DAY),
            }
            for number in range(volunteers)
        ),
    )
    _enter(database, Device, ({"peer_id": peer_of(n), "device": "Tesla T4"} for n in range(volunteers)))
    _enter(
        database,
        HeldoutRound,
        (
            {
                "round": n,
                "mlm_loss": 8.0 - 5.0 * n / rounds,
                "mlm_accuracy": 0.2,
                "sop_loss": 0.6,
                "sop_accuracy": 0.6,
                "masked": 2300,
                "pairs": 512,
            }
            for n in range(0, rounds, 100)
        ),
    )
    place = {"service": "local", "instance": "a machine"}
    _enter(
        database,
        Lease,
        (
            {"peer_id": peer_of(n), "person": people[n], "since": now, "renewed": now + LEASE_SECONDS, **place}
            for n in range(HERE_NOW)
        ),
    )
    _enter(
        database,
        Stay,
        (
            {
                "peer_id": peer_of(n),
                "person": people[n],
                "service": "local",
                "label": "a machine",
                "began": began + day * _DAY,
                "seen": began + (day + 0.3) * _DAY,
            }
            for n in range(volunteers)
            for day in range(29)
        ),
    )
    with database.session() as session:
        session.execute(
            text(
                "UPDATE totals SET rounds = (SELECT COUNT(*) FROM rounds), failed = :failed, "
                "samples = (SELECT SUM(samples) FROM rounds), seconds = (SELECT SUM(seconds) FROM rounds), "
                "waited = (SELECT SUM(waited) FROM rounds)"
            ),
            {"failed": len(failed)},
        )
        session.connection().exec_driver_sql("ANALYZE")
    totals = Ledger(database).totals()
    assert (totals.rounds, totals.samples) == (rounds, reports * _SAMPLES), totals


def _contributions(
    chance: random.Random, sums: Sums, volunteers: int, rounds: int, reports: int, began: float
) -> Iterator[dict[str, Any]]:
    left = reports
    for number in range(1, rounds + 1):
        count = round(left / (rounds - number + 1))
        left -= count
        seen = began + number * SECONDS_A_ROUND
        mlm = 8.0 - 5.0 * number / rounds + chance.gauss(0.0, 0.1)
        sums.rounds.append(
            {
                "round": number,
                "samples": count * _SAMPLES,
                "told": count * _SAMPLES,
                "mlm_loss_sum": mlm * count * _SAMPLES,
                "sop_loss_sum": 0.6 * count * _SAMPLES,
                "volunteers": count,
                "seconds": count * 20.0,
                "waited": count * 5.0,
                "finished": seen,
                "learning_rate": 1e-3,
                "reason": "a peer stalled" if number % 97 == 0 else None,
            }
        )
        for volunteer in chance.sample(range(volunteers), count):
            peer_id = peer_of(volunteer)
            done = {"samples": _SAMPLES, "seconds": 20.0, "waited": 5.0}
            nothing = {"samples": 0, "seconds": 0.0, "waited": 0.0, "rounds": 0}
            tally = sums.tallies.setdefault(peer_id, {"peer_id": peer_id, "first": seen, **nothing})
            day = day_of(seen)
            of_day = sums.days.setdefault((day, peer_id), {"day": day, "peer_id": peer_id, **nothing})
            for entry in (tally, of_day):
                for name, value in done.items():
                    entry[name] += value
                entry["rounds"] += 1
            tally["seen"] = seen
            sums.shares.append((number, peer_id))
            yield {
                "round": number,
                "peer_id": peer_id,
                "lineage": f"after {number}",
                "mlm_loss_sum": mlm * _SAMPLES,
                "sop_loss_sum": 0.6 * _SAMPLES,
                "peers": count,
                "seen": seen,
                **done,
            }


def _enter(database: Database, table: type[Table], rows: Iterable[dict[str, Any]]) -> None:
    """Many rows, as quickly as the database takes them."""
    columns = [column.name for column in table.__table__.columns if column.name != "id"]
    rows = iter(rows)
    with database.session() as session:
        connection = session.connection()
        if connection.dialect.name == "postgresql":
            with connection.connection.cursor().copy(
                f"COPY {table.__tablename__} ({', '.join(columns)}) FROM STDIN"
            ) as copy:
                for row in rows:
                    copy.write_row([row[name] for name in columns])
            return
        statement = insert(table)
        while some := list(itertools.islice(rows, 20_000)):
            connection.execute(statement, some)


# ---- the coordinator, whose swarm is made up


class Engine:
    """What a coordinator asks of its engine."""

    def __init__(self, number: int) -> None:
        self.round = number
        self.lineage = f"after {number}"
        self.lineages: dict[int, str] = {}
        self.shares: dict[int, dict[str, float]] = {}
        self.learning_rates: dict[int, float] = {}
        self.is_ready = True
        self.roster = Roster()
        self.target, self.learning_rate = _SAMPLES * PEERS_A_ROUND, 1e-3
        self.schedule_state = ScheduleState()


class Node:
    """A swarm that finishes a round every second."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._done: dict[str, list[RoundReport]] = {peer_of(number): [] for number in range(HERE_NOW)}
        self._began, self._first = time.monotonic(), engine.round

    def reports(self) -> dict[str, Report]:
        for number in range(self._engine.round + 1, self._first + int(time.monotonic() - self._began) + 1):
            start = number * PEERS_A_ROUND
            peers = [peer_of((start + each) % HERE_NOW) for each in range(PEERS_A_ROUND)]
            for peer in peers:
                done = RoundReport(
                    round=number,
                    lineage=f"after {number}",
                    samples=_SAMPLES,
                    seconds=20.0,
                    waited=5.0,
                    mlm_loss_sum=3.0 * _SAMPLES,
                    sop_loss_sum=0.6 * _SAMPLES,
                    peers=PEERS_A_ROUND,
                )
                self._done[peer] = [*self._done[peer], done][-32:]
            self._engine.shares[number] = dict.fromkeys(peers, float(_SAMPLES))
            self._engine.learning_rates[number] = 1e-3
            self._engine.lineages[number] = f"after {number}"
            self._engine.round = number
            for kept in (self._engine.shares, self._engine.learning_rates, self._engine.lineages):
                kept.pop(number - 64, None)
        reports = {peer: self._report(rounds) for peer, rounds in self._done.items()}
        self._engine.roster.update(reports)
        return reports

    def _report(self, rounds: list[RoundReport]) -> Report:
        return Report(
            time=3.0 * (time.time() // 3.0),  # as often as peers make them
            role="trainer",
            state="training",
            dialable=True,
            ready=True,
            round=self._engine.round,
            lineage=self._engine.lineage,
            sketch=[],
            samples=30,
            samples_per_second=3.2,
            device="Tesla T4",
            version="1",
            certificate="{}",
            rounds=rounds,
            failed=[],
        )


class Served(Coordinator):
    """All of a coordinator but the swarm."""

    def __init__(self, run: RunDirectory, address: str) -> None:
        self.run, self.address, self.sign_in = run, address, "local"
        self._say = lambda _line: None
        self._addresses = ["/ip4/127.0.0.1/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"]
        self._lock = threading.Lock()
        self._notifier = Notifier(run.keys, f"{address}/desk", run.spec.name, print)
        self._open_books()
        self._status = None
        self._here, self._handed_in = {}, {}
        self._checkpoint_round = 0
        self._order_written = self._said_annealed = None
        self._stop = threading.Event()
        self._engine = Engine(self.ledger.totals().rounds)
        self._node = Node(self._engine)


def serve(path: Path, port: int) -> None:
    run = RunDirectory.open(path)
    coordinator = Served(run, f"http://127.0.0.1:{port}")
    threading.Thread(target=coordinator._collect, daemon=True).start()
    uvicorn.run(build_app(coordinator), host="127.0.0.1", port=port, log_level="warning", access_log=False)


# ---- those who look


@dataclass
class Figures:
    """Of one kind of database."""

    p95_ms: dict[str, float] = field(default_factory=dict)  # by address
    median_ms: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    live_cores: float = 0.0
    answered: float = 1.0  # share of what open pages ask for, that this machine was quick enough to ask and answer
    idle_cores: float = 0.0  # the same, when no page is open
    live_p95_ms: float = 0.0
    reports: int = 0  # that arrived meanwhile

    @property
    def worst_ms(self) -> float:
        return max(self.p95_ms.values())


def p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def measure(run: RunDirectory, pages: int, seconds: float) -> Figures:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(run.path), str(port)],
        preexec_fn=partial(signal_when_parent_dies, signal.SIGKILL),
    )
    try:
        figures = Figures()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False) as client:
            before = _wait_until_served(client, process)["samples"]
            for address in [*PAGES, *EXPORTS]:
                _ask(client, address, figures)
            figures.idle_cores = _cores_while(process, lambda: time.sleep(5.0))
            newest = client.get("/api/v1/status").json()["round"]
            took: list[float] = []
            figures.live_cores = _cores_while(
                process, lambda: took.extend(asyncio.run(_look(port, pages, seconds, newest)))
            )
            figures.answered = len(took) / (pages * seconds * sum(1 / every for _, every in LIVE))
            if figures.answered < 1:  # what the rest would have cost
                figures.live_cores = figures.idle_cores + (figures.live_cores - figures.idle_cores) / figures.answered
            figures.live_p95_ms = p95(took)
            figures.reports = (client.get("/api/v1/status").json()["samples"] - before) // _SAMPLES
        return figures
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_served(client: httpx.Client, process: subprocess.Popen[bytes]) -> Any:
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            return client.get("/api/v1/status").raise_for_status().json()
        time.sleep(0.2)
    raise SystemExit("the coordinator did not come up")


def _ask(client: httpx.Client, address: str, figures: Figures) -> None:
    took = []
    for _ in range(EXPORT_TIMES if address in EXPORTS else TIMES):
        began = time.perf_counter()
        with client.stream("GET", address) as answer:
            if answer.status_code == 404:
                figures.missing.append(address)
                return
            answer.raise_for_status()
            parts = answer.iter_raw()
            next(parts, b"")
            if address not in EXPORTS:
                for _part in parts:
                    pass
        took.append(1000 * (time.perf_counter() - began))
        time.sleep(0.05)  # what is kept for a second is made anew for some of them
    figures.p95_ms[address], figures.median_ms[address] = p95(took), statistics.median(took)


def _cores_while(process: subprocess.Popen[bytes], work: Any) -> float:
    watched = psutil.Process(process.pid)

    def used() -> float:
        times = watched.cpu_times()
        return float(times.user + times.system)

    began, before = time.monotonic(), used()
    work()
    return (used() - before) / (time.monotonic() - began)


async def _look(port: int, pages: int, seconds: float, newest: int) -> list[float]:
    """Milliseconds of each answer."""
    took: list[float] = []
    until = time.monotonic() + seconds

    async def poll(client: httpx.AsyncClient, address: str, every: float) -> None:
        await asyncio.sleep(every * random.random())
        while (began := time.monotonic()) < until:
            try:
                answer = await client.get(address, headers={"Accept-Encoding": "gzip"})
            except httpx.ReadError:  # the server closed the idle connection just then; a browser asks again, too
                continue
            if answer.status_code != 404:
                answer.raise_for_status()
                took.append(1000 * (time.monotonic() - began))
            await asyncio.sleep(max(0.0, every - (time.monotonic() - began)))

    async def look() -> None:
        """As one browser: with connections of its own."""
        link = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=link, timeout=30.0, verify=False, trust_env=False) as client:
            await asyncio.gather(*(poll(client, address.format(newest=newest), every) for address, every in LIVE))

    await asyncio.gather(*(look() for _ in range(pages)))
    return took


# ---- PostgreSQL


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str | None]:
    """URL of a database on a server of our own; None where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))  # Debian's, of which not all are on the PATH
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        yield None
        return
    programs, user = Path(initdb).parent, "nobody" if os.getuid() == 0 else None
    data = folder / "server"
    data.mkdir()
    folder.chmod(0o755)
    if user:
        shutil.chown(data, user)

    initdb_options = ["--no-locale", "--encoding=UTF8", "--auth=trust", "--username=kantha"]
    subprocess.run(
        [initdb, "-D", "data", *initdb_options], user=user, cwd=data, check=True, stdout=subprocess.DEVNULL, timeout=120
    )
    server = subprocess.Popen(
        [programs / "postgres", "-D", "data", "--listen_addresses=", f"--unix_socket_directories={data}"],
        user=user,
        cwd=data,
        stderr=(data / "log").open("ab"),
        preexec_fn=partial(signal_when_parent_dies, signal.SIGINT),
    )
    try:
        is_ready = [programs / "pg_isready", "--quiet", f"--host={data}"]
        while subprocess.run(is_ready, check=False).returncode and server.poll() is None:
            time.sleep(0.1)
        url = URL.create("postgresql", "kantha", database="postgres", query={"host": str(data)})
        engine = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("CREATE DATABASE run"))
        engine.dispose()
        yield url.set(database="run").render_as_string()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


# ---- the script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volunteers", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--reports", type=int, default=1_000_000)
    parser.add_argument("--pages", type=int, default=200, help="that are open")
    parser.add_argument("--seconds", type=float, default=30.0, help="that they are")
    parser.add_argument("--only", choices=["sqlite", "postgresql"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), int(options.serve[1]))
        return
    found: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="kantha-page-") as name:
        folder = Path(name)
        with postgresql(folder) as url:
            for kind in ("sqlite", "postgresql"):
                if options.only not in (None, kind):
                    continue
                if kind == "postgresql" and url is None:
                    print("PostgreSQL is not installed here; it is left out")
                    continue
                found[kind] = one(folder, kind, url, options)
    if options.json:
        result: dict[str, Any] = {f"{kind}_p95_ms": round(figures.worst_ms, 1) for kind, figures in found.items()}
        result["live_pages"] = options.pages
        result["live_cores"] = round(max(figures.live_cores for figures in found.values()), 3)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def one(folder: Path, kind: str, url: str | None, options: argparse.Namespace) -> Figures:
    home = folder / kind
    home.mkdir()
    run = make_run(home)
    os.environ.pop("KANTHA_DATABASE_URL", None)
    if kind == "postgresql":
        os.environ["KANTHA_DATABASE_URL"] = str(url)
    began = time.monotonic()
    database = open_database(run)
    Admission(database, run.spec, run.key(), "local", Allowlist(database))
    fill(database, options.volunteers, options.rounds, options.reports)
    database.close()
    print(
        f"\n{kind}: {options.volunteers:,} volunteers, {options.rounds:,} rounds, {options.reports:,} reports "
        f"(made in {time.monotonic() - began:.0f} s; {platform.machine()}, {os.cpu_count()} cores)"
    )
    figures = measure(run, options.pages, options.seconds)
    for address, slow in figures.p95_ms.items():
        first = " (first bytes)" if address in EXPORTS else ""
        print(f"  {address:34} median {figures.median_ms[address]:7.1f} ms   p95 {slow:7.1f} ms{first}")
    if figures.missing:
        print(f"  not there: {', '.join(figures.missing)}")
    print(f"  the slowest p95: {figures.worst_ms:.1f} ms; {figures.reports:,} reports arrived meanwhile")
    print(
        f"  {options.pages} open pages: {figures.live_cores:.2f} cores (with none open {figures.idle_cores:.2f}), "
        f"p95 of their answers {figures.live_p95_ms:.0f} ms; {figures.answered:.0%} of them came in time",
        flush=True,
    )
    return figures


if __name__ == "__main__":
    main()
