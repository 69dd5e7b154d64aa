"""The volunteer's client against a real coordinator's web service, and against everything else that may answer."""

import base64
import hashlib
import io
import json
import re
import shutil
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from web_server import DEADLINE, Request, Server

from kantha.api import RemoteFile, RunDescription
from kantha.coordinator.service import Coordinator
from kantha.errors import (
    DigestError,
    FingerprintError,
    KanthaError,
    MembershipError,
    NotACoordinatorError,
    StorageError,
    UnreachableError,
)
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import DepartureRequest, DownloadRequest, MembershipRequest, Trust
from kantha.training import Replica
from kantha.volunteer.client import CoordinatorClient
from kantha.volunteer.folders import PeerFolder
from kantha.volunteer.join import fetch_replica
from kantha.volunteer.membership import Applicant, enter

CONTENT = bytes(range(256)) * 400
QUIET = Console(quiet=True)


class ShakyFile:
    """A file, sent from where it was asked for; a connection breaks after so many bytes, if `breaks` has any left."""

    def __init__(self, content: bytes, *breaks: int) -> None:
        self.content = content
        self.breaks = list(breaks)

    def __call__(self, request: Request) -> None:
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(self.content):
            return request.say(b"", 416)
        body = self.content[start:]
        sent = body[: self.breaks.pop(0)] if self.breaks else body
        request.say(sent, 206 if asked else 200, {"Content-Length": str(len(body))})
        request.close_connection = True
        return None


def announced(content: bytes = CONTENT) -> RemoteFile:
    return RemoteFile(path="files/model", sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def describe(url: str) -> None:
    with CoordinatorClient(url) as client:
        client.describe()


# ---- a coordinator


def come_in(client: CoordinatorClient, identity: PeerIdentity, username: str = "Asha") -> tuple[RunDescription, Any]:
    """The description of a run, and the certificate of one who is a member now."""
    description, _ = client.describe()
    trust = Trust(description.fingerprint, description.public_key)
    applicant = Applicant(identity, description.fingerprint, "local", "own machine", username)
    return description, enter(client, trust, applicant, QUIET, threading.Event()).certificate


def test_a_run_is_described_joined_and_fetched(
    coordinator_url: str, web_coordinator: Coordinator, identity: PeerIdentity
) -> None:
    run = web_coordinator.run
    newer = Replica(run.spec)
    with torch.no_grad():
        for parameter in newer.parameters:
            parameter.add_(0.25)
    run.save_checkpoint(newer, 4)
    folder = PeerFolder(run.spec.fingerprint, "আশা")
    with CoordinatorClient(coordinator_url + "/") as client:
        description, spec = client.describe()
        assert spec == run.spec
        _, certificate = come_in(client, identity, "আশা")
        assert certificate.membership.peer_id == identity.peer_id
        replica = fetch_replica(client, description, spec, folder, QUIET, identity)
    assert replica.round == 4
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(replica.parameters, newer.parameters, strict=True))
    assert (folder.path / "snapshot" / "tokenizer.json").read_bytes() == run.tokenizer.read_bytes()
    assert web_coordinator.ledger.members() == {identity.peer_id: "আশা"}


def test_what_is_here_already_is_not_downloaded_again(
    coordinator_url: str, web_coordinator: Coordinator, identity: PeerIdentity
) -> None:
    spec = web_coordinator.run.spec
    folder = PeerFolder(spec.fingerprint, "Asha")
    with CoordinatorClient(coordinator_url) as client:
        description, _ = come_in(client, identity)
        fetch_replica(client, description, spec, folder, QUIET, identity)
        before = {path: path.stat().st_ino for path in folder.run_folder.rglob("*.*") if path.is_file()}
        (folder.path / "snapshot" / "model.safetensors").write_bytes(b"damaged")
        replica = fetch_replica(client, description, spec, folder, QUIET, identity)
    changed = {path.name for path, inode in before.items() if path.stat().st_ino != inode}
    assert changed == {"model.safetensors"}
    assert replica.round == 0


