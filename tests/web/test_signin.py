"""Whose a token is, and what of a run's folder sign-in uses; test_people.py has the browser's side."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from canaries import CLIENT_SECRET
from fastapi import Response
from fastapi.responses import JSONResponse
from hub_accounts import Accounts, serving

from kantha.coordinator.allowlist import Person
from kantha.errors import RunDirectoryError, SignInError
from kantha.web import signin
from kantha.web.signin import HuggingFace, provider_of, session_key, whoami


@pytest.fixture(scope="module")
def _hub() -> Iterator[Accounts]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(_hub: Accounts) -> Accounts:
    _hub.alter.clear()
    _hub.add("asha", "bengali-nlp", "village")
    return _hub


# ---- a token


@pytest.mark.parametrize(("role", "permissions"), [("read", ()), ("fineGrained", ("repo.content.read",))])
def test_a_token_that_may_only_read_says_who_it_is(hub: Accounts, role: str, permissions: tuple[str, ...]) -> None:
    token = hub.add_token("asha", role, *permissions)
    person = whoami(token, hub.url)
    assert person == Person("asha", hub.people["asha"].subject, "huggingface", ("bengali-nlp", "village"))


@pytest.mark.parametrize(
    ("role", "permissions"), [("write", ()), (None, ()), ("fineGrained", ("repo.content.read", "repo.write"))]
)
def test_a_token_that_may_more_is_refused_with_the_way_to_a_weaker_one(
    hub: Accounts, role: str | None, permissions: tuple[str, ...]
) -> None:
    token = hub.add_token("asha", role, *permissions)
    with pytest.raises(SignInError, match="make a token of the type Read") as caught:
        whoami(token, hub.url)
    assert token not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_unknown", "two words", "with\nline", "ইয়ে", "hf_x\x00"])
def test_a_token_of_nobody_is_refused_without_saying_it(hub: Accounts, token: str) -> None:
    with pytest.raises(SignInError) as caught:
        whoami(token, hub.url)
    assert token not in str(caught.value)
    assert "\n" not in str(caught.value)


def person(**changes: object) -> Response:
    content = {"type": "user", "id": "1", "name": "asha", "orgs": [], "auth": {"accessToken": {"role": "read"}}}
    return JSONResponse(content | changes)


@pytest.mark.parametrize(
    "answer",
    [
        Response("<html>", 200),
        Response("", 200),
        Response("[" * 100_000, 200),
        Response(b"\xff\xfe", 200),
        Response("x" * 3_000_000, 200),
        JSONResponse({}, 200),
        JSONResponse({}, 429),
        JSONResponse({}, 500),
        Response("", 302, {"Location": "https://elsewhere.example/"}),
        person(name="as ha"),
        person(name="<b>"),
        person(name=""),
        person(name="x" * 97),
        person(id=""),
        person(id=7),
        person(type="org"),
        person(orgs="all"),
        person(orgs=[{"name": "x" * 101}]),
        person(orgs=[{"name": "x"}] * 2_001),
        person(auth={}),
        person(auth={"accessToken": {"role": "fineGrained"}}),
        person(auth={"accessToken": {"role": "fineGrained", "fineGrained": {"global": "all"}}}),
    ],
    ids=str,
)
def test_a_hub_that_answers_nonsense_lets_nobody_in(hub: Accounts, answer: Response) -> None:
    token = hub.add_token("asha")
    hub.alter["whoami"] = lambda _: answer
    with pytest.raises(SignInError) as caught:
        whoami(token, hub.url)
    assert token not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_away_is_said(free_port: int) -> None:
    with pytest.raises(SignInError, match="does not answer"):
        whoami("hf_x", f"http://127.0.0.1:{free_port}")


def test_a_hub_that_is_slow_is_given_up(hub: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signin, "_TIMEOUT", 0.0)
    with pytest.raises(SignInError, match="does not answer"):
        whoami(hub.add_token("asha"), hub.url)


# ---- files of a run


def test_the_key_of_sessions_is_drawn_once_and_for_the_owner_only(tmp_path: Path) -> None:
    key = session_key(tmp_path)
    assert len(key) == 64
    assert session_key(tmp_path) == key
    assert (tmp_path / "session.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["session.key"]
    (tmp_path / "session.key").unlink()
    assert session_key(tmp_path) != key


@pytest.mark.parametrize(("content", "mode"), [("", 0o600), ("short", 0o600), ("0" * 64, 0o644), ("আ" * 64, 0o600)])
def test_a_key_of_sessions_that_is_not_secret_is_not_used(tmp_path: Path, content: str, mode: int) -> None:
    path = tmp_path / "session.key"
    path.write_text(content, encoding="utf-8")
    path.chmod(mode)
    with pytest.raises(RunDirectoryError, match=r"session\.key"):
        session_key(tmp_path)


def test_a_run_without_a_client_has_no_sign_in_in_browsers(tmp_path: Path) -> None:
    assert provider_of(tmp_path) is None


def test_the_client_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "oauth.json"
    path.write_text(json.dumps({"client_id": "a", "client_secret": CLIENT_SECRET}))
    path.chmod(0o600)
    assert isinstance(provider_of(tmp_path), HuggingFace)
    path.write_text("{")
    monkeypatch.setenv("KANTHA_OAUTH_CLIENT_ID", "a")
    monkeypatch.setenv("KANTHA_OAUTH_CLIENT_SECRET", CLIENT_SECRET)
    assert isinstance(provider_of(tmp_path), HuggingFace)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (json.dumps({"client_id": "a", "client_secret": CLIENT_SECRET}), 0o640),
        (json.dumps({"client_id": "a", "client_secret": CLIENT_SECRET})[:-1], 0o600),
        ('{"client_id": "a"}', 0o600),
        (json.dumps({"client_id": "", "client_secret": CLIENT_SECRET}), 0o600),
        (json.dumps({"client_id": "a", "client_secret": [CLIENT_SECRET]}), 0o600),
        (json.dumps({"client_id": "a", "client_secret": CLIENT_SECRET, "more": 1}), 0o600),
        (json.dumps([CLIENT_SECRET]), 0o600),
    ],
)
def test_a_client_that_cannot_be_used_is_told_without_its_secret(tmp_path: Path, content: str, mode: int) -> None:
    path = tmp_path / "oauth.json"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(RunDirectoryError, match=r"oauth\.json") as caught:
        provider_of(tmp_path)
    assert "canary" not in str(caught.value)


def test_half_a_client_in_the_environment_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANTHA_OAUTH_CLIENT_ID", "a")
    with pytest.raises(RunDirectoryError, match="KANTHA_OAUTH_CLIENT_SECRET"):
        provider_of(tmp_path)
