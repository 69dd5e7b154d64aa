"""Nonsense for every HTTP endpoint, of a coordinator that is really served, in both ways to sign in.

Asserted of each answer: it comes, and is no 5xx; nothing is logged as an error; what strangers send takes neither
memory nor a place in the database for long. tests/swarm/test_guard.py does the same to the calls between peers.
"""

import base64
import contextlib
import gc
import itertools
import json
import logging
import re
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from canaries import CLIENT_SECRET
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hub_accounts import CLIENT_ID, Accounts, serving
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance
from sqlalchemy import func, select

from kantha.coordinator.database import Table
from kantha.coordinator.service import Coordinator
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import DepartureRequest, DownloadRequest, MembershipRequest
from kantha.web.app import build_app

DEADLINE = 10.0  # seconds for one answer, on a machine that is busy with something else, too
HOMES = 20  # addresses that nonsense comes from: one may send 600 a minute
KINDS = {"join": MembershipRequest, "leave": DepartureRequest, "download": DownloadRequest}
EXAMPLES = [20, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]


def seeded(examples: int) -> settings:
    """The same nonsense each time; not made smaller where it hits, which would take minutes."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate),
    )


@dataclass
class Target:
    """A served coordinator, and what it answered."""

    coordinator: Coordinator
    app: Any
    url: str
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        # all of 127.0.0.0/8 is this machine
        self._homes = itertools.cycle(
            httpx.Client(
                base_url=self.url,
                timeout=DEADLINE,
                transport=httpx.HTTPTransport(local_address=f"127.0.1.{number + 1}"),
            )
            for number in range(HOMES)
        )

    @property
    def run(self) -> str:
        return self.coordinator.run.spec.fingerprint

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        answer = next(self._homes).request(method, path, **options)
        self.note(f"{method} {path.partition('?')[0]}", answer.status_code, answer.text)
        return answer

    def note(self, what: str, status: int, text: str) -> None:
        assert status < 500, f"{what}: {status} {text[:300]}"
        assert "Traceback" not in text
        self.answers[what, status] += 1

    def statuses(self, what: str) -> set[int]:
        return {status for each, status in self.answers if each == what}

    def close(self) -> None:
        for client in itertools.islice(self._homes, HOMES):
            client.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[Accounts]:
    with serving() as hub:
        for name in ("asha", "rafiq", "mitu"):
            hub.add(name, "village")
        yield hub


@pytest.fixture(params=["local", "huggingface"])
def target(
    request: pytest.FixtureRequest,
    web_coordinator: Coordinator,
    hub: Accounts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Target]:
    caplog.set_level(logging.WARNING)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(web_coordinator, "sign_in", request.param)
        monkeypatch.setattr(web_coordinator, "address", url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        client = web_coordinator.run.keys / "oauth.json"
        client.touch(mode=0o600)
        client.write_text(json.dumps({"client_id": CLIENT_ID, "client_secret": CLIENT_SECRET}))
        web_coordinator.ledger.close()
        web_coordinator.take(web_coordinator.run)  # type: ignore[attr-defined]
        hub.redirect_uris = {f"{url}/sign-in/callback"}
        # any_host lets more nonsense in; without a configuration of its own, uvicorn's log comes to caplog
        app = build_app(web_coordinator, any_host=True)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, proxy_headers=request.param != "local"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        target = Target(web_coordinator, app, url)
        yield target
        target.close()
        server.should_exit = True
        thread.join()
    errors = [entry for entry in caplog.records if entry.levelno >= logging.ERROR or entry.exc_info]
    assert not errors, caplog.text[-3000:]


with_sign_in = pytest.mark.parametrize("target", ["huggingface"], indirect=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> list[PeerIdentity]:
    folder = tmp_path_factory.mktemp("machines")
    return [PeerIdentity(folder / f"{number}.key") for number in range(4)]


def _other_keys() -> list[str]:
    """Sound keys, of kinds that no peer has."""
    kinds = (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1()))
    encoding = (serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [key.public_key().public_bytes(*encoding).decode() for key in kinds]


OTHER_KEYS = _other_keys()

# ---- what comes


LETTERS = st.text(st.characters(codec="utf-8"), max_size=60)
ODD = st.sampled_from(
    ["", "\0", "..", "../keys/run.pem", "%00", "%ed%a0%80", "১", "-1", "9" * 4301, "1e9", "NaN", "null", "a" * 3000]
)
WORDS = LETTERS | ODD
PATHS = st.sampled_from(
    [
        "/",
        "/chart-data",
        "/charts",
        "/join",
        "/api/v1/run",
        "/api/v1/status",
        "/api/v1/tokenizer.json",
        "/api/v1/memberships",
        "/api/v1/tokens",
        "/api/v1/departures",
        "/api/v1/checkpoints/0/model.safetensors",
        "/openapi.json",
        "/api/docs",
        "/api/v1/milestones",
        "/api/v1/export/rounds.csv",
        "/api/v1/export/volunteers.json",
        "/badge/loss.svg",
        "/feed.atom",
        "/metrics",
        "/milestones",
        "/sign-in",
        "/sign-in/callback",
        "/sign-out",
        "/pair",
        "/me",
        "/desk",
    ]
) | st.builds(
    "{}{}".format, st.sampled_from(["/static/", "/badge/", "/api/v1/checkpoints/", "/api/v1/checkpoints/0/", "/"]), ODD
)
QUERIES = st.dictionaries(
    st.sampled_from(["to", "code", "state", "error", "error_description", "q", "page", "iss"]) | LETTERS,
    WORDS,
    max_size=4,
)
PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
NUMBERS = st.integers(0, 2**70).map(str) | st.sampled_from(["0", "-1", "1_000", "0x10", "१", "9" * 5000, ""])
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Host": st.sampled_from(["localhost", "127.0.0.1", "[::1", "[", "a b", "evil.example", "::1", "", "[v1.x]:8"]),
        "Origin": st.sampled_from(["null", "http://[", "https://evil.example", "http://127.0.0.1"]) | PLAIN,
        "Sec-Fetch-Site": st.sampled_from(["same-origin", "cross-site", "x"]),
        "Cookie": st.builds("kantha={}".format, PLAIN) | PLAIN,
        "Authorization": st.builds(
            "Kantha {}".format,
            st.binary(max_size=200).map(lambda raw: base64.b64encode(raw).decode())
            | st.sampled_from(["e30=", "W10=", "bnVsbA==", "A" * 20_000, "=", "[" * 100]),
        )
        | PLAIN,
        "Content-Type": st.sampled_from(
            [
                "application/json",
                "application/x-www-form-urlencoded",
                "multipart/form-data",
                "multipart/form-data; boundary=x",
                'multipart/form-data; boundary="',
                "multipart/form-data; boundary=x; charset=punycode",
                "text/plain",
            ]
        ),
        "Range": st.sampled_from(["bytes=0-0", "bytes=-1", "bytes=9-1", "bytes=" + "0-1," * 500, "rows=1", "bytes=১-"]),
        "If-Range": PLAIN,
        "Accept-Encoding": PLAIN,
        "X-Forwarded-For": PLAIN,
        "X-Forwarded-Proto": st.sampled_from(["https", "wss", "x"]),
        "Expect": st.just("100-continue"),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
BODIES = (
    st.binary(max_size=300)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.sampled_from(
        [b"[" * 15_000, b'{"a":' * 3_000, b'"\\ud800"', b"--x\r\n", b"--x\r\n\r\n--x--", b"%", b"a=" * 9000]
    )
)


def some(most: int, **strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A few of these fields: where all are odd at once, only the first is looked at."""
    names = st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=most)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: strategies[name] for name in chosen}))


