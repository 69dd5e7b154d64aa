import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kantha.coordinator import limiter
from kantha.coordinator.rundir import RunDirectory
from kantha.errors import (
    KanthaError,
    MissingPackageError,
    PortTakenError,
    ProcessEndedError,
    RunDirectoryError,
    StorageError,
    SwarmError,
    UnreachableError,
)
from kantha.web import serve as module


class FakeCoordinator:
    """Does what the test wants when it is started."""

    started: Callable[["FakeCoordinator"], None]
    stopped = False
    resumed_from = 0
    failure: Exception | None = None
    on_failure: Callable[[], None]

    def __init__(
        self,
        run: Any,
        host: str,
        p2p_port: int,
        address: str,
        say: Callable[[str], None],
        sign_in: str,
        wandb: str | None,
    ) -> None:
        self.run, self.address, self.sign_in, self.wandb = run, address, sign_in, wandb

    def start(self) -> None:
        type(self).started(self)

    def stop(self) -> None:
        type(self).stopped = True
        if self.failure is not None:
            raise RuntimeError("what came of the failure")

    def status(self) -> None:
        raise AssertionError

    def fail(self, error: KanthaError | None = None) -> None:
        self.failure = error or SwarmError("the swarm is lost")
        self.on_failure()


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeCoordinator]]:
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(module, "Coordinator", FakeCoordinator)
    monkeypatch.setattr(module, "log_to_file", lambda _: None)
    monkeypatch.setattr(module, "_PORT_SECONDS", 0.2)
    monkeypatch.setattr(FakeCoordinator, "stopped", False)
    yield FakeCoordinator
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def serve(path: Path, host: str = "127.0.0.1", port: int = 0, **options: Any) -> list[str]:
    said: list[str] = []
    module.serve(path, host, port, None, said.append, **options)
    return said


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_thread_that_fails_ends_the_program_with_its_error(
    coordinator: type[FakeCoordinator], run_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    def started(one: FakeCoordinator) -> None:
        threading.Timer(seconds, one.fail).start() if seconds else one.fail()

    monkeypatch.setattr(coordinator, "started", started, raising=False)
    with pytest.raises(SwarmError, match="the swarm is lost"):
        serve(run_path)
    assert coordinator.stopped


@pytest.mark.parametrize(("restarts", "starts_again"), [(0, True), (2, True), (3, False)])
def test_where_a_swarm_process_ended_it_starts_itself_again_and_gives_up_at_last(
    coordinator: type[FakeCoordinator],
    run_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts: int,
    starts_again: bool,
) -> None:
    started: list[list[str]] = []

    def start(_program: str, arguments: list[str]) -> None:
        assert coordinator.stopped
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(coordinator, "started", lambda one: one.fail(ProcessEndedError("p2pd ended")), raising=False)
    monkeypatch.setattr(os, "execv", start)
    monkeypatch.setattr(sys, "argv", ["kantha", "serve", str(run_path)])
    monkeypatch.setenv("KANTHA_RESTARTS", str(restarts))
    with pytest.raises(SystemExit if starts_again else ProcessEndedError):
        serve(run_path)
    assert started == ([[sys.executable, "-m", "kantha", "serve", str(run_path)]] if starts_again else [])


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_the_start_on_ends_it_in_order(
    coordinator: type[FakeCoordinator], run_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    monkeypatch.setattr(coordinator, "started", lambda _: signal.raise_signal(signum), raising=False)
    assert serve(run_path)[-1] == "stopped"
    assert coordinator.stopped


@pytest.mark.parametrize(("host", "link"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("0:0::1", "[::1]")])
def test_the_link_of_a_run_answers(
    coordinator: type[FakeCoordinator], run_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, link: str
) -> None:
    answers: list[int] = []

    def started(one: FakeCoordinator) -> None:
        def ask() -> None:
            answers.append(httpx.get(f"{one.address}/api/v1/tokenizer.json").status_code)
            one.on_failure()

        threading.Thread(target=ask).start()

    monkeypatch.setattr(coordinator, "started", started, raising=False)
    try:
        said = serve(run_path, host)
    except PortTakenError:
        pytest.skip("no IPv6 here")
    assert answers == [200]
    assert said[1].startswith(f"the run's page: http://{link}:")


@pytest.mark.parametrize("host", ["localhost", "example.org", "", "1.2.3", "*"])
def test_a_host_that_is_no_address_is_told(run_path: Path, host: str) -> None:
    with pytest.raises(UnreachableError, match="not an IP address"):
        serve(run_path, host)


# ---- who may join


def left_at_once(coordinator: type[FakeCoordinator], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "started", lambda one: one.on_failure(), raising=False)


def test_on_one_machine_people_join_by_name(
    coordinator: type[FakeCoordinator], run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_at_once(coordinator, monkeypatch)
    said = serve(run_path)
    assert said[2].startswith("to join:        kantha join http://127.0.0.1:")
    assert said[2].endswith(" --name YOUR-NAME")


@pytest.mark.parametrize(
    ("host", "address", "link"),
    [
        ("0.0.0.0", "https://kantha.example/", "https://kantha.example"),
        ("0.0.0.0", "https://kantha.example:8443/bn", "https://kantha.example:8443/bn"),
        ("127.0.0.1", "http://localhost:8600", "http://localhost:8600"),
        ("127.0.0.1", "http://[::1]:8600", "http://[::1]:8600"),
        ("127.0.0.1", None, "http://127.0.0.1:"),
    ],
)
def test_where_people_sign_in_they_join_by_the_public_link_with_the_run_s_key(
    coordinator: type[FakeCoordinator],
    run_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    address: str | None,
    link: str,
) -> None:
    left_at_once(coordinator, monkeypatch)
    said = serve(run_path, host, sign_in="huggingface", address=address)
    assert said[1].startswith(f"the run's page: {link}")
    assert said[2].startswith(f"to join:        kantha join {link}")
    assert said[2].endswith(f"#{RunDirectory.open(run_path).key().public_key}")


@pytest.mark.parametrize(
    ("host", "sign_in", "address", "reason"),
    [
        ("0.0.0.0", "huggingface", None, "--address https://"),
        ("127.0.0.1", "huggingface", "http://kantha.example", "https:// only"),
        ("127.0.0.1", "huggingface", "http://127.0.0.1.kantha.example", "https:// only"),
        ("127.0.0.1", "local", "https://kantha.example", "--sign-in huggingface"),
        ("127.0.0.1", "huggingface", "kantha.example", "not a link"),
        ("127.0.0.1", "huggingface", "ftp://kantha.example", "not a link"),
        ("127.0.0.1", "huggingface", "https://", "not a link"),
        ("127.0.0.1", "huggingface", "https://[::1", "not a link"),
        ("127.0.0.1", "huggingface", "https://kantha.example:99999", "not a link"),
        ("127.0.0.1", "huggingface", "https://user:secret@kantha.example", "not a link"),
        ("127.0.0.1", "huggingface", "https://kantha.example/#a", "not a link"),
        ("127.0.0.1", "huggingface", "https://kantha.example/?a=b", "not a link"),
        ("127.0.0.1", "huggingface", "https://kantha.example/\n", "not a link"),
    ],
)
def test_a_link_that_people_cannot_use_is_refused(
    run_path: Path, host: str, sign_in: str, address: str | None, reason: str
) -> None:
    with pytest.raises(UnreachableError, match=reason) as caught:
        serve(run_path, host, sign_in=sign_in, address=address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["oauth.json", "session.key"])
def test_a_secret_that_cannot_be_used_is_told_before_anything_is_forked(
    run_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(module, "Coordinator", lambda *_: pytest.fail("it has begun"))
    (run_path / "keys" / name).write_text("{")
    (run_path / "keys" / name).chmod(0o600)
    with pytest.raises(RunDirectoryError, match=name):
        serve(run_path, sign_in="huggingface")


@pytest.mark.parametrize(
    ("sign_in", "client", "is_said"), [("local", "", False), ("huggingface", "", True), ("huggingface", "a", False)]
)
def test_a_run_without_a_client_says_that_browsers_cannot_sign_in(
    coordinator: type[FakeCoordinator],
    run_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sign_in: str,
    client: str,
    is_said: bool,
) -> None:
    left_at_once(coordinator, monkeypatch)
    if client:
        monkeypatch.setenv("KANTHA_OAUTH_CLIENT_ID", client)
        monkeypatch.setenv("KANTHA_OAUTH_CLIENT_SECRET", "canary")
    said = serve(run_path, sign_in=sign_in)
    assert any("oauth.json" in line and "--token" in line for line in said) == is_said


@pytest.mark.parametrize(("sign_in", "status"), [("huggingface", 422), ("local", 403)])
def test_a_proxy_on_this_machine_is_believed_where_people_come_from_anywhere(
    coordinator: type[FakeCoordinator],
    run_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sign_in: str,
    status: int,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(limiter, "network_of", lambda address: seen.append(address) or address)
    answers: list[int] = []

    def started(one: FakeCoordinator) -> None:
        def ask() -> None:
            headers = {"X-Forwarded-For": "198.51.100.1, 203.0.113.5"}
            answers.append(httpx.post(f"{one.address}/api/v1/departures", json={}, headers=headers).status_code)
            one.on_failure()

        threading.Thread(target=ask).start()

    monkeypatch.setattr(coordinator, "started", started, raising=False)
    serve(run_path, sign_in=sign_in)
    assert answers == [status]
    assert seen == (["203.0.113.5"] if status == 422 else [])  # whom the proxy saw, not whom that one claims to be


def test_a_log_that_cannot_be_written_is_told(run_path: Path) -> None:
    (run_path / "log").write_text("in the way")
    with pytest.raises(StorageError, match=r"coordinator\.log") as caught:
        serve(run_path)
    assert isinstance(caught.value, KanthaError)


# ---- ports


def test_of_two_that_start_together_only_one_gets_the_port(coordinator: type[FakeCoordinator]) -> None:
    with module._bind("127.0.0.1", 0, "--port") as first:
        port = first.getsockname()[1]
        with pytest.raises(PortTakenError, match=f"port {port} of 127.0.0.1 is used") as caught:
            module._bind("127.0.0.1", port, "--port")
        assert caught.value.exit_code == 15


def test_connections_of_the_program_before_do_not_hold_the_port(coordinator: type[FakeCoordinator]) -> None:
    with module._bind("127.0.0.1", 0, "--port") as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # the side that closes first keeps the connection, in TIME_WAIT
    module._bind("127.0.0.1", port, "--port").close()


def test_children_of_a_coordinator_that_is_dying_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dying = module._bind("127.0.0.1", 0, "--port")
    port = dying.getsockname()[1]
    threading.Timer(0.3, dying.close).start()
    module._bind("127.0.0.1", port, "--port").close()


@pytest.mark.parametrize("project", [None, "village/albert"])
def test_a_mirror_is_made_where_it_is_asked_for(
    run_path: Path, coordinator: type[FakeCoordinator], monkeypatch: pytest.MonkeyPatch, project: str | None
) -> None:
    asked: list[str | None] = []

    def started(one: FakeCoordinator) -> None:
        asked.append(one.wandb)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(coordinator, "started", started, raising=False)
    serve(run_path, wandb=project)
    assert asked == [project]


def test_a_mirror_takes_a_package_which_is_told_before_anything_starts(
    run_path: Path, coordinator: type[FakeCoordinator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kantha\[wandb\]'"):
        serve(run_path, wandb="albert")