@pytest.mark.parametrize("name", ["../../../escaped", "/escaped", ".bashrc", "extra.bin"])
def test_a_coordinator_cannot_choose_what_is_written_where(
    server: Server, web_coordinator: Coordinator, name: str
) -> None:
    """It is a stranger to the volunteer."""
    content = web_coordinator.describe().model_dump(mode="json")
    content["snapshot"]["files"][name] = content["tokenizer"]
    server.answer = lambda request: request.say(json.dumps(content).encode())
    with pytest.raises(NotACoordinatorError, match=f"{re.escape(name)}' is no file of a snapshot"):
        describe(server.url)


def test_a_snapshot_that_is_not_whole_is_refused(server: Server, web_coordinator: Coordinator) -> None:
    content = web_coordinator.describe().model_dump(mode="json")
    del content["snapshot"]["files"]["tokenizer.json"]
    server.answer = lambda request: request.say(json.dumps(content).encode())
    with pytest.raises(NotACoordinatorError, match=r"'tokenizer\.json' is missing"):
        describe(server.url)


@pytest.mark.parametrize("path", ["http://example.org/model", "//example.org/model", "/model", ""])
def test_a_file_comes_from_the_coordinator_or_not_at_all(path: str) -> None:
    with pytest.raises(ValidationError):
        RemoteFile(path=path, sha256="0f" * 32, size=1)


def test_volunteers_on_one_machine_have_files_of_their_own(
    coordinator_url: str, web_coordinator: Coordinator, identity: PeerIdentity
) -> None:
    """Or one would write what the other just checked."""
    spec = web_coordinator.run.spec
    folders = [PeerFolder(spec.fingerprint, "Asha") for _ in range(2)]
    with CoordinatorClient(coordinator_url) as client:
        description, _ = come_in(client, identity)
        for folder in folders:
            fetch_replica(client, description, spec, folder, QUIET, identity)
    assert set(folders[0].run_folder.iterdir()) == {folder.path for folder in folders}


def test_a_long_download_is_told_where_there_is_no_bar(
    coordinator_url: str, web_coordinator: Coordinator, identity: PeerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kantha.volunteer.join._LARGE", 20_000)
    spec, said = web_coordinator.run.spec, io.StringIO()
    with CoordinatorClient(coordinator_url) as client:
        description, _ = come_in(client, identity)
        fetch_replica(client, description, spec, PeerFolder(spec.fingerprint, "Asha"), Console(file=said), identity)
    large = [name for name, file in description.snapshot.files.items() if file.size > 20_000]
    assert large
    assert [line.split(",")[0] for line in said.getvalue().splitlines()] == [f"downloading {name}" for name in large]


def test_the_coordinators_reason_for_a_refusal_is_told(coordinator_url: str, identity: PeerIdentity) -> None:
    request = MembershipRequest.signed(identity, "0f" * 32, username="Asha")
    with CoordinatorClient(coordinator_url) as client, pytest.raises(MembershipError, match="another run") as caught:
        client.ask(request)
    assert str(caught.value).startswith(coordinator_url)
    assert caught.value.exit_code == 24


@pytest.mark.parametrize("username", ["x" * 41, "two\nlines", "next\x85line", "\u202eahsA", "\u2066Asha"])
def test_a_name_that_cannot_be_used_is_told(identity: PeerIdentity, username: str) -> None:
    with pytest.raises(MembershipError) as caught:
        Applicant(identity, "0f" * 32, "local", "", username).request()
    assert caught.value.exit_code == 24
    assert "--name" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (201, b"{}", NotACoordinatorError),
        (202, b'{"state": "asked"}', NotACoordinatorError),
        (200, b'{"detail": "fine"}', NotACoordinatorError),
        (302, b'{"detail": "/login"}', NotACoordinatorError),
        (403, b"<h1>Forbidden by a proxy</h1>", NotACoordinatorError),
        (403, b'{"detail": ["a list"]}', NotACoordinatorError),
        (404, b'{"detail": "Not Found"}', NotACoordinatorError),
        (422, b'{"detail": [{"msg": "field required"}]}', NotACoordinatorError),
        (413, b'{"detail": "too large"}', MembershipError),
        (403, b'{"detail": "no"}', MembershipError),
        (500, b"Internal Server Error", UnreachableError),
        (503, b'{"detail": "the disk is full"}', UnreachableError),
        (503, b"[]", UnreachableError),
    ],
)
def test_only_a_coordinators_own_word_is_taken_for_a_refusal(
    server: Server, identity: PeerIdentity, status: int, body: bytes, error: type[KanthaError]
) -> None:
    """Members stop at a refusal; at what a proxy says while the coordinator starts again they go on."""
    server.answer = lambda request: request.say(body, status)
    with CoordinatorClient(server.url) as client:
        with pytest.raises(error) as caught:
            client.ask(MembershipRequest.signed(identity, "0f" * 32))
        assert type(caught.value) is error
        assert str(caught.value).startswith(server.url)
        with pytest.raises(error):
            client.depart(DepartureRequest.signed(identity, "0f" * 32))


