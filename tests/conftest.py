"""A tiny run for all tests: generated Bengali text, a network of some thousand weights, everything on this machine."""

import os
import random
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the hub's library is imported: no test asks it for anything

import pytest
import torch
import uvicorn
from canaries import _no_secret_is_left  # noqa: F401  a fixture of all tests
from fastapi import FastAPI
from peers import Start, starting
from postgres import PostgresServer, find_programs
from tokenizers import Tokenizer

from kantha.cli import main as command_line
from kantha.coordinator.database import Database
from kantha.coordinator.notifier import Notifier
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.service import Coordinator
from kantha.corpus import Batch, ExampleStream, load_tokenizer
from kantha.spec import (
    DataSpec,
    EvaluationSpec,
    FileSource,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    ScheduleState,
    SwarmSpec,
    TokenizerSpec,
)
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.reports import Roster
from kantha.web.app import build_app

WHO = ["আমার ভাই", "ছোট মেয়েটি", "পাশের বাড়ির কাকা", "রহিম", "গ্রামের জেলে", "নতুন শিক্ষক", "সীমা", "বুড়ো মাঝি"]
WHEN = ["আজ সকালে", "গতকাল বিকেলে", "প্রতিদিন", "বর্ষার রাতে", "শীতের দিনে", "মেলার শেষে"]
WHAT = ["নদীর ঘাটে বসে", "পুরোনো বইটি", "লাল কাঁথা", "ইলিশ মাছ", "বাজার থেকে চাল", "স্কুলের মাঠে"]
DID = ["খুঁজে পেল।", "দেখে হাসল!", "কিনে আনল।", "কি ভুলে গেল?", "যত্ন করে রাখল।", "নিয়ে এল।"]
BOOTSTRAP = "/ip4/127.0.0.1/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"

