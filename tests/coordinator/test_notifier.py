"""Messages to a chat, over a real HTTP server and Apprise's own json:// service."""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from canaries import CHAT as SECRET

from kantha.coordinator.notifier import ADDRESSES, Notifier
from kantha.errors import RunDirectoryError


class Chat(ThreadingHTTPServer):
    """Takes messages, or refuses them with `status`."""

    def __init__(self) -> None:
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.status = 200
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"json://user:{SECRET}@127.0.0.1:{self.server_port}/{SECRET}"


class _Handler(BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        self.server.messages.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def chat() -> Iterator[Chat]:
    with Chat() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def said() -> list[str]:
    return []


Make = Callable[..., Notifier]


@pytest.fixture
def notifier(tmp_path: Path, said: list[str]) -> Iterator[Make]:
    made: list[Notifier] = []

    def make(gather: float = 0.0) -> Notifier:
        made.append(Notifier(tmp_path, "https://kantha.example", "bengali-albert", said.append, gather))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()


def write(path: Path, text: str, mode: int = 0o600) -> None:
    path.touch(mode=mode)
    path.write_text(text)


def test_requests_that_come_together_are_one_message(
    chat: Chat, notifier: Make, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESSES, chat.address)
    one = notifier(gather=60.0)
    for name in ("asha", "mitu", "rahim"):
        one.tell(name)
    one.close()  # sends what waits
    message = chat.messages.get(timeout=10)
    assert message["title"] == "bengali-albert: 3 ask to join"
    for part in ("asha, mitu, rahim", "https://kantha.example/desk"):
        assert part in message["message"]
    assert chat.messages.empty()
    assert said == []


def test_a_later_request_is_another_message_and_all_addresses_are_told(
    chat: Chat, notifier: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESSES, chat.address)
    write(tmp_path / "notify.txt", f"# our chats\n\n{chat.address}\n")
    one = notifier()
    one.tell("asha")
    for _ in range(2):
        assert "asha asks to join" in chat.messages.get(timeout=10)["message"]
    one.tell("mitu")
    for _ in range(2):
        assert "mitu asks to join" in chat.messages.get(timeout=10)["message"]


def test_a_chat_that_refuses_is_said_once_without_its_address(
    chat: Chat,
    notifier: Make,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(ADDRESSES, f"{chat.address} nonsense://{SECRET} {SECRET}")
    chat.status = 500
    one = notifier()
    with caplog.at_level(logging.DEBUG):
        for name in ("asha", "mitu"):
            one.tell(name)
            chat.messages.get(timeout=20)
        one.close()
    assert len(said) == 1
    assert "3 of 3 addresses failed" in said[0]
    captured = capfd.readouterr()
    told = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("urllib3"))
    assert SECRET not in said[0] + told + captured.out + captured.err


def test_nobody_waits_for_a_chat_that_does_not_answer(
    notifier: Make, said: list[str], free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESSES, f"json://127.0.0.1:{free_port}")
    one = notifier()
    began = time.monotonic()
    one.tell("asha")
    assert time.monotonic() - began < 1
    one.close()
    assert len(said) == 1


def test_without_addresses_nothing_is_started(notifier: Make) -> None:
    before = threading.active_count()
    one = notifier()
    one.tell("asha")
    assert threading.active_count() == before
    one.close()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_addresses_that_others_can_read_are_refused(notifier: Make, tmp_path: Path, mode: int) -> None:
    write(tmp_path / "notify.txt", f"json://{SECRET}")
    (tmp_path / "notify.txt").chmod(mode)
    with pytest.raises(RunDirectoryError, match="chmod 600") as caught:
        notifier()
    assert SECRET not in str(caught.value)


def test_milestones_and_requests_that_come_together_are_two_messages(
    chat: Chat, notifier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESSES, chat.address)
    one = notifier(gather=60.0)
    one.announce("The model has seen 1,000 samples.")
    one.tell("asha")
    one.announce("The model has seen 10,000 samples.")
    one.close()
    messages = [chat.messages.get(timeout=10) for _ in range(2)]
    assert [message["title"] for message in messages] == [
        "bengali-albert: 1 asks to join",
        "bengali-albert: The model has seen 10,000 samples.",
    ]
    for part in ("1,000 samples.\nThe model has seen 10,000", "https://kantha.example"):
        assert part in messages[1]["message"]
    assert chat.messages.empty()
