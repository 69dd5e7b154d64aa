"""Every error is one line on stderr and an exit code that docs/exit-codes.md explains."""

import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kantha import errors
from kantha.cli import demo as command_line_demo
from kantha.coordinator.rundir import RunDirectory
from kantha.errors import KanthaError
from kantha.spec import PRESETS, load_spec

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit-codes.md"
BAD_SPEC = "name: x\nseed: many\nmodel:\n  layers: 0\ndata:\n  sources:\n  - kind: shobdo\n  - kind: newspaper\n"


def all_errors(base: type[KanthaError] = KanthaError) -> Iterator[type[KanthaError]]:
    """Those with an exit code of their own; another one ends a program like the error that it is a kind of."""
    if "exit_code" in vars(base):
        yield base
    for error in base.__subclasses__():
        if error.__module__.startswith("kantha"):
            yield from all_errors(error)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


Kantha = Callable[..., tuple[int, str, str]]  # the fixture


def process(*arguments: object) -> tuple[int, str, str]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "kantha", *map(str, arguments)], capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stdout, done.stderr


def assert_one_line(error: str, *parts: str) -> None:
    lines = error.splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith("kantha: ")
    for part in parts:
        assert part in lines[0]


# ---- as the shell sees it


def test_joining_where_nobody_answers(free_port: int) -> None:
    url = f"http://127.0.0.1:{free_port}"
    code, _, error = process("join", url)
    assert code == 20
    assert_one_line(error, url, "check the address")


def test_serving_on_a_port_that_is_taken(run_path: Path, taken_port: int) -> None:
    code, _, error = process("serve", run_path, "--port", taken_port)
    assert code == 15
    assert_one_line(error, f"port {taken_port}", "--port")


# ---- the same entry point, without a process


def test_serving_what_is_no_run(kantha: Kantha, tmp_path: Path) -> None:
    code, _, error = kantha("serve", tmp_path / "none")
    assert code == 11
    assert_one_line(error, str(tmp_path / "none"), "kantha create")


def test_serving_a_run_of_a_newer_kantha(kantha: Kantha, run_path: Path) -> None:
    (run_path / "run.json").write_text('{"format": 99}')
    code, _, error = kantha("serve", run_path)
    assert code == 12
    assert_one_line(error, "pip install --upgrade kantha")


def test_serving_a_run_of_an_older_kantha(kantha: Kantha, run_path: Path) -> None:
    file = run_path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    code, _, error = kantha("serve", run_path)
    assert code == 11
    assert_one_line(error, "older Kantha", "kantha create")


@pytest.mark.parametrize("option", ["--port", "--p2p-port"])
@pytest.mark.parametrize("port", [65_536, -1])
def test_serving_on_a_port_that_does_not_exist(
    kantha: Kantha, run_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, port: int
) -> None:
    monkeypatch.setattr("kantha.web.serve.log_to_file", lambda _: None)  # it would redirect this process's log
    other = "--p2p-port" if option == "--port" else "--port"
    code, _, error = kantha("serve", run_path, other, 0, f"{option}={port}")
    assert code == 2
    assert option in error
    assert "Traceback" not in error


def test_creating_from_a_bad_spec_tells_every_mistake(kantha: Kantha, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BAD_SPEC)
    code, _, error = kantha("create", path, tmp_path / "run")
    assert code == 10
    first, *others = error.splitlines()
    lines = [first.removeprefix("kantha: "), *others]
    places = [line.removeprefix(f"{path}: ").split(" ")[:3] for line in lines]
    assert places == [["line", "2:", "seed:"], ["line", "4:", "model.layers:"], ["line", "8:", "data.sources[1]:"]]
    assert not (tmp_path / "run").exists()


def test_creating_from_no_file(kantha: Kantha, tmp_path: Path) -> None:
    code, _, error = kantha("create", tmp_path / "none.yaml", tmp_path / "run")
    assert code == 10
    assert_one_line(error, "none.yaml", "kantha init")


