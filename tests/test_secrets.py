"""No secret is in logs, URLs, lists of processes, or the database: looked for by known ones, as `grep` would.

Here in what a real coordinator, a real volunteer, a hub and a chat make of them, also where these refuse or fail.
canaries.py looks through what all other tests leave behind.
"""

import base64
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil
import pytest
from canaries import CHAT, CLIENT_SECRET, TOKEN
from commands import Command, wait_for
from cryptography.hazmat.primitives import serialization
from fastapi.responses import PlainTextResponse
from hub_accounts import CLIENT_ID, Accounts, serving

from kantha.coordinator.status import RunStatus
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import MembershipRequest

START_SECONDS = 120.0


class Chat(ThreadingHTTPServer):
    """Refuses every message, in words that repeat its address."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Chat)


class _Chat(BaseHTTPRequestHandler):
    server: Chat

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.path} {self.rfile.read(int(self.headers['Content-Length'])).decode()}")
        self.send_response(500)
        self.end_headers()
        self.wfile.write(f"{self.path} {self.headers.get('Authorization')}".encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def chat() -> Iterator[Chat]:
    with Chat() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub() -> Iterator[Accounts]:
    with serving() as hub:
        hub.add("asha")
        yield hub


class Watched:
    """Commands whose families' command lines are noted for as long as somebody waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Command] = []
        self.lines: set[str] = set()

    def start(self, name: str, *arguments: str) -> Command:
        self.all.append(Command(self.folder, name, *arguments))
        return self.all[-1]

    def wait(self, condition: Callable[[], object], what: str) -> None:
        def noted() -> bool:
            for command in self.all:
                try:
                    self.lines |= {" ".join(process.cmdline()) for process in command.family()}
                except psutil.NoSuchProcess:  # it, or a child that was just listed, has ended
                    continue
            return bool(condition())

        wait_for(noted, START_SECONDS, what)

    def finish(self, name: str, *arguments: str) -> Command:
        command = self.start(name, *arguments)
        self.wait(lambda: command.process.poll() is not None, f"{name} ends")
        return command

    def end(self) -> None:
        for command in self.all:
            if command.process.poll() is None:
                command.kill()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    commands = Watched(tmp_path)
    yield commands
    commands.end()


def forms(secret: bytes) -> list[bytes]:
    """As it is, and as a log or a header may have it."""
    return [secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"=")]


