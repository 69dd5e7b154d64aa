import base64
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from canaries import TOKEN
from fastapi import FastAPI
from fastapi.testclient import TestClient
from huggingface_hub import constants

from kantha.api import Admission, LeaseTaken, RunDescription, Waiting
from kantha.coordinator.allowlist import Person
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.digests import FileDigest
from kantha.errors import LeaseError, StorageError
from kantha.spec import RunSpec
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import DepartureRequest, DownloadRequest, MembershipRequest, Trust
from kantha.web.app import build_app

HERE, ELSEWHERE = ("127.0.0.1", 1234), ("203.0.113.5", 1234)


@pytest.fixture
def local(web_app: FastAPI) -> TestClient:
    """A browser, or a volunteer, on the coordinator's own machine."""
    return client_at(web_app, HERE)


def client_at(app: FastAPI, peer: tuple[str, int]) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1:8600", client=peer)


def ask(client: TestClient, request: MembershipRequest, headers: dict[str, str] | None = None) -> Any:
    return client.post(
        "/api/v1/memberships",
        content=request.model_dump_json(),
        headers={"Content-Type": "application/json", **(headers or {})},
    )


@pytest.fixture
def wish(web_coordinator: Coordinator, identity: PeerIdentity) -> MembershipRequest:
    return MembershipRequest.signed(identity, web_coordinator.run.spec.fingerprint, username="আশা", service="local")


@pytest.fixture
def member(
    web_coordinator: Coordinator, identity: PeerIdentity, wish: MembershipRequest
) -> Callable[[], dict[str, str]]:
    """Makes the headers of a member's download."""
    web_coordinator.admission.admit(wish)

    def headers() -> dict[str, str]:
        request = DownloadRequest.signed(identity, web_coordinator.run.spec.fingerprint)
        return {"Authorization": f"Kantha {base64.b64encode(request.model_dump_json().encode()).decode()}"}

    return headers


# ---- what everybody may see


def test_the_run_is_described_with_digests_that_hold(
    local: TestClient, web_coordinator: Coordinator, member: Callable[[], dict[str, str]], tmp_path: Path
) -> None:
    description = RunDescription.model_validate_json(local.get("/api/v1/run").content)
    spec = RunSpec.model_validate(description.spec)
    assert spec.fingerprint == description.fingerprint == web_coordinator.run.spec.fingerprint
    assert description.public_key == web_coordinator.run.key().public_key
    assert description.bootstrap
    assert description.snapshot.round == 0
    assert {"checkpoint.json", "model.safetensors", "optimizer.safetensors"} <= description.snapshot.files.keys()
    for file in (description.tokenizer, *description.snapshot.files.values()):
        target = tmp_path / "downloaded"
        target.write_bytes(local.get(f"/{file.path}", headers=member()).content)
        assert FileDigest(sha256=file.sha256, size=file.size).matches(target)
    assert description.tokenizer.sha256 == spec.tokenizer.sha256


def test_everybody_may_look_but_not_join(web_app: FastAPI, wish: MembershipRequest) -> None:
    stranger = client_at(web_app, ELSEWHERE)
    for path in ("/", "/api/v1/run", "/api/v1/status", "/api/v1/tokenizer.json"):
        assert stranger.get(path).status_code == 200
    assert ask(stranger, wish).status_code == 403


def test_the_status_and_the_page_are_those_of_this_run(local: TestClient, web_coordinator: Coordinator) -> None:
    status = RunStatus.model_validate_json(local.get("/api/v1/status").content)
    assert (status.name, status.round, status.target_batch_size) == ("tiny", 0, 64)
    assert status.fingerprint == web_coordinator.run.spec.fingerprint
    assert status.volunteers == []
    assert "A model for tests." in local.get("/").text


def test_a_download_can_go_on_where_it_broke_off(local: TestClient, member: Callable[[], dict[str, str]]) -> None:
    whole = local.get("/api/v1/checkpoints/0/model.safetensors", headers=member()).content
    rest = local.get("/api/v1/checkpoints/0/model.safetensors", headers={"Range": "bytes=1000-", **member()})
    assert rest.status_code == 206
    assert rest.content == whole[1000:]