def test_creating_without_text(kantha: Kantha, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\ndata: {sources: [{kind: file, path: gone.txt}]}\n")
    code, _, error = kantha("create", path, tmp_path / "run")
    assert code == 13
    assert_one_line(error, "gone.txt")


def test_exporting_what_is_no_run(kantha: Kantha, tmp_path: Path) -> None:
    code, _, error = kantha("export", tmp_path, tmp_path / "model")
    assert code == 11
    assert_one_line(error, str(tmp_path))


def test_joining_a_page_of_another_kind(kantha: Kantha) -> None:
    code, _, error = kantha("join", "ftp://example.org")
    assert code == 20
    assert_one_line(error, "ftp://example.org")


def test_a_path_with_markup_or_a_long_name_stays_one_line_as_it_is(kantha: Kantha, tmp_path: Path) -> None:
    path = tmp_path / "[bold]" / ("long name " * 20)
    code, _, error = kantha("export", path, tmp_path / "model")
    assert code == 11
    assert_one_line(error, str(path))


def test_a_wrong_command_line(kantha: Kantha) -> None:
    for arguments in (["dance"], ["join"], ["join", "x", "--threads", "0"], ["init", "--preset", "none"]):
        code, _, error = kantha(*arguments)
        assert code == 2
        assert "Traceback" not in error


def test_ctrl_c(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    os.mkfifo(text)  # whoever reads it waits
    (tmp_path / "run.yaml").write_text(f"name: x\ndata: {{sources: [{{kind: file, path: {text}}}]}}\n")
    command = [sys.executable, "-m", "kantha", "create", tmp_path / "run.yaml", tmp_path / "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "training the tokenizer" in process.stdout.readline()
        deadline = time.monotonic() + 30.0
        # a signal that comes just before a call that blocks is not seen until the call ends
        while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "kantha: stopped\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "text.txt"]


@pytest.mark.parametrize("failure", [OSError, KeyError, ImportError])
def test_joining_as_a_user_without_a_name(
    kantha: Kantha, coordinator_url: str, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    def nobody() -> str:
        raise failure("no such user")

    monkeypatch.setattr(getpass, "getuser", nobody)
    code, _, error = kantha("join", coordinator_url)
    assert code == 24
    assert_one_line(error, "--name")


@pytest.mark.parametrize("option", ["--out", "--report"])
def test_a_demo_that_could_not_write_is_not_begun(kantha: Kantha, tmp_path: Path, option: str) -> None:
    (tmp_path / "file").touch()
    place = {"--out": tmp_path / "demo", "--report": tmp_path / "report.json"}
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        if option == "--report" and wrong.name == "file":
            wrong = tmp_path  # a report is a file: a folder stands in its way
        places = {**place, option: wrong}
        code, out, error = kantha("demo", *(part for pair in places.items() for part in pair))
        assert code == 16
        assert_one_line(error, str(wrong))
        assert out == ""


def test_a_demo_waits_for_its_processes_as_long_as_averaging_may_take(
    kantha: Kantha, tiny_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(patience: float, _say: object) -> None:
        raise KanthaError(f"{patience:g} seconds")

    monkeypatch.setattr(RunDirectory, "create", lambda *_: tiny_run)
    monkeypatch.setattr(command_line_demo, "_children", told)
    _, _, error = kantha("demo", "--out", tmp_path / "demo")
    assert error == f"kantha: {4 * tiny_run.spec.swarm.averaging_timeout + 30:g} seconds\n"


def test_a_demo_asks_its_coordinator_without_a_proxy(
    coordinator_url: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port}")
    assert command_line_demo._status(coordinator_url) is not None


def test_a_demo_counts_volunteers_of_one_name_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = SimpleNamespace(
        rounds=lambda: [
            SimpleNamespace(round=1, samples=5, loss=6.5, failed=False),
            SimpleNamespace(round=2, samples=2, loss=None, failed=True),
        ],
        members=lambda: {"a": "Asha", "b": "Asha", "c": "Mitu"},
        samples_by_peer=lambda: {"a": 3, "b": 4},
        computing_share=lambda: 0.99,
        close=lambda: None,
    )
    monkeypatch.setattr(command_line_demo, "Ledger", lambda _: ledger)
    monkeypatch.setattr(command_line_demo, "open_database", lambda _: None)
    run: Any = SimpleNamespace(spec=SimpleNamespace(fingerprint="f" * 64))
    peer = tmp_path / "home" / ("f" * 16) / "Asha-0"
    peer.mkdir(parents=True)
    (peer / "given.json").write_text('{"samples": 7}')
    figures = command_line_demo._figures(run, 1.0, 1.0, tmp_path, 1.0)
    assert figures["samples_by_their_own_count"] == 7
    assert figures["samples_per_volunteer"] == {"Asha": 7, "Mitu": 0}
    assert figures["volunteers"] == 3
    assert figures["computing_share"] == 0.99
    assert (figures["rounds"], figures["samples"], figures["failed_rounds"]) == (2, 7, 1)
    assert figures["train_loss"] == [[1, 6.5]]  # of the other it is not known


def test_a_new_spec_can_be_used_and_is_not_overwritten(kantha: Kantha, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    code, out, error = kantha("init", path, "--preset", "albert-base")
    assert (code, error) == (0, "")
    assert str(path) in out
    assert load_spec(path) == PRESETS["albert-base"]
    code, _, error = kantha("init", path)
    assert code == 10
    assert_one_line(error, str(path), "exists already")
    assert load_spec(path) == PRESETS["albert-base"]


# ---- the codes


def test_no_two_errors_share_an_exit_code() -> None:
    codes = [error.exit_code for error in all_errors()]
    assert len(codes) > 10
    assert len(set(codes)) == len(codes)
    assert not {0, 2, 130} & set(codes)  # success, usage, Ctrl-C
    assert all(0 < code < 126 for code in codes)


def test_every_exit_code_is_explained() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\d+) — (.+)\n(?!\n*(?:## |\Z))", text, re.MULTILINE))
    for error in all_errors():
        assert sections.pop(str(error.exit_code), None) == error.__name__
    assert sections.keys() <= {"0", "2", "130"}


def test_the_overview_in_the_source_is_true() -> None:
    listed = dict(re.findall(r"[├└]── (\w+) +(\d+)  ", errors.__doc__ or ""))
    assert listed == {error.__name__: str(error.exit_code) for error in all_errors() if error is not KanthaError}
