"""How a volunteer gets the run's state, and what it does when a process that it needs is gone."""

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer

from kantha.api import RunDescription
from kantha.coordinator.service import Coordinator
from kantha.corpus import Batch, ExampleStream, Feed
from kantha.errors import DigestError, ProcessEndedError
from kantha.spec import RunSpec, ScheduleState
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import RunKey, Trust
from kantha.swarm.reports import FailedRound, Roster
from kantha.swarm.rounds import Phase
from kantha.swarm.rounds_engine import RoundResult
from kantha.training import Replica, Trainer
from kantha.volunteer import join as module
from kantha.volunteer.client import CoordinatorClient
from kantha.volunteer.console import VolunteerConsole
from kantha.volunteer.folders import PeerFolder
from kantha.volunteer.join import JoinOptions, fetch_tokenizer, join, load_state, open_stream, train
from kantha.volunteer.membership import Applicant, News, enter
from kantha.volunteer.session import Session


def news(trust: Trust | None = None) -> News:
    return News(trust or Trust("0f" * 32, "0f" * 32), PeerFolder("0f" * 32, "Asha"))


class FakeEngine:
    """Weights arrive after so many looks, if ever."""

    def __init__(self, looks: int | None) -> None:
        self.looks = looks
        self.loading: tuple[str, int, int] | None = None
        self.taken_over: tuple[list[torch.Tensor], int, str] | None = None

    def wait_weights(self, _timeout: float) -> bool:
        if self.looks is None:
            return False
        self.looks -= 1
        self.loading = ("weights", 10 - self.looks, 10)
        return self.looks <= 0

    def take_over(
        self, parameters: list[torch.Tensor], _optimizer: object, round_number: int, lineage: str, _state: object
    ) -> None:
        self.taken_over = parameters, round_number, lineage


def load(url: str, coordinator: Coordinator, engine: FakeEngine, identity: PeerIdentity) -> str:
    folder, said = PeerFolder(coordinator.run.spec.fingerprint, "Asha"), io.StringIO()
    with CoordinatorClient(url) as client:
        _, spec = client.describe()
        applicant = Applicant(identity, spec.fingerprint, "local", "own machine", "Asha")
        trust = Trust(spec.fingerprint, coordinator.run.key().public_key)
        enter(client, trust, applicant, Console(quiet=True), threading.Event())
        load_state(client, spec, folder, engine, Console(file=said), identity)  # type: ignore[arg-type]
    return said.getvalue()


def test_the_state_that_peers_give_is_not_downloaded(
    coordinator_url: str, web_coordinator: Coordinator, identity: PeerIdentity
) -> None:
    engine = FakeEngine(looks=3)
    assert load(coordinator_url, web_coordinator, engine, identity) == ""
    assert engine.taken_over is None
    assert not list(PeerFolder(web_coordinator.run.spec.fingerprint, "Asha").run_folder.rglob("*.safetensors"))


def test_where_no_peer_gives_the_state_the_checkpoint_is_downloaded(
    coordinator_url: str, web_coordinator: Coordinator, identity: PeerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NO_PEER_SECONDS", 0.0)
    run, engine = web_coordinator.run, FakeEngine(looks=None)
    newer = Replica(run.spec)
    with torch.no_grad():
        for parameter in newer.parameters:
            parameter.add_(0.25)
    run.save_checkpoint(newer, 4, "after 4")
    assert "no peer gives the swarm's state" in load(coordinator_url, web_coordinator, engine, identity)
    assert engine.taken_over is not None
    parameters, number, lineage = engine.taken_over
    assert (number, lineage) == (4, "after 4")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(parameters, newer.parameters, strict=True))


