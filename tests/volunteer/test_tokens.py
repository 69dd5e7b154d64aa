"""Signing in by a token: only one that can do nothing but read leaves this machine, once, and nobody ever sees it."""

import getpass
import io
import json
import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub
import pytest
from canaries import TOKEN
from huggingface_hub import constants
from pydantic import SecretStr
from rich.console import Console
from web_server import RUN, Answer, Desk, Request, Server, asked, refused, serving, sign_in

from kantha.api import RunDescription, TokenSignIn
from kantha.errors import KanthaError, SignInError
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import RunKey, Trust
from kantha.volunteer import join as join_module
from kantha.volunteer import membership
from kantha.volunteer.client import CoordinatorClient
from kantha.volunteer.join import JoinOptions
from kantha.volunteer.membership import Applicant, enter
from kantha.volunteer.tokens import read_only_token


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """What says whose a token is, as huggingface.co does."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def who(token: dict[str, Any] | None, kind: str = "access_token") -> Callable[[Request], None]:
    """An answer of /api/whoami-v2."""
    auth = {"type": kind, **({} if token is None else {"accessToken": {"displayName": "mine", **token}})}
    body = {"type": "user", "id": "6a", "name": "asha", "orgs": [], "auth": auth}

    def answer(request: Request) -> None:
        if (request.path, request.headers["Authorization"]) != ("/api/whoami-v2", f"Bearer {TOKEN}"):
            return request.say(b'{"error": "Invalid username or password."}', 401)
        return request.say(json.dumps(body).encode())

    return answer


READ = {"role": "read"}


def test_a_token_that_can_only_read_is_good(hub: Server) -> None:
    hub.answer = who(READ)
    assert read_only_token().get_secret_value() == TOKEN


@pytest.mark.parametrize("token", [{"role": "write"}, None], ids=["write", "application"])
def test_one_that_may_do_more_is_not_sent(
    hub: Server, server: Server, identity: PeerIdentity, key: RunKey, token: dict[str, Any] | None
) -> None:
    hub.answer = who(token)
    desk = Desk(server, key, sign_in())
    with pytest.raises(SignInError, match=r"may do more than read.*type Read") as caught:
        come(desk, identity)
    assert caught.value.exit_code == 32
    assert desk.to("/tokens") == []
    assert TOKEN not in everything(caught.value)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda request: request.say(b"", 401), "does not know this token"),
        (lambda request: request.say(b"", 429), "asked too often"),
        (lambda request: request.say(b"", 302, {"Location": "https://elsewhere.example/"}), "did not say"),
        (lambda request: request.say(b"[]"), "did not say"),
        (lambda request: request.say(b"{}"), "did not say"),
        (lambda request: request.say(TOKEN.encode()), "did not say"),
        (lambda request: setattr(request, "close_connection", True), "does not answer"),
    ],
    ids=["unknown", "often", "redirect", "list", "empty", "no json", "hangs up"],
)
def test_what_nobody_vouches_for_is_not_sent(hub: Server, answer: Callable[[Request], None], match: str) -> None:
    hub.answer = answer
    with pytest.raises(SignInError, match=match) as caught:
        read_only_token()
    assert TOKEN not in everything(caught.value)


def test_a_token_goes_nowhere_unencrypted(hub: Server, identity: PeerIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to a coordinator, nor to a hub; loopback is no network."""
    request = Applicant(identity, RUN, "local", "").request()
    with (
        CoordinatorClient("http://192.0.2.1:8600") as client,
        pytest.raises(SignInError, match="unencrypted") as caught,
    ):
        client.sign_in(TokenSignIn(request=request, token=SecretStr(TOKEN)))
    assert TOKEN not in everything(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1")
    with pytest.raises(SignInError, match=r"HF_ENDPOINT.*unencrypted"):
        read_only_token()
    assert hub.ranges == []


def test_it_is_not_even_read_where_it_may_not_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    console = Console(file=said, width=300)
    remote = RunDescription.model_construct(sign_in="huggingface")
    with CoordinatorClient("http://192.0.2.1:8600") as client:
        with pytest.raises(SignInError, match="unencrypted"):
            join_module._token(client, remote, JoinOptions(token=True), console)
        assert join_module._token(client, remote, JoinOptions(), console) is None
        local = RunDescription.model_construct(sign_in="local")
        assert join_module._token(client, local, JoinOptions(token=True), console) is None
    assert "no token was read or sent" in said.getvalue()
    with CoordinatorClient("https://run.example.org") as client:
        assert join_module._token(client, remote, JoinOptions(token=True), console) is read_only_token


def test_a_hidden_prompt_where_there_is_a_terminal(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.answer = who(READ)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(getpass, "getpass", lambda prompt: f" {TOKEN}\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert read_only_token().get_secret_value() == TOKEN


def test_without_a_terminal_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TOKEN))
    with pytest.raises(SignInError, match="set HF_TOKEN, or run `hf auth login`") as caught:
        read_only_token()
    assert caught.value.exit_code == 32


@pytest.mark.parametrize("given", ["", " ", "hf_\x1b[2J", "hf_টোকেন", "hf_a b", "hf_" + "a" * 200])
def test_what_can_be_no_token_is_sent_nowhere(hub: Server, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: given)
    with pytest.raises(SignInError, match="no Hugging Face token"):
        read_only_token()
    assert hub.ranges == []


# ---- and then


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> RunKey:
    return RunKey.generate(tmp_path_factory.mktemp("key") / "run.pem")


def come(desk: Desk, identity: PeerIdentity, console: Console | None = None) -> None:
    applicant, trust = Applicant(identity, RUN, "local", "own machine"), Trust(RUN, desk.key.public_key)
    with CoordinatorClient(desk.url) as client:
        enter(client, trust, applicant, console or Console(quiet=True), threading.Event(), token=read_only_token)


def everything(error: BaseException) -> str:
    """All that anybody may print of an error: its traceback, with the variables of every frame."""
    told = traceback.TracebackException.from_exception(error, capture_locals=True)
    return "".join(told.format()) + repr(error) + str(error)


def test_who_has_a_token_needs_no_browser(
    hub: Server,
    server: Server,
    identity: PeerIdentity,
    key: RunKey,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(membership, "_ASKED_SECONDS", 0.01)
    hub.answer = who(READ)
    desk = Desk(server, key)
    desk.then(sign_in(), asked(), asked(), desk.admission(desk.certify(identity)))
    said = io.StringIO()
    with caplog.at_level(logging.DEBUG):
        come(desk, identity, Console(file=said, width=300))
    assert [path for path, _ in desk.arrived] == [
        "/api/v1/memberships",
        "/api/v1/tokens",
        "/api/v1/memberships",
        "/api/v1/memberships",
    ]
    (sent,) = desk.to("/tokens")
    assert sent["token"] == TOKEN
    TokenSignIn.model_validate(sent).request.verified_peer_id()
    assert "⏳" in said.getvalue()
    assert "ABCD-EFGH" not in said.getvalue()  # a code that nobody needs
    captured = capfd.readouterr()
    for place in (said.getvalue(), captured.out, captured.err, caplog.text, json.dumps(desk.to("/memberships"))):
        assert TOKEN not in place


def test_a_machine_that_is_known_shows_no_token(
    hub: Server, server: Server, identity: PeerIdentity, key: RunKey
) -> None:
    desk = Desk(server, key)
    desk.then(desk.admission(desk.certify(identity)))
    come(desk, identity)
    assert desk.to("/tokens") == []
    assert hub.ranges == []


@pytest.mark.parametrize(
    "answer",
    [refused("this token is not known"), (422, {"detail": [{"input": TOKEN}]}), (500, {"detail": "no"})],
    ids=["refused", "echo", "broken"],
)
def test_no_error_shows_it(hub: Server, server: Server, identity: PeerIdentity, key: RunKey, answer: Answer) -> None:
    hub.answer = who(READ)
    desk = Desk(server, key, sign_in(), answer)
    with pytest.raises(KanthaError) as caught:
        come(desk, identity)
    assert TOKEN not in str(caught.value)
    assert TOKEN not in repr(caught.value)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert len(desk.to("/tokens")) == 1