def test_a_reason_cannot_play_with_the_terminal(server: Server, identity: PeerIdentity) -> None:
    detail = json.dumps({"detail": "\x1b[2Jনা\u200c\n\u202egnp"}).encode()
    server.answer = lambda request: request.say(detail, 403)
    with CoordinatorClient(server.url) as client, pytest.raises(MembershipError) as caught:
        client.ask(MembershipRequest.signed(identity, "0f" * 32))
    assert str(caught.value).endswith("not let in: ?[2Jনা\u200c??gnp")


# ---- nobody, or somebody else


def test_an_answer_without_end_is_not_read(server: Server) -> None:
    server.answer = lambda request: request.say(b" " * 2**23)
    with pytest.raises(NotACoordinatorError, match="more than any would"):
        describe(server.url)


def test_no_proxy_stands_between_a_volunteer_and_its_own_machine(
    coordinator_url: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port}")
    describe(coordinator_url)
    describe(coordinator_url.replace("127.0.0.1", "localhost"))


def test_where_nobody_answers_the_address_is_told(free_port: int) -> None:
    with pytest.raises(UnreachableError, match="nobody answers") as caught:
        describe(f"http://127.0.0.1:{free_port}/")
    assert str(caught.value).startswith(f"http://127.0.0.1:{free_port}: ")
    assert caught.value.exit_code == 20


def test_an_address_may_be_given_without_its_scheme(coordinator_url: str) -> None:
    describe(coordinator_url.removeprefix("http://"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "ftp://127.0.0.1/",
        "mailto:asha",
        "http://[::1",
        "http://127.0.0.1:port",
        "http://a b/",
        "http://a..b/",
        "http://" + "a" * 64 + ".invalid/",
        "http://xn--a.invalid/",
        "http://\x00",
    ],
    ids=lambda url: repr(url[:20]),
)
def test_what_is_no_address_is_told(url: str) -> None:
    with pytest.raises(UnreachableError) as caught:
        describe(url)
    assert caught.value.exit_code == 20
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (200, b"<!doctype html><title>Router</title>", {"Content-Type": "text/html"}),
        (200, b'{"status": "ok"}', {"Content-Type": "application/json"}),
        (200, b"[]", {}),
        (200, b"", {}),
        (200, b"\xff\xfe\x00", {}),
        (404, b"<h1>Not Found</h1>", {}),
        (500, b'{"kantha": "run"}', {}),
        (302, b"", {"Location": "/login"}),
        (200, b"not compressed at all", {"Content-Encoding": "gzip"}),
    ],
    ids=["page", "json", "list", "empty", "binary", "404", "500", "redirect", "broken gzip"],
)
def test_a_web_server_of_another_kind_is_no_coordinator(
    server: Server, status: int, body: bytes, headers: dict[str, str]
) -> None:
    server.answer = lambda request: request.say(body, status, headers)
    with pytest.raises(NotACoordinatorError, match="Kantha coordinator") as caught:
        describe(server.url)
    assert str(caught.value).startswith(server.url)
    assert caught.value.exit_code == 21


def test_a_description_with_an_error_status_is_not_believed(server: Server, web_coordinator: Coordinator) -> None:
    body = web_coordinator.describe().model_dump_json().encode()
    server.answer = lambda request: request.say(body, 500)
    with pytest.raises(NotACoordinatorError):
        describe(server.url)