# tests that were started in the background ignore Ctrl-C, and so would all programs that they start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _only_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy stands between a test and loopback, and nobody's own files are touched."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("KANTHA_NOTIFY", "KANTHA_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KANTHA_HOME", str(tmp_path / "kantha-home"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A spec that nobody has created a run from yet."""
    chance = random.Random(0)
    documents = (
        " ".join(chance.choice(part) for _ in range(chance.randint(2, 6)) for part in (WHO, WHEN, WHAT, DID))
        for _ in range(200)
    )
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(documents), encoding="utf-8")
    return RunSpec(
        name="tiny",
        goal="A model for tests.",
        seed=7,
        model=ModelSpec(
            embedding_size=8, hidden_size=16, intermediate_size=32, layers=2, attention_heads=2, max_positions=32
        ),
        tokenizer=TokenizerSpec(vocab_size=200, training_documents=200),
        data=DataSpec(
            sources=(FileSource(kind="file", path=str(path)),), sequence_length=32, heldout_share=0.1, shuffle_buffer=10
        ),
        optimizer=OptimizerSpec(learning_rate=1e-2, beta2=0.98),
        schedule=ScheduleSpec(warmup_samples=64),
        swarm=SwarmSpec(target_batch_size=64),
        evaluation=EvaluationSpec(sentences=(f"{WHO[0]} ___ খুঁজে পেল।", "গতকাল ___।")),
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A created run, to look at only; its spec has the tokenizer's digest. `run_path` is a copy to change."""
    return RunDirectory.create(tmp_path_factory.mktemp("runs") / "tiny", tiny_spec, lambda _: None)


@pytest.fixture
def run_path(tiny_run: RunDirectory, tmp_path: Path) -> Path:
    """A created run that the test may do anything to."""
    return Path(shutil.copytree(tiny_run.path, tmp_path / "run"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_run: RunDirectory) -> Tokenizer:
    return load_tokenizer(tiny_run.tokenizer, tiny_run.spec.tokenizer.sha256)


@pytest.fixture(scope="session")
def tiny_batches(tiny_spec: RunSpec, tiny_tokenizer: Tokenizer) -> list[Batch]:
    """Three batches of four examples."""
    stream = ExampleStream(tiny_spec, tiny_tokenizer, peer_seed=1)
    return [stream.next_batch(4) for _ in range(3)]


@pytest.fixture(scope="session")
def identity(tmp_path_factory: pytest.TempPathFactory) -> PeerIdentity:
    """The key of a volunteer's peer."""
    return PeerIdentity(tmp_path_factory.mktemp("identity") / "peer.key")


@pytest.fixture(scope="session")
def other_identity(tmp_path_factory: pytest.TempPathFactory) -> PeerIdentity:
    return PeerIdentity(tmp_path_factory.mktemp("identity") / "peer.key")


@pytest.fixture
def kantha(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the entry point of the `kantha` command; returns exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kantha", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            command_line.main()
        captured = capsys.readouterr()
        code = exited.value.code
        return (code if isinstance(code, int) else 0), captured.out, captured.err

    return run


class FakeEngine:
    """What a coordinator asks of its engine: a replica in a swarm that the test makes up."""

    def __init__(self) -> None:
        self.round = 0
        self.lineage = ""
        self.lineages: dict[int, str] = {}
        self.shares: dict[int, dict[str, float]] = {}
        self.learning_rates: dict[int, float] = {}
        self.is_ready = True
        self.roster = Roster()
        self.target, self.learning_rate = 64, 1e-2
        self.schedule_state = ScheduleState()
        self.orders: list[str] = []

    def give_order(self, order: str) -> None:
        self.orders.append(order)

    def hold(self) -> AbstractContextManager[int]:
        return nullcontext(0)


class _WebCoordinator(Coordinator):
    """All of a coordinator that its web service asks, and one run after the other; it has an address, but no swarm."""

    def __init__(self) -> None:
        self.address = "http://127.0.0.1:8600"
        self._addresses = [BOOTSTRAP]
        self.sign_in = "local"
        self._lock = threading.Lock()

    def take(self, run: RunDirectory) -> None:
        self.run = run
        self._notifier = Notifier(run.keys, self.address, run.spec.name, print)
        self._open_books()
        self._status = None
        self._checkpoint_round = 0
        self._here = {}
        self._handed_in = {}
        self._order_written = self._said_annealed = None
        self._stop = threading.Event()
        self._engine = FakeEngine()


@pytest.fixture(scope="session")
def _web_coordinator() -> _WebCoordinator:
    return _WebCoordinator()


@pytest.fixture
def web_coordinator(_web_coordinator: _WebCoordinator, run_path: Path) -> Iterator[Coordinator]:
    _web_coordinator.take(RunDirectory.open(run_path))
    yield _web_coordinator
    _web_coordinator._notifier.close()
    _web_coordinator.ledger.close()


@pytest.fixture(scope="session")
def _web_app(_web_coordinator: _WebCoordinator, tiny_run: RunDirectory) -> FastAPI:
    _web_coordinator.run = tiny_run  # for its key of the sessions, which all copies have
    return build_app(_web_coordinator)  # once: compressing the page's scripts takes its time


@pytest.fixture
def web_app(_web_app: FastAPI, web_coordinator: Coordinator) -> FastAPI:
    """The web service of `web_coordinator`."""
    _web_app.state.site.forget_kept()  # of the run before
    return _web_app


@pytest.fixture
def coordinator_url(web_app: FastAPI) -> Iterator[str]:
    """The link of a run that is really served, on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(web_app, log_level="warning", proxy_headers=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def free_port() -> int:
    """A port on which nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts peers without a model, each a process of its own."""
    yield from starting(tmp_path)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server of the tests' own."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    server = PostgresServer(programs)
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    """Of a database of each kind, empty."""
    if request.param == "sqlite":
        yield tmp_path / "ledger.sqlite"
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    url = postgres.make_database()
    yield url
    postgres.take_back(url)


@pytest.fixture
def database(place: Path | str) -> Iterator[Database]:
    """Empty, of each kind."""
    database = Database(place)
    yield database
    database.close()