def test_the_tokenizer_is_downloaded_once_and_again_where_it_is_damaged(
    coordinator_url: str, web_coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PeerFolder(web_coordinator.run.spec.fingerprint, "Asha")
    with CoordinatorClient(coordinator_url) as client:
        description, _ = client.describe()
        path = fetch_tokenizer(client, description, folder)
        content = path.read_bytes()
        assert content == web_coordinator.run.tokenizer.read_bytes()
        before = path.stat().st_ino
        assert fetch_tokenizer(client, description, folder) == path
        assert path.stat().st_ino == before
        path.write_bytes(b"damaged")
        fetch_tokenizer(client, description, folder)
        assert path.read_bytes() == content
        wrong = description.tokenizer.model_copy(update={"sha256": "0f" * 32})
        with pytest.raises(DigestError):
            fetch_tokenizer(client, description.model_copy(update={"tokenizer": wrong}), folder)


def test_a_volunteer_that_comes_back_goes_on_in_its_text(tiny_spec: RunSpec, tiny_tokenizer: Tokenizer) -> None:
    folder = PeerFolder(tiny_spec.fingerprint, "Asha")
    first = open_stream(tiny_spec, tiny_tokenizer, "12D3KooWpeer", folder)
    first.next_batch(100)
    folder.save_place(first.state())
    again = open_stream(tiny_spec, tiny_tokenizer, "12D3KooWpeer", folder)
    assert torch.equal(again.next_batch(4).input_ids, first.next_batch(4).input_ids)
    for damaged in ("{", "[]", json.dumps({"window": 0, "taken": 0, "sources": [["x"] * 6]})):
        (folder.path / "data.json").write_text(damaged, encoding="utf-8")
        assert open_stream(tiny_spec, tiny_tokenizer, "12D3KooWpeer", folder).state()["window"] == 0


class SwarmOfOne:
    """What the training loop asks of an engine, which ends it after so many gradients."""

    phase, round, target, samples_per_second = Phase.COMPUTING, 0, 64, 1.0
    schedule_state = ScheduleState()

    def __init__(self, gradients: int) -> None:
        self.left, self.stop, self.samples = gradients, threading.Event(), 0
        self.failures: list[FailedRound] = []
        self.roster = Roster()
        self.results: list[RoundResult] = []
        self.looks: list[Callable[[], object]] = []  # what happens while nothing is computed, one thing a look

    def ended_round(self) -> RoundResult | None:
        if self.looks:
            self.looks.pop(0)()
        return self.results.pop(0) if self.results else None

    def hold(self) -> AbstractContextManager[int]:
        return nullcontext(0)

    def contribute(self, _gradients: list[torch.Tensor], samples: int) -> None:
        self.samples += samples
        self.left -= 1
        if self.left == 0:
            self.stop.set()

    def progress(self) -> tuple[float, float]:
        return 0.0, 1.0

    def raise_if_failed(self) -> None:
        if self.left == 0:
            self.stop.set()
        self.left -= 1


def test_ctrl_c_ends_a_volunteer_whose_text_does_not_come(
    tiny_spec: RunSpec, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TEXT_SECONDS", 0.01)
    engine, said, hangs = SwarmOfOne(gradients=3), io.StringIO(), threading.Event()
    stream = ExampleStream(tiny_spec, tiny_tokenizer, 3)
    monkeypatch.setattr(stream, "next_batch", lambda _size: hangs.wait(60.0))
    session = Session("a device", engine)  # type: ignore[arg-type]
    monkeypatch.setattr("kantha.volunteer.console._PLAIN_SECONDS", 0.0)
    screen = VolunteerConsole("tiny", "", "Asha", session, engine, news(), Console(file=said, width=200), engine.stop)  # type: ignore
    trainer, replica = Trainer(tiny_spec, torch.device("cpu")), Replica(tiny_spec)
    with Feed(stream, 8) as feed:
        folder = PeerFolder(tiny_spec.fingerprint, "Asha")
        train(feed, trainer, engine, replica, session, screen, news(), folder, engine.stop)  # type: ignore[arg-type]
        hangs.set()
    assert engine.samples == 0
    assert "waiting for text" in said.getvalue()


def test_a_batch_for_which_memory_does_not_suffice_is_told_once_and_later_ones_are_smaller(
    tiny_spec: RunSpec, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HAND_OVER_SECONDS", 0.0)  # one batch each
    engine, said, tried = SwarmOfOne(gradients=40), io.StringIO(), []
    trainer, replica = Trainer(tiny_spec, torch.device("cpu")), Replica(tiny_spec)
    step = trainer._step

    def small_device(batch: Batch, weight: float) -> Any:
        tried.append(batch.size)
        if batch.size > 3:
            raise torch.OutOfMemoryError("a device of this test")
        return step(batch, weight)

    monkeypatch.setattr(trainer, "_step", small_device)
    trainer.prepare(8, lambda line: None)
    session = Session("a small device", engine)  # type: ignore[arg-type]
    screen = VolunteerConsole(
        "tiny",
        "",
        "Asha",
        session,
        engine,
        news(),
        Console(file=said, width=200),
        engine.stop,  # type: ignore[arg-type]
    )
    with Feed(ExampleStream(tiny_spec, tiny_tokenizer, 3), trainer.micro_batch, ahead=4) as feed:
        folder = PeerFolder(tiny_spec.fingerprint, "Asha")
        train(feed, trainer, engine, replica, session, screen, news(), folder, engine.stop)  # type: ignore[arg-type]
    assert said.getvalue().splitlines() == ["memory did not suffice: from now on 2 examples at once; nothing is lost"]
    assert tried[:6] == [8, 4, 2, 2, 2, 2]
    assert set(tried[2:]) == {2}
    assert engine.samples == sum(tried[2:])  # every sample was computed, and only once
    assert engine.samples < 40 * 8  # the feed makes smaller ones by now


# ---- the run is paused


@pytest.fixture
def paused_run(tmp_path: Path) -> tuple[RunKey, Trust]:
    """What the moderators of a run sign with, and what a volunteer has heard of them: it is paused."""
    key, run = RunKey.generate(tmp_path / "run.pem"), "0f" * 32
    trust = Trust(run, key.public_key)
    trust.take(key.notify(run, {}, paused="the text is being mended").model_dump_json())
    return key, trust


def train_alone(engine: SwarmOfOne, spec: RunSpec, tokenizer: Tokenizer, heard: Trust) -> tuple[Session, str]:
    said, session = io.StringIO(), Session("a device", engine)  # type: ignore[arg-type]
    told = news(heard)
    screen = VolunteerConsole(
        "tiny",
        "",
        "Asha",
        session,
        engine,  # type: ignore[arg-type]
        told,
        Console(file=said, width=200),
        engine.stop,
    )
    trainer, replica = Trainer(spec, torch.device("cpu")), Replica(spec)
    with Feed(ExampleStream(spec, tokenizer, 3), 2) as feed:
        folder = PeerFolder(spec.fingerprint, "Asha")
        train(feed, trainer, engine, replica, session, screen, told, folder, engine.stop)  # type: ignore[arg-type]
    return session, said.getvalue()


def test_a_volunteer_of_a_paused_run_computes_nothing_until_it_goes_on(
    tiny_spec: RunSpec,
    tiny_tokenizer: Tokenizer,
    paused_run: tuple[RunKey, Trust],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_HAND_OVER_SECONDS", 0.0)
    monkeypatch.setattr(module, "_PAUSED_SECONDS", 0.01)
    key, trust = paused_run
    engine, seen = SwarmOfOne(gradients=3), []

    def look() -> None:
        seen.append(engine.samples)
        if len(seen) == 2:  # the round that was being averaged
            engine.results.append(RoundResult(round=8, lineage="x", samples=0, peers=3, lost=0))
        if len(seen) == 4:
            trust.take(key.notify(trust.run, {}, after=trust.number).model_dump_json())

    engine.looks = [look] * 4
    session, said = train_alone(engine, tiny_spec, tiny_tokenizer, trust)
    assert seen == [0, 0, 0, 0]
    assert engine.samples == 3 * 2, "it goes on when the run does"
    lines = said.splitlines()
    assert "the text is being mended" in lines[0]
    assert "goes on by itself" in lines[0]
    assert "round 8" in lines[1]
    assert lines[2:] == ["▶ the run goes on"]
    assert session.state == "training"


def test_a_volunteer_of_a_paused_run_may_leave(
    tiny_spec: RunSpec,
    tiny_tokenizer: Tokenizer,
    paused_run: tuple[RunKey, Trust],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PAUSED_SECONDS", 0.01)
    engine = SwarmOfOne(gradients=3)
    engine.looks = [lambda: None, engine.stop.set]
    _, said = train_alone(engine, tiny_spec, tiny_tokenizer, paused_run[1])
    assert engine.samples == 0
    assert "▶" not in said


def test_the_time_of_a_pause_is_not_lost_to_the_network(
    tiny_spec: RunSpec,
    tiny_tokenizer: Tokenizer,
    paused_run: tuple[RunKey, Trust],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_HAND_OVER_SECONDS", 0.0)
    monkeypatch.setattr(module, "_PAUSED_SECONDS", 30.0)
    key, trust = paused_run
    engine, clock = SwarmOfOne(gradients=2), time.monotonic

    def resume(*_: object) -> None:
        monkeypatch.setattr("kantha.volunteer.join.time.monotonic", lambda: clock() + 1000.0)
        trust.take(key.notify(trust.run, {}, after=trust.number).model_dump_json())

    monkeypatch.setattr(engine.stop, "wait", resume)
    session, _ = train_alone(engine, tiny_spec, tiny_tokenizer, trust)
    assert session.pace
    assert session._total.waited < 100.0


# ---- who joins


def test_where_people_sign_in_no_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    console = Console(file=said, width=200)
    monkeypatch.setattr("getpass.getuser", lambda: "user-of-this-machine")
    local, remote = (RunDescription.model_construct(sign_in=how) for how in ("local", "huggingface"))
    assert module._name(local, JoinOptions("Asha"), console) == "Asha"
    assert module._name(local, JoinOptions(), console) == "user-of-this-machine"
    assert module._name(remote, JoinOptions(), console) == ""
    assert said.getvalue() == ""
    assert module._name(remote, JoinOptions("Asha"), console) == ""
    assert "--name is not used" in said.getvalue()


def test_the_command_line_hands_on_what_was_said(
    kantha: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = []
    monkeypatch.setattr(module, "join", lambda url, options, console: joined.append((url, options)))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert kantha("join", "https://run.example.org", "--token", "--take-over")[0] == 0
    assert kantha("join", "127.0.0.1:1", "--name", "আশা", "--threads", 2)[0] == 0
    assert joined == [
        ("https://run.example.org", JoinOptions(token=True, take_over=True)),
        ("127.0.0.1:1", JoinOptions("আশা", threads=2)),
    ]


# ---- a process that is gone


class Started(Exception):
    """Another program was started in place of this one."""


def gone(*_: Any) -> None:
    raise ProcessEndedError("a swarm process of this machine ended unexpectedly; start again")


def test_a_volunteer_whose_swarm_process_ended_starts_itself_again_three_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(program: str, arguments: list[str]) -> None:
        raise Started(program, arguments)

    monkeypatch.setattr(module, "_join", gone)
    monkeypatch.setattr(os, "execv", start)
    monkeypatch.setattr(sys, "argv", ["kantha", "join", "http://127.0.0.1:1", "--name", "Asha"])
    monkeypatch.setenv("KANTHA_RESTARTS", "0")
    said = io.StringIO()
    for number in range(3):
        with pytest.raises(Started) as started:
            join("http://127.0.0.1:1", JoinOptions("Asha"), Console(file=said))
        program, arguments = started.value.args
        assert arguments == [program, "-m", "kantha", "join", "http://127.0.0.1:1", "--name", "Asha"]
        assert os.environ["KANTHA_RESTARTS"] == str(number + 1)
    with pytest.raises(ProcessEndedError) as caught:
        join("http://127.0.0.1:1", JoinOptions("Asha"), Console(file=said))
    assert caught.value.exit_code == 27
    assert said.getvalue().count("starting again …") == 3