@pytest.mark.swarm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_secret_is_told(
    run_path: Path, tmp_path: Path, hub: Accounts, chat: Chat, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets: dict[str, list[bytes]] = {
        "client secret": forms(CLIENT_SECRET.encode()),
        "client's proof": [base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode())],
        "chat": forms(CHAT.encode()),
        "token": forms(TOKEN.encode()),  # all tokens begin with it
    }
    client = run_path / "keys" / "oauth.json"
    client.touch(mode=0o600)
    client.write_text(f'{{"client_id": "{CLIENT_ID}", "client_secret": "{CLIENT_SECRET}"}}')
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KANTHA_NOTIFY", f"json://asha:{CHAT}@127.0.0.1:{chat.server_port}/{CHAT}")
    serve = watched.start("serve", "serve", str(run_path), "--port", "0", "--sign-in", "huggingface")
    monkeypatch.delenv("KANTHA_NOTIFY")
    watched.wait(lambda: "to join:" in serve.output() or serve.process.poll() is not None, "it serves")
    address, link = (re.search(rf"{what}\s+(\S+)", serve.output()) for what in ("page:", "kantha join"))
    assert address is not None, serve.output()
    assert link is not None
    url = address[1]
    hub.redirect_uris.add(f"{url}/sign-in/callback")

    # ---- in a browser: signed in, the same answer once more, a hub that fails and repeats what it was sent
    with httpx.Client(base_url=url, timeout=30.0) as browser:

        def answer_of_the_hub() -> str:
            return hub.allow(browser.get("/sign-in?to=me").headers["location"], "asha")

        sent_back = [answer_of_the_hub()]
        assert browser.get(sent_back[0]).status_code == 303
        secrets["session"] = [browser.cookies["kantha"].encode()]
        assert browser.get(sent_back[0]).status_code == 400
        for endpoint in ("token", "userinfo"):
            hub.alter[endpoint] = lambda content: PlainTextResponse(f"no: {content} {CLIENT_SECRET}", 500)
            sent_back.append(answer_of_the_hub())
            assert browser.get(sent_back[-1]).status_code == 400
            del hub.alter[endpoint]
        secrets["authorization code"] = [parse_qs(urlsplit(each).query)["code"][0].encode() for each in sent_back]
        secrets["access token"] = [token.encode() for token in hub.access_tokens]
        assert len(secrets["access token"]) >= 2

        # ---- tokens that are no good, at the coordinator itself
        spec = browser.get("/api/v1/run").json()
        stranger = PeerIdentity(tmp_path / "stranger.key")
        for token in (hub.add_token("asha", "write"), f"{TOKEN}-unknown", TOKEN + "x" * 300, f"{TOKEN} \n", [TOKEN]):
            request = MembershipRequest.signed(stranger, spec["fingerprint"])
            refused = browser.post("/api/v1/tokens", json={"request": request.model_dump(), "token": token})
            assert refused.status_code in (403, 422)
            assert TOKEN not in refused.text
        assert browser.post("/api/v1/tokens", json={"request": {}, "token": {TOKEN: 1}}).status_code == 422
        assert browser.post("/api/v1/tokens", json=[TOKEN]).status_code == 422

    # ---- in a terminal: a token that may write, an unknown one, a hub that fails, and one that is good
    join = ("join", link[1], "--token", "--threads", "1", "--micro-batch", "4")
    for name, token in (("writes", hub.add_token("asha", "write")), ("unknown", f"{TOKEN}-unknown")):
        monkeypatch.setenv("HF_TOKEN", token)
        assert watched.finish(name, *join).process.returncode == 32
    monkeypatch.setenv("HF_TOKEN", hub.add_token("asha"))
    hub.alter["whoami"] = lambda content: PlainTextResponse(f"no: {content} {os.environ['HF_TOKEN']}", 500)
    assert watched.finish("fails", *join).process.returncode == 32
    del hub.alter["whoami"]
    volunteer = watched.start("volunteer", *join)
    monkeypatch.delenv("HF_TOKEN")
    watched.wait(lambda: "⏳" in volunteer.output() or volunteer.process.poll() is not None, "it has asked")
    watched.wait(lambda: "a chat could not be told" in serve.output(), "the chat has refused")
    assert chat.asked
    assert watched.finish("members", "members", str(run_path), "approve", "asha").process.returncode == 0

    def trains() -> bool:
        status = RunStatus.model_validate_json(httpx.get(f"{url}/api/v1/status", timeout=30.0).content)
        return any(each.name == "asha" and each.samples > 0 for each in status.volunteers)

    watched.wait(lambda: volunteer.process.poll() is not None or trains(), "it trains")
    assert volunteer.process.poll() is None, volunteer.output()
    homes = [run_path, tmp_path / "home", tmp_path / "hf"]
    running = {path: path.read_bytes() for home in homes for path in home.rglob("*") if path.is_file()}
    assert any(path.name.endswith(".sqlite-wal") for path in running)
    assert volunteer.leave() == 0, volunteer.output()
    assert serve.leave() == 0, serve.output()

    # ---- keys, and the files that are made to hold what is secret
    key = serialization.load_pem_private_key((run_path / "keys" / "run.pem").read_bytes(), None)
    raw = serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    secrets["run.pem"] = [
        *forms(key.private_bytes(*raw)),
        (run_path / "keys" / "run.pem").read_bytes().splitlines()[1],
    ]
    for path in (path for home in homes for path in home.rglob("peer.key")):
        encoded = path.read_bytes()
        secrets.setdefault("peer.key", []).extend(forms(encoded[300:420]))  # of the private half
    for name in ("session.key", "accounts.key"):
        digits = (run_path / "keys" / name).read_bytes().strip()
        secrets[name] = [digits, bytes.fromhex(digits.decode())]
    keys = ("run.pem", "peer.key", "session.key", "accounts.key")
    holders = {"client secret": "oauth.json"} | {name: name for name in keys}
    held = set()

    places = {path.name: path.read_bytes() for path in tmp_path.glob("*.log")}
    places["command lines"] = "\n".join(watched.lines).encode()
    places["asked of the hub"] = "\n".join(hub.requests).encode()
    places["asked of the chat"] = "\n".join(chat.asked).encode()
    files = list(running.items())
    files += [(path, path.read_bytes()) for home in homes for path in home.rglob("*") if path.is_file()]
    hits = []
    for name, values in secrets.items():
        for place, content in places.items():
            allowed = (name, place) in (("chat", "asked of the chat"), ("authorization code", "asked of the hub"))
            if not allowed and any(value in content for value in values):
                hits.append(f"{place}: {name}")
        for path, content in files:
            if any(value in content for value in values):
                if path.name != holders.get(name):
                    hits.append(f"{path}: {name}")
                else:
                    held.add(name)
                    assert path.stat().st_mode & 0o077 == 0, path
    assert not hits
    assert held == set(holders)  # so the search finds what is there
    assert {len(places[f"{name}.log"]) > 0 for name in ("serve", "volunteer", "writes", "members")} == {True}
    assert any(" serve " in line for line in watched.lines)
    assert any("p2pd" in line for line in watched.lines)


LEAKY = """
import canaries

def test_leaks(tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "oauth.json").write_text(canaries.CLIENT_SECRET)
    {line}
"""


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("(tmp_path / 'volunteer.log').write_text(f'token={canaries.TOKEN}')", "volunteer.log: Token"),
        ("(tmp_path / 'ledger.sqlite-wal').write_bytes(b'\\0' + canaries.CODE.encode())", "ledger.sqlite-wal: Code"),
        ("(tmp_path / 'a.json').write_text('-----BEGIN ' + 'PRIVATE KEY-----')", "a.json: PRIVATE KEY"),
        ("(tmp_path / 'b.json').write_text('nothing')", ""),
    ],
)
def test_a_session_that_leaves_a_secret_fails(tmp_path: Path, line: str, name: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "test_leaky.py").write_text(LEAKY.replace("{line}", line))
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "canaries", "-p", "no:cacheprovider"]
    session = subprocess.run(
        [*command, f"--rootdir={folder}", f"--basetemp={folder / 'base'}", str(folder / "test_leaky.py")],
        env={**os.environ, "PYTHONPATH": here, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    shutil.rmtree(folder)  # else the session that this test is in would fail, too
    assert session.returncode == (1 if name else 0), session.stdout + session.stderr
    assert name in session.stdout
    assert "zQ7" not in session.stdout + session.stderr
