"""Web servers on loopback for the volunteer's tests: one that says anything, and a coordinator's desk for members."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import Certificate, RunKey

RUN = "0f" * 32
DEADLINE = 30.0
Answer = tuple[int, dict[str, Any]] | Callable[["Request"], None]


class Request(http.server.BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        self.server.answer(self)

    do_POST = do_GET

    def say(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """Any web server; `answer` decides what it says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.ranges: list[str | None] = []
        self.answer: Callable[[Request], None] = lambda request: request.say(b"not found", 404)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


class Desk:
    """Where members ask: it gives one answer after the other, and the last one for ever."""

    def __init__(self, server: Server, key: RunKey, *answers: Answer) -> None:
        self.key = key
        self.url = server.url
        self.answers = list(answers)
        self.departure: Answer = (204, {})
        self.arrived: list[tuple[str, Any]] = []  # path and content
        self._changed = threading.Condition()
        server.answer = self._answer

    def then(self, *answers: Answer) -> None:
        """From now on."""
        with self._changed:
            self.answers = list(answers)

    def wait_for(self, count: int, path: str = "") -> None:
        """Until so many requests have come from now on."""
        with self._changed:
            goal = len(self.to(path)) + count
            assert self._changed.wait_for(lambda: len(self.to(path)) >= goal, DEADLINE), self.arrived

    def to(self, path: str) -> list[Any]:
        return [content for where, content in self.arrived if where.endswith(path)]

    def _answer(self, request: Request) -> None:
        content = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self._changed:
            if request.path.endswith("/departures"):
                answer = self.departure
            else:
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            self.arrived.append((request.path, content))
            self._changed.notify_all()
        if callable(answer):
            answer(request)
        else:
            status, body = answer
            request.say(json.dumps(body).encode() if status != 204 else b"", status)

    # ---- what it may say

    def certify(self, identity: PeerIdentity, username: str = "asha", lifetime: int = 3600) -> Certificate:
        return self.key.certify(RUN, username, identity.peer_id, lifetime=lifetime)

    def admission(self, certificate: Certificate, notice: str = "", seconds: float = 0.01) -> Answer:
        return 201, {"certificate": certificate.model_dump(), "notice": notice, "renew_seconds": seconds}


def sign_in(code: str = "ABCD-EFGH", path: str | None = None, expires: float = 0.0) -> Answer:
    return 202, {
        "state": "sign_in",
        "message": f"Sign in with a browser, and confirm that this machine shows {code}.",
        "code": code,
        "path": f"pair?code={code}" if path is None else path,
        "expires": expires,
        "poll_seconds": 0.01,
    }


def asked(message: str = "⏳ Asked. A moderator has to let you in.") -> Answer:
    return 202, {"state": "asked", "message": message, "poll_seconds": 0.01}


def refused(reason: str, status: int = 403) -> Answer:
    return status, {"detail": reason}


def hang_up(request: Request) -> None:
    request.close_connection = True