def test_a_program_that_does_not_speak_http_is_no_coordinator() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)

        def talk() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")
                connection.recv(4096)

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(NotACoordinatorError, match="does not speak HTTP") as caught:
            describe(f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert caught.value.exit_code == 21


# ---- a run spec that is not the one announced


def offer(server: Server, description: RunDescription, **spec: Any) -> None:
    content = description.model_dump(mode="json")
    content["spec"] |= spec
    server.answer = lambda request: request.say(json.dumps(content).encode())


def test_a_spec_that_was_tampered_with_is_refused(server: Server, web_coordinator: Coordinator) -> None:
    description = web_coordinator.describe()
    offer(server, description)
    describe(server.url)
    offer(server, description, seed=8)
    with pytest.raises(FingerprintError, match="does not match its fingerprint") as caught:
        describe(server.url)
    assert caught.value.exit_code == 22
    assert description.fingerprint[:12] in str(caught.value)


def test_a_spec_of_another_version_is_told_with_both_versions(server: Server, web_coordinator: Coordinator) -> None:
    description = web_coordinator.describe().model_copy(update={"version": "99.0"})
    offer(server, description, invented_later=True)
    with pytest.raises(FingerprintError, match=r"99\.0.*invented_later.*upgrade") as caught:
        describe(server.url)
    assert len(str(caught.value).splitlines()) == 1


# ---- downloads


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "model"


def download(server: Server, target: Path, file: RemoteFile | None = None) -> list[int]:
    pieces: list[int] = []
    with CoordinatorClient(server.url) as client:
        client.download(file or announced(), target, pieces.append)
    return pieces


def test_a_file_arrives_whole_and_alone(server: Server, target: Path) -> None:
    server.answer = ShakyFile(CONTENT)
    pieces = download(server, target)
    assert target.read_bytes() == CONTENT
    assert sum(pieces) == len(CONTENT)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    "content",
    [CONTENT[::-1], CONTENT[:-1], b"", CONTENT[:-1] + b"x"],
    ids=["another", "short", "empty", "one byte"],
)
def test_another_file_than_announced_is_not_kept(server: Server, target: Path, content: bytes) -> None:
    server.answer = ShakyFile(content) if content else lambda request: request.say(b"")
    with pytest.raises(DigestError, match="not the one it announced") as caught:
        download(server, target)
    assert caught.value.exit_code == 23
    assert list(target.parent.iterdir()) == []


def test_more_than_was_announced_is_not_kept(server: Server, target: Path) -> None:
    """Without this, a coordinator could fill the volunteer's disk."""
    server.answer = ShakyFile(CONTENT + b"x" * 10_000_000)
    pieces: list[int] = []
    with CoordinatorClient(server.url) as client, pytest.raises(DigestError) as caught:
        client.download(announced(), target, pieces.append)
    assert sum(pieces) <= len(CONTENT)
    assert caught.value.exit_code == 23
    assert not target.exists()
    assert sum(path.stat().st_size for path in target.parent.iterdir()) <= len(CONTENT)
    server.answer = ShakyFile(CONTENT)
    download(server, target)  # it left nothing that would stand in the way
    assert target.read_bytes() == CONTENT


def test_a_download_that_breaks_off_goes_on_where_it_stopped(server: Server, target: Path) -> None:
    server.answer = ShakyFile(CONTENT, 40_000, 30_000)
    download(server, target)
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=40000-", "bytes=70000-"]


def test_a_member_shows_itself_anew_each_time(server: Server, target: Path, identity: PeerIdentity) -> None:
    """A request is good once, also where a download goes on."""
    file, shown = ShakyFile(CONTENT, 40_000, 30_000), []

    def answer(request: Request) -> None:
        shown.append(request.headers["Authorization"])
        if len(shown) == 2:
            return request.say(b"", 429, {"Retry-After": "0"})
        return file(request)

    server.answer = answer
    with CoordinatorClient(server.url) as client:
        client.download(announced(), target, sign=lambda: DownloadRequest.signed(identity, "0f" * 32))
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=40000-", "bytes=40000-", "bytes=70000-"]
    assert [header.split()[0] for header in shown] == ["Kantha"] * 4
    requests = [DownloadRequest.model_validate_json(base64.urlsafe_b64decode(each.split()[1])) for each in shown]
    assert {request.verified_peer_id() for request in requests} == {identity.peer_id}
    assert len({request.nonce for request in requests}) == 4