def ascii_only(headers: dict[str, str]) -> dict[str, bytes]:
    return {name: value.encode("utf-8") for name, value in headers.items()}


@pytest.mark.parametrize("examples", EXAMPLES)
def test_requests_of_any_kind(target: Target, examples: int) -> None:
    @seeded(6 * examples)
    @given(
        st.sampled_from(["GET", "GET", "HEAD", "POST", "POST", "PUT", "OPTIONS", "X"]), PATHS, QUERIES, HEADERS, BODIES
    )
    def send(method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> None:
        content = {} if method in ("GET", "HEAD") else {"content": body}
        try:
            target.send(method, path, params=query, headers=ascii_only(headers), **content)
        except (httpx.InvalidURL, httpx.LocalProtocolError):  # nothing that can be sent
            return

    send()
    seen = {status for _, status in target.answers}
    assert {200, 400, 404, 405, 415} <= seen


@pytest.mark.parametrize("examples", EXAMPLES)
def test_what_the_apis_own_schema_allows_and_does_not(target: Target, examples: int) -> None:
    schema = schemathesis.openapi.from_dict(target.app.openapi())
    operations = [each.ok() for each in schema.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:
        takes_something = len(operation.body) + len(operation.path_parameters) > 0
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE) if takes_something else ():

            @seeded(examples // 2)
            @given(operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                sent = case.as_transport_kwargs(base_url=target.url)
                headers = {**sent["headers"], **({"Content-Type": "application/json"} if "json" in sent else {})}
                content = json.dumps(sent["json"]).encode() if "json" in sent else sent.get("data")
                answer = target.send(sent["method"], sent["url"], headers=headers, content=content)
                case.validate_response(answer, checks=[response_schema_conformance])

            send()
    seen = {status for _, status in target.answers}
    assert {403, 422} <= seen


@pytest.mark.parametrize("examples", EXAMPLES)
def test_requests_that_a_peer_really_signed(target: Target, machines: list[PeerIdentity], examples: int) -> None:
    """What gets past the signature: odd names, keys, times, kinds."""
    keys = (
        PLAIN.map(lambda text: f"ssh-rsa {text}")
        | st.binary(max_size=100).map(lambda raw: f"ssh-rsa {base64.b64encode(raw).decode()}")
        | st.sampled_from(
            ["", "ssh-rsa", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + "A" * 43, "ssh-dss AAAA", *OTHER_KEYS]
        )
    )
    fields = some(
        2,
        username=WORDS,
        instance=WORDS,
        service=st.sampled_from(["local", "kaggle", "colab", "hosted", "x"]),
        take_over=st.booleans(),
        issued=st.integers() | st.integers(int(time.time()) - 70, int(time.time()) + 70) | st.just(1 - 10**4300),
        nonce=PLAIN | st.just("0" * 32),
        run=PLAIN,
        public_key=keys,
        signature=WORDS,
        more=JSON,
    )
    ways = {
        "join": ("POST", "/api/v1/memberships"),
        "leave": ("POST", "/api/v1/departures"),
        "download": ("GET", "/api/v1/checkpoints/0/model.safetensors"),
        "token": ("POST", "/api/v1/tokens"),
    }

    @seeded(4 * examples)
    @example(machines[0], "join", {"issued": 1 - 10**4300}, False, "")
    @given(st.sampled_from(machines), st.sampled_from([*ways, "join"]), fields, st.booleans(), PLAIN)
    def send(machine: PeerIdentity, way: str, fields: dict[str, Any], again: bool, token: str) -> None:
        kind = KINDS["join" if way == "token" else way]
        name = {"username": "asha"} if kind is MembershipRequest else {}
        content = kind.signed(machine, target.run, **name).model_dump() | fields
        if "signature" not in fields:  # as the coordinator reads it, if it can be read at all
            unsigned = {name: value for name, value in content.items() if name != "signature"}
            text = json.dumps(unsigned, sort_keys=True, separators=(",", ":"))
            content["signature"] = machine.sign(text.encode())
        method, path = ways[way]
        body = json.dumps({"request": content, "token": token} if way == "token" else content)
        for _ in range(1 + again):
            if method == "GET":
                header = f"Kantha {base64.b64encode(body.encode()).decode()}"
                target.send(method, path, headers={"Authorization": header})
            else:
                target.send(method, path, content=body, headers={"Content-Type": "application/json"})

    send()
    assert target.statuses("POST /api/v1/memberships") >= {
        201 if target.coordinator.sign_in == "local" else 202,
        403,
        422,
    }
    assert target.statuses("POST /api/v1/departures") >= {204, 403}


class Browser:
    """Of somebody who is signed in."""

    def __init__(self, target: Target, hub: Accounts, name: str) -> None:
        self.target, self.headers = target, {"Origin": target.url}
        begun = self._get("/sign-in?to=me")
        back = self._get(hub.allow(begun.headers["location"], name))
        assert back.status_code == 303
        page = self._get("/me").text
        found = re.search(r'name="form" value="([^"]+)"', page)
        assert found is not None
        self.token = found[1]

    def _get(self, path: str) -> httpx.Response:
        answer = self.target.send("GET", path, headers=self.headers)
        if "set-cookie" in answer.headers:
            self.headers["Cookie"] = answer.headers["set-cookie"].partition(";")[0]
        return answer


def as_multipart(fields: dict[str, str], file: bytes) -> bytes:
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    parts.append(b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.csv"\r\n\r\n' + file + b"\r\n")
    return b"".join(parts) + b"--x--\r\n"


@with_sign_in
@pytest.mark.parametrize("examples", EXAMPLES)
def test_forms_of_people_who_are_signed_in(target: Target, hub: Accounts, examples: int) -> None:
    browsers = [Browser(target, hub, name) for name in ("asha", "rafiq", "mitu")]
    target.coordinator.allowlist.set_moderator("mitu", True, "organizer")
    target.coordinator.allowlist.set_moderator("asha", True, "organizer")
    lists = WORDS | st.lists(WORDS, max_size=5).map("\n".join) | st.sampled_from(["a\n" * 6_000, '"' + "a" * 140_000])
    usual = {"action": "approve", "names": "kobi", "code": "ACDE-FGHJ", "answer": "yes"}
    forms = some(
        2,
        action=st.sampled_from(["approve", "refuse", "suspend", "ban"]) | WORDS,
        reason=WORDS,
        name=WORDS | st.just("kobi"),
        names=lists,
        code=WORDS,
        answer=st.just("no") | WORDS,
        form=WORDS,
    )
    files = st.binary(max_size=200) | lists.map(lambda text: text.encode()) | st.just(b"username\nkobi\n\xff")
    types = st.sampled_from(
        ["application/x-www-form-urlencoded"]
        + ["multipart/form-data; boundary=x"] * 3
        + [
            f"multipart/form-data; boundary=x; charset={name}"
            for name in ("unicode_escape", "utf-16", "punycode", "idna")
        ]
    )
    paths = st.sampled_from(["/desk", "/desk", "/desk", "/me", "/pair", "/sign-out"])

    @seeded(8 * examples)
    @given(st.sampled_from(browsers), paths, forms, files, types)
    def send(browser: Browser, path: str, form: dict[str, str], file: bytes, media_type: str) -> None:
        form = {"form": browser.token} | usual | form
        body = as_multipart(form, file) if media_type.startswith("multipart") else str(httpx.QueryParams(form)).encode()
        target.send("POST", path, content=body, headers={**browser.headers, "Content-Type": media_type})

    @seeded(examples)
    @given(st.sampled_from(browsers), st.sampled_from(["/desk", "/pair", "/me", "/", "/sign-in"]), QUERIES)
    def look(browser: Browser, path: str, query: dict[str, str]) -> None:
        target.send("GET", path, params=query, headers=browser.headers)

    send()
    look()
    assert target.statuses("POST /desk") >= {303, 400, 403, 415}
    assert target.statuses("POST /pair") >= {200, 403}
    assert target.statuses("GET /desk") >= {200, 403}


@with_sign_in
def test_the_answers_of_a_provider_that_somebody_makes_up(target: Target) -> None:
    @seeded(25)
    @given(QUERIES, st.booleans())
    def send(query: dict[str, str], has_begun: bool) -> None:
        headers = {}
        if has_begun:
            begun = target.send("GET", "/sign-in")
            headers["Cookie"] = begun.headers["set-cookie"].partition(";")[0]
            query = {"state": str(httpx.URL(begun.headers["location"]).params["state"]), "code": "x"} | query
        target.send("GET", "/sign-in/callback", params=query, headers=headers)

    send()
    assert target.statuses("GET /sign-in/callback") == {400}


def test_what_is_hardly_http(target: Target) -> None:
    """Answered or hung up on, whatever was promised and not sent."""
    host = f"Host: 127.0.0.1:{target.url.rpartition(':')[2]}\r\n"
    post = f"POST /api/v1/departures HTTP/1.1\r\n{host}Content-Type: application/json\r\n"
    form = f"POST /desk HTTP/1.1\r\n{host}Content-Type: multipart/form-data; boundary=x\r\n"
    bodies = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\xff?\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET //evil.example/%2e%2e HTTP/1.1\r\n{host}\r\n".encode(),
        f"GET http://[ HTTP/1.1\r\n{host}\r\n".encode(),
        f"GET / HTTP/1.1\r\n{host}Cookie: kantha=\xff\xfe\r\n\r\n".encode("latin-1"),
        f"GET / HTTP/1.1\r\n{host}Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\n{host}X: {'a' * 200_000}\r\n\r\n".encode(),
        *(
            f"{begin}{length}\r\n\r\n{{".encode()  # and no more
            for begin in (post, form)
            for length in (
                "Content-Length: 100",
                "Content-Length: -1",
                "Content-Length: 1\r\nContent-Length: 2",
                f"Content-Length: {'9' * 30}",
                f"Content-Length: {'9' * 5_000}",
                "Content-Length: 99999999",
                "Transfer-Encoding: chunked",
                "Transfer-Encoding: x",
                "Content-Length: 2\r\nTransfer-Encoding: chunked",
                "",
            )
        ),
    ]
    for body in bodies:
        with socket.create_connection(("127.0.0.1", httpx.URL(target.url).port or 0), timeout=DEADLINE) as line:
            answer = b""
            with contextlib.suppress(OSError):  # it may have hung up in the middle, too
                line.sendall(body)
                line.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while chunk := line.recv(65_536):
                    answer += chunk
        if answer:
            target.note("raw", int(answer.split(b" ")[1]), answer.decode("latin-1"))
    assert target.statuses("raw") >= {400, 411, 413, 415} - (
        {415, 413} if target.coordinator.sign_in == "local" else {415}
    )
    assert target.send("GET", "/api/v1/run").status_code == 200


# ---- what is left of it


def mixed(target: Target, machines: list[PeerIdentity], number: int) -> None:
    """Some requests of strangers, each time others; some of them large."""
    json_type = {"Content-Type": "application/json"}
    request = MembershipRequest.signed(machines[number % len(machines)], target.run, username=f"name {number % 7}")
    target.send("POST", "/api/v1/memberships", content=request.model_dump_json(), headers=json_type)
    target.send("POST", "/api/v1/tokens", json={"request": {"nonce": "x" * 9_000}, "token": str(number)})
    target.send("POST", "/api/v1/departures", content=b"[" * 15_000, headers=json_type)
    target.send("GET", f"/static/{number}", params={"q": "x" * 500})
    target.send("GET", f"/pair?code={number}", headers={"Cookie": f"kantha={number}{'x' * 3_000}"})
    target.send("GET", "/api/v1/checkpoints/0/x", headers={"Authorization": f"Kantha {'A' * 7_000}{number}"})
    form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": target.url}
    target.send("POST", "/desk", content=b"names=" + b"x" * 300_000, headers=form)


@pytest.mark.slow
def test_memory_does_not_grow(target: Target, machines: list[PeerIdentity]) -> None:
    """Each time some 350 kB come in. What may stay of one request is its count for the limits, and that for a minute:
    some hundred bytes; that nothing else does is what is asked."""
    tracemalloc.start()
    for number in range(30):  # until all that is made once is there, and all connections are
        mixed(target, machines, number)
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(30, 90):
        mixed(target, machines, number)
    gc.collect()
    grown, peak = (value - before for value in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert grown < 60 * 7 * 500
    assert peak < 16 * 2**20


def rows(coordinator: Coordinator) -> dict[str, int]:
    with coordinator.allowlist._database.reading() as session:
        return {
            name: session.scalar(select(func.count()).select_from(table)) or 0
            for name, table in Table.metadata.tables.items()
        }


@with_sign_in
def test_strangers_leave_nothing_in_the_database_for_long(
    target: Target, machines: list[PeerIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(target.coordinator)
    json_type = {"Content-Type": "application/json"}
    for number in range(30):
        target.send("POST", "/api/v1/memberships", json={"nonce": f"{number}"})
        request = MembershipRequest.signed(machines[0], target.run)
        forged = request.model_copy(update={"instance": f"{number}"})
        target.send("POST", "/api/v1/memberships", content=forged.model_dump_json(), headers=json_type)
        target.send("GET", f"/sign-in?to={number}")
        target.send("GET", f"/pair?code=ACDE-FG{number:02}")
    assert rows(target.coordinator) == before

    for number in range(12):
        for way, path in (("join", "memberships"), ("leave", "departures")):
            request = KINDS[way].signed(machines[number % 4], target.run)
            target.send("POST", f"/api/v1/{path}", content=request.model_dump_json(), headers=json_type)
    grown = rows(target.coordinator)
    assert grown["nonces"] == before["nonces"] + 24
    assert grown["pairings"] == before["pairings"] + 4  # of a machine that waits there is one
    assert {name for name in grown if grown[name] != before[name]} == {"nonces", "pairings"}
    later = time.time() + 1_500
    monkeypatch.setattr(target.coordinator.admission, "_now", lambda: later)
    goodbye = DepartureRequest.signed(machines[0], target.run)
    target.send("POST", "/api/v1/departures", content=goodbye.model_dump_json(), headers=json_type)
    assert rows(target.coordinator) == before | {"nonces": 1}