@pytest.mark.parametrize(
    "path",
    [
        "1/model.safetensors",
        "-1/model.safetensors",
        "9" * 300 + "/model.safetensors",
        "0/other.bin",
        "0/notes.txt",
        "0/",
    ],
    ids=lambda path: path[:12],
)
def test_what_is_no_file_of_a_checkpoint_is_not_served(
    local: TestClient, web_coordinator: Coordinator, member: Callable[[], dict[str, str]], path: str
) -> None:
    (web_coordinator.run.checkpoints / "round-000000000" / "notes.txt").write_text("not for everybody")
    assert local.get(f"/api/v1/checkpoints/{path}", headers=member()).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "0/..%2f..%2fkeys%2frun.pem",
        "0/%2e%2e%2f%2e%2e%2fkeys%2frun.pem",
        "0/..%2f..%2frun.json",
        "0/..%2f..%2fledger.sqlite",
        "..%2f..%2fkeys/run.pem",
        "0/../../keys/run.pem",
        "0/..\\..\\keys\\run.pem",
        "0/%2fetc%2fpasswd",
        "0/..%2fround-000000000%2fmodel.safetensors",
        "0/.",
        "0/%00",
    ],
)
def test_nothing_outside_of_the_checkpoints_is_served(
    local: TestClient, member: Callable[[], dict[str, str]], path: str
) -> None:
    response = local.get(f"/api/v1/checkpoints/{path}", headers=member())
    assert response.status_code in (404, 422)
    assert b"PRIVATE KEY" not in response.content


def test_a_damaged_checkpoint_is_not_served(
    local: TestClient, web_coordinator: Coordinator, member: Callable[[], dict[str, str]]
) -> None:
    (web_coordinator.run.checkpoints / "round-000000000" / "checkpoint.json").write_text("{")
    assert local.get("/api/v1/checkpoints/0/model.safetensors", headers=member()).status_code == 404


# ---- who is let in


def test_a_volunteer_on_this_machine_gets_a_certificate_that_holds(
    local: TestClient, web_coordinator: Coordinator, wish: MembershipRequest, identity: PeerIdentity
) -> None:
    response = ask(local, wish)
    assert response.status_code == 201
    certificate = Admission.model_validate_json(response.content).certificate
    run = web_coordinator.run
    membership = certificate.verify(run.key().public_key, run.spec.fingerprint, identity.peer_id)
    assert membership.username == "আশা"
    assert web_coordinator.ledger.members() == {identity.peer_id: "আশা"}


@pytest.mark.parametrize("host", ["::1", "::ffff:127.0.0.1"])
def test_ipv6_loopback_is_this_machine_too(web_app: FastAPI, wish: MembershipRequest, host: str) -> None:
    assert ask(client_at(web_app, (host, 1234)), wish).status_code == 201


@pytest.mark.parametrize("host", ["203.0.113.5", "10.0.0.7", "2001:db8::1", "localhost.example", "", "0.0.0.0"])
def test_nobody_from_another_machine_is_let_in(
    web_app: FastAPI, web_coordinator: Coordinator, wish: MembershipRequest, host: str
) -> None:
    response = ask(client_at(web_app, (host, 1234)), wish)
    assert response.status_code == 403
    assert "own machine" in response.json()["detail"]
    assert web_coordinator.ledger.members() == {}


@pytest.mark.parametrize(
    "header",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-For": "203.0.113.5"},
        {"X-Real-IP": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
    ],
)
def test_nobody_is_let_in_through_a_proxy(
    local: TestClient, web_coordinator: Coordinator, wish: MembershipRequest, header: dict[str, str]
) -> None:
    assert ask(local, wish, header).status_code == 403
    assert web_coordinator.ledger.members() == {}