def test_a_file_for_members_only_is_told(server: Server, target: Path) -> None:
    server.answer = lambda request: request.say(b'{"detail": "checkpoints are for members"}', 403)
    with pytest.raises(MembershipError, match="checkpoints are for members"):
        download(server, target)


def test_progress_counts_every_byte_once(server: Server, target: Path) -> None:
    server.answer = ShakyFile(CONTENT, 40_000)
    pieces = download(server, target)
    assert sum(pieces) == len(CONTENT)


def test_a_download_that_breaks_off_again_and_again_is_given_up_and_kept(server: Server, target: Path) -> None:
    server.answer = ShakyFile(CONTENT, *[10_000] * 20)
    with pytest.raises(UnreachableError, match="broke 3 times") as caught:
        download(server, target)
    assert caught.value.exit_code == 20
    assert not target.exists()
    server.answer, server.ranges = ShakyFile(CONTENT), []
    pieces = download(server, target)  # the next time
    assert server.ranges == ["bytes=30000-"]
    assert target.read_bytes() == CONTENT
    assert sum(pieces) == len(CONTENT)  # what is there already counts, so that the bar ends at its end


def test_a_server_that_always_sends_the_whole_file_is_understood(server: Server, target: Path) -> None:
    """Not every proxy knows ranges."""
    whole = ShakyFile(CONTENT, 40_000)

    def ignore_range(request: Request) -> None:
        del request.headers["Range"]
        whole(request)

    server.answer = ignore_range
    download(server, target)
    assert target.read_bytes() == CONTENT


def test_a_file_that_is_all_there_is_not_sent_again(server: Server, target: Path) -> None:
    target.parent.mkdir()
    partial = target.with_name(f"model.{announced().sha256[:12]}.partial")
    partial.write_bytes(CONTENT)  # a program that was killed before it could rename it
    server.answer = ShakyFile(CONTENT)
    download(server, target)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert target.read_bytes() == CONTENT


def test_half_of_an_older_snapshot_does_not_spoil_the_newer_one(server: Server, target: Path) -> None:
    """All snapshots of a run are equally large: a volunteer that comes back later finds half of another file."""
    server.answer = ShakyFile(CONTENT[::-1], *[10_000] * 20)
    with pytest.raises(UnreachableError):
        download(server, target, announced(CONTENT[::-1]))
    server.answer = ShakyFile(CONTENT)
    download(server, target)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("size", [2**36 + 1, 10**400], ids=["large", "no number"])
def test_a_file_of_senseless_size_is_refused(server: Server, target: Path, size: int) -> None:
    with pytest.raises(StorageError, match="GiB"):
        download(server, target, announced().model_copy(update={"size": size}))
    assert server.ranges == []


def test_a_file_that_the_disk_has_no_room_for_is_not_begun(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(StorageError, match="are free; make room") as caught:
        download(server, target)
    assert str(target.parent) in str(caught.value)
    assert server.ranges == []


def test_a_file_that_the_coordinator_no_longer_has_is_told(server: Server, target: Path) -> None:
    with pytest.raises(NotACoordinatorError, match=r"files/model \(HTTP 404\)"):
        download(server, target)
    assert not target.exists()


def test_a_disk_that_refuses_is_told_by_its_path(server: Server, tmp_path: Path) -> None:
    server.answer = ShakyFile(CONTENT)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError) as caught:
        download(server, tmp_path / "file" / "model")
    assert str(caught.value).startswith(f"{tmp_path / 'file' / 'model'}: ")
    assert caught.value.exit_code == 16


def test_a_coordinator_that_goes_away_is_told(server: Server, target: Path, free_port: int) -> None:
    began = time.monotonic()
    with CoordinatorClient(f"http://127.0.0.1:{free_port}") as client, pytest.raises(UnreachableError):
        client.download(announced(), target)
    assert time.monotonic() - began < DEADLINE
