import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kantha.api import RunDescription
from kantha.coordinator.app import build_app
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.digests import FileDigest
from kantha.errors import StorageError
from kantha.spec import RunSpec
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import Certificate, MembershipRequest

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
    return MembershipRequest.signed(identity, web_coordinator.run.spec.fingerprint, "আশা", "local")


# ---- what everybody may see


def test_the_run_is_described_with_digests_that_hold(
    local: TestClient, web_coordinator: Coordinator, tmp_path: Path
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
        target.write_bytes(local.get(f"/{file.path}").content)
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


def test_a_download_can_go_on_where_it_broke_off(local: TestClient) -> None:
    whole = local.get("/api/v1/checkpoints/0/model.safetensors").content
    rest = local.get("/api/v1/checkpoints/0/model.safetensors", headers={"Range": "bytes=1000-"})
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
    local: TestClient, web_coordinator: Coordinator, path: str
) -> None:
    (web_coordinator.run.checkpoints / "round-000000000" / "notes.txt").write_text("not for everybody")
    assert local.get(f"/api/v1/checkpoints/{path}").status_code == 404


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
def test_nothing_outside_of_the_checkpoints_is_served(local: TestClient, path: str) -> None:
    response = local.get(f"/api/v1/checkpoints/{path}")
    assert response.status_code in (404, 422)
    assert b"PRIVATE KEY" not in response.content


def test_a_damaged_checkpoint_is_not_served(local: TestClient, web_coordinator: Coordinator) -> None:
    (web_coordinator.run.checkpoints / "round-000000000" / "checkpoint.json").write_text("{")
    assert local.get("/api/v1/checkpoints/0/model.safetensors").status_code == 404


# ---- who is let in


def test_a_volunteer_on_this_machine_gets_a_certificate_that_holds(
    local: TestClient, web_coordinator: Coordinator, wish: MembershipRequest, identity: PeerIdentity
) -> None:
    response = ask(local, wish)
    assert response.status_code == 201
    certificate = Certificate.model_validate_json(response.content)
    run = web_coordinator.run
    membership = certificate.verify(run.key().public_key, run.spec.fingerprint, identity.peer_id)
    assert membership.username == "আশা"
    assert web_coordinator._ledger.members() == {identity.peer_id: "আশা"}


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
    assert web_coordinator._ledger.members() == {}


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
    assert web_coordinator._ledger.members() == {}


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
    assert web_coordinator._ledger.members() == {}


@pytest.mark.parametrize(
    "change",
    [
        {"username": ""},
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
    assert web_coordinator._ledger.members() == {}


def test_a_full_disk_lets_nobody_in_and_says_so(
    local: TestClient, web_coordinator: Coordinator, wish: MembershipRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise StorageError("ledger.sqlite: the ledger cannot be used; make room on that disk")

    monkeypatch.setattr(web_coordinator._ledger, "add_member", refuse)
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