def test_a_claim_to_come_from_here_helps_nobody(web_app: FastAPI, wish: MembershipRequest) -> None:
    stranger = client_at(web_app, ELSEWHERE)
    assert ask(stranger, wish, {"X-Forwarded-For": "127.0.0.1", "Host": "localhost"}).status_code == 403


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"username": "Rafiq"}, "not signed"),
        ({"issued": 1}, "clock"),
        ({"run": "0f" * 32}, "another run"),
        ({"public_key": "garbage"}, "not signed"),
        ({"public_key": "ssh-xyz AAAA"}, "not signed"),
    ],
)
def test_a_request_that_does_not_hold_is_refused_with_a_reason(
    local: TestClient, web_coordinator: Coordinator, wish: MembershipRequest, change: dict[str, object], reason: str
) -> None:
    response = ask(local, wish.model_copy(update=change))
    assert response.status_code == 403
    assert reason in response.json()["detail"]
    assert web_coordinator.ledger.members() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"username": "x" * 41},
        {"username": "two\nlines"},
        {"service": "moon"},
        {"run": "0f"},
        {"admin": True},
    ],
)
def test_a_malformed_request_is_refused(
    local: TestClient, web_coordinator: Coordinator, wish: MembershipRequest, change: dict[str, object]
) -> None:
    assert local.post("/api/v1/memberships", json=wish.model_dump() | change).status_code == 422
    assert web_coordinator.ledger.members() == {}


def test_a_full_disk_lets_nobody_in_and_says_so(
    local: TestClient, web_coordinator: Coordinator, wish: MembershipRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise StorageError("ledger.sqlite: the ledger cannot be used; make room on that disk")

    monkeypatch.setattr(web_coordinator.ledger.database, "session", refuse)
    response = ask(local, wish)
    assert response.status_code == 503
    assert "make room" in response.json()["detail"]


# ---- what is turned away at the door


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": ""}, 415),
        ({"Content-Length": str(10**9)}, 413),
        ({"Content-Length": "16385"}, 413),
        ({"Transfer-Encoding": "chunked"}, 411),
        ({"Content-Length": ""}, 411),
        ({"X-Forwarded-For": "127.0.0.1"}, 403),
        ({"Host": "evil.example"}, 400),
    ],
    ids=str,
)
def test_what_is_turned_away_is_not_read(coordinator_url: str, headers: dict[str, str], status: int) -> None:
    """No byte of a body is sent, and the answer comes all the same; then the connection is closed."""
    where = urlsplit(coordinator_url)
    lines = {"Host": where.netloc, "Content-Type": "application/json", "Content-Length": "100", **headers}
    if "Transfer-Encoding" in headers or not lines["Content-Length"]:
        del lines["Content-Length"]
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    with socket.create_connection((str(where.hostname), int(where.port or 0)), timeout=10) as connection:
        connection.sendall(f"POST /api/v1/memberships HTTP/1.1\r\n{head}\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8600", 200),
        ("127.0.0.1", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8600", 200),
        ("evil.example:8600", 400),
        ("127.0.0.1.evil.example", 400),
        ("[::1", 400),
        ("", 400),
    ],
)
def test_only_the_own_host_names_are_answered(local: TestClient, host: str, status: int) -> None:
    """A page of evil.example whose name is suddenly said to be 127.0.0.1 (DNS rebinding) learns nothing."""
    assert local.get("/api/v1/run", headers={"Host": host}).status_code == status


def test_a_run_on_all_addresses_may_be_looked_at_under_every_name(
    web_coordinator: Coordinator, wish: MembershipRequest
) -> None:
    local = client_at(build_app(web_coordinator, any_host=True), HERE)
    assert local.get("/api/v1/run", headers={"Host": "kantha.example"}).status_code == 200
    assert ask(local, wish, {"Host": "kantha.example"}).status_code == 400
    assert ask(local, wish).status_code == 201


# ---- who is let in where people sign in


@pytest.fixture
def hub(web_coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A volunteer elsewhere, of a run with a public link."""
    monkeypatch.setattr(web_coordinator, "sign_in", "huggingface")
    monkeypatch.setattr(web_coordinator, "address", "https://kantha.example")
    web_coordinator.ledger.close()
    web_coordinator.take(web_coordinator.run)
    return TestClient(build_app(web_coordinator), base_url="https://kantha.example", client=ELSEWHERE)


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Says whose a token is, as the hub does. Returns a token that may read."""
    tokens = {f"{TOKEN}Read": "read", f"{TOKEN}Write": "write"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            role = tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
            token = {"displayName": "kantha", "role": role}
            answer = {"type": "user", "id": "6f", "name": "asha", "orgs": [], "auth": {"accessToken": token}}
            self.send_response(200 if role else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield f"{TOKEN}Read"
        server.shutdown()
        thread.join()


def sign_in(client: TestClient, request: MembershipRequest, token: str) -> Any:
    return client.post("/api/v1/tokens", json={"request": request.model_dump(), "token": token})


def test_a_volunteer_from_elsewhere_waits_and_is_let_in(
    hub: TestClient, web_coordinator: Coordinator, identity: PeerIdentity
) -> None:
    run = web_coordinator.run.spec.fingerprint

    def join() -> Any:
        return ask(hub, MembershipRequest.signed(identity, run, service="kaggle"))

    answer = join()
    assert answer.status_code == 202
    waiting = Waiting.model_validate_json(answer.content)
    assert waiting.state == "sign_in"
    web_coordinator.allowlist.sign_in(Person("asha", "1", "huggingface", ()))
    web_coordinator.admission.confirm(waiting.code, "asha")
    answer = join()
    assert (answer.status_code, answer.json()["state"]) == (202, "asked")
    web_coordinator.allowlist.decide(["asha"], "approve", "mod")
    answer = join()
    assert answer.status_code == 201
    admission = Admission.model_validate_json(answer.content)
    description = RunDescription.model_validate_json(hub.get("/api/v1/run").content)
    assert (description.sign_in, description.notice) == ("huggingface", admission.notice)
    trust = Trust(run, description.public_key)
    trust.take(admission.notice)
    assert trust.verify(admission.certificate, identity.peer_id).username == "asha"

    web_coordinator.allowlist.decide(["asha"], "ban", "mod", "spam")
    answer = join()
    assert answer.status_code == 403
    assert "spam" in answer.json()["detail"]
    trust.take(hub.get("/api/v1/run").json()["notice"])
    assert trust.is_revoked(admission.certificate.membership.serial)


def test_a_second_instance_is_told_that_its_place_is_taken_until_the_first_one_leaves(
    hub: TestClient, web_coordinator: Coordinator, identity: PeerIdentity, other_identity: PeerIdentity
) -> None:
    run = web_coordinator.run.spec.fingerprint
    asha = Person("asha", "1", "huggingface", ())
    web_coordinator.allowlist.decide(["asha"], "approve", "mod")
    first = MembershipRequest.signed(identity, run, service="kaggle", instance="nb-1")
    web_coordinator.admission.sign_in_with(first, asha)

    def second() -> MembershipRequest:
        return MembershipRequest.signed(other_identity, run, service="kaggle")

    with pytest.raises(LeaseError):
        web_coordinator.admission.sign_in_with(second(), asha)
    answer = ask(hub, second())
    assert answer.status_code == 409
    assert "nb-1" in LeaseTaken.model_validate_json(answer.content).detail
    goodbye = DepartureRequest.signed(identity, run)
    for status in (204, 403):  # a replay
        assert hub.post("/api/v1/departures", json=goodbye.model_dump()).status_code == status
    assert ask(hub, second()).status_code == 201


def test_a_token_that_may_only_read_signs_in(
    hub: TestClient, web_coordinator: Coordinator, identity: PeerIdentity, hugging_face: str
) -> None:
    run = web_coordinator.run.spec.fingerprint
    answer = sign_in(hub, MembershipRequest.signed(identity, run), hugging_face)
    assert (answer.status_code, answer.json()["state"]) == (202, "asked")
    web_coordinator.allowlist.decide(["asha"], "approve", "mod")
    request = MembershipRequest.signed(identity, run)
    assert sign_in(hub, request, hugging_face).status_code == 201
    assert sign_in(hub, request, hugging_face).status_code == 403  # a replay
    assert ask(hub, MembershipRequest.signed(identity, run)).status_code == 201


@pytest.mark.parametrize("token", [f"{TOKEN}Write", f"{TOKEN}Unknown", f"{TOKEN}\n", TOKEN * 30, ""])
def test_another_token_is_refused_and_repeated_nowhere(
    hub: TestClient,
    web_coordinator: Coordinator,
    identity: PeerIdentity,
    hugging_face: str,
    token: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.DEBUG):
        answer = sign_in(hub, MembershipRequest.signed(identity, web_coordinator.run.spec.fingerprint), token)
    assert answer.status_code in (403, 422)
    assert answer.json()["detail"]
    assert "canary" not in answer.text + caplog.text
    assert web_coordinator.allowlist.people() == []
    for file in web_coordinator.run.path.iterdir():
        assert file.is_dir() or b"canary" not in file.read_bytes()


def test_a_run_without_sign_in_takes_no_token(local: TestClient, wish: MembershipRequest, hugging_face: str) -> None:
    assert sign_in(local, wish, hugging_face).status_code == 403


@pytest.mark.parametrize("header", ["", f"Bearer {TOKEN}", "Kantha e30="])
def test_checkpoints_are_for_members(local: TestClient, header: str) -> None:
    answer = local.get("/api/v1/checkpoints/0/model.safetensors", headers={"Authorization": header} if header else {})
    assert answer.status_code == 403
    assert "for members" in answer.json()["detail"]


def test_a_request_for_a_file_is_good_for_once(local: TestClient, member: Callable[[], dict[str, str]]) -> None:
    headers = member()
    assert local.get("/api/v1/checkpoints/0/checkpoint.json", headers=headers).status_code == 200
    assert local.get("/api/v1/checkpoints/0/checkpoint.json", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "nonsense",
        '{"a": NaN}',
        '{"\\ud800": "\\ud800"}',
        '{"issued": 1e999}',
        '{"issued": ' + "9" * 5000 + "}",
        "[" * 15_000,
    ],
    ids=lambda content: content[:12],
)
@pytest.mark.parametrize("path", ["memberships", "tokens", "departures"])
def test_what_is_malformed_is_answered_without_repeating_it(hub: TestClient, path: str, content: str) -> None:
    answer = hub.post(f"/api/v1/{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 4_000


# ---- how often


def test_an_address_may_ask_so_often_in_a_minute_and_others_too(hub: TestClient, web_coordinator: Coordinator) -> None:
    other = TestClient(hub.app, base_url="https://kantha.example", client=("203.0.113.6", 1))
    answers = [hub.post("/api/v1/departures", json={}).status_code for _ in range(601)]
    assert answers == [422] * 600 + [429]
    refused = hub.post("/api/v1/memberships", json={})
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["Retry-After"]) <= 61
    assert "try again in" in refused.json()["detail"]
    assert other.post("/api/v1/departures", json={}).status_code == 422
    assert hub.get("/api/v1/run").status_code == 200  # to look is free


def test_a_peer_may_ask_so_often_in_a_minute(
    hub: TestClient, web_coordinator: Coordinator, identity: PeerIdentity
) -> None:
    run = web_coordinator.run.spec.fingerprint
    answers = [ask(hub, MembershipRequest.signed(identity, run)) for _ in range(41)]
    assert [answer.status_code for answer in answers] == [202] * 40 + [429]
    assert int(answers[-1].headers["Retry-After"]) >= 1


def test_tokens_are_tried_so_often_in_a_minute(
    hub: TestClient, web_coordinator: Coordinator, identity: PeerIdentity, hugging_face: str
) -> None:
    request = MembershipRequest.signed(identity, web_coordinator.run.spec.fingerprint)
    answers = [sign_in(hub, request, f"hf_guess{number}").status_code for number in range(21)]
    assert answers == [403] * 20 + [429]


def test_no_address_of_a_person_is_kept(
    hub: TestClient, web_coordinator: Coordinator, identity: PeerIdentity, hugging_face: str
) -> None:
    run = web_coordinator.run
    sign_in(hub, MembershipRequest.signed(identity, run.spec.fingerprint), hugging_face)
    ask(hub, MembershipRequest.signed(identity, run.spec.fingerprint))
    for file in (file for file in run.path.rglob("*") if file.is_file()):
        assert ELSEWHERE[0].encode() not in file.read_bytes()
