"""Sign-in: who somebody is, by what Hugging Face says. Identity only: no password, no right to anything there.

In a browser by OAuth and OpenID Connect (https://huggingface.co/docs/hub/oauth), where there is none by a token that
may only read. Tokens are used once to ask who it is, and forgotten. `Provider` is all that the pages know of it.
"""

import hmac
import json
import os
from pathlib import Path
from typing import Any, Protocol

import httpx2  # which Authlib's clients are made of
from authlib.integrations.starlette_client import OAuth, OAuthError
from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from huggingface_hub import constants
from joserfc.errors import JoseError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kantha.coordinator.allowlist import Person
from kantha.coordinator.rundir import kept_secret
from kantha.errors import RunDirectoryError, SignInError
from kantha.hub_tokens import TokenAuth

CLIENT_ID, CLIENT_SECRET = "KANTHA_OAUTH_CLIENT_ID", "KANTHA_OAUTH_CLIENT_SECRET"
CLIENT_FILE = "oauth.json"
_KEY_FILE = "session.key"
_SCOPE = "openid profile"  # who it is, and nothing more
_TIMEOUT = 10.0  # seconds
_LARGEST_ANSWER = 1024 * 1024  # bytes; of somebody who is in hundreds of organisations
_USERNAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}$"  # a bound only: the provider knows what a name is
_NO_ANSWER = "Hugging Face does not answer; try again in a minute"
_NOT_UNDERSTOOD = "Hugging Face's answer is not understood; try again, and tell the organizer if it stays so"
_NONSENSE = (ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # what Authlib raises at such an answer
_READ_ONLY = "make a token of the type Read at https://huggingface.co/settings/tokens and use that"


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Organisation(_Answer):
    name: str = Field(max_length=100)


class _WhoAmI(_Answer):
    """What /api/whoami-v2 says, as far as it is used here."""

    type: str
    id: str = Field(min_length=1, max_length=100)
    name: str = Field(pattern=_USERNAME)
    orgs: list[_Organisation] = Field([], max_length=2_000)
    auth: TokenAuth


class _Membership(_Answer):
    preferred_username: str = Field(max_length=100)


class _UserInfo(_Answer):
    """What /oauth/userinfo says, as far as it is used here."""

    sub: str = Field(min_length=1, max_length=100)
    preferred_username: str = Field(pattern=_USERNAME)
    orgs: list[_Membership] | None = Field(None, max_length=2_000)


def whoami(token: str, endpoint: str | None = None) -> Person:
    """Whose token this is. It is sent to `endpoint`, and nowhere else.

    :param endpoint: of the hub; default: Hugging Face's, or that of HF_ENDPOINT
    :raises SignInError: where it is nobody's, may do more than read, or the hub does not answer; without the token
    """
    if not token.isascii() or not token.isprintable() or " " in token:  # no HTTP header can hold it
        raise SignInError(f"this is no Hugging Face token; {_READ_ONLY}")
    content = _ask(f"{endpoint or constants.ENDPOINT}/api/whoami-v2", token)
    try:
        answer = _WhoAmI.model_validate_json(content)
    except ValidationError:
        raise SignInError(_NOT_UNDERSTOOD) from None
    if answer.type != "user":
        raise SignInError(f"this token is an organisation's, not a person's; {_READ_ONLY}")
    if not answer.auth.can_only_read:
        raise SignInError(f"this token may do more than read, which nobody should give away; {_READ_ONLY}")
    return Person(
        username=answer.name,
        subject=answer.id,
        provider="huggingface",
        organisations=tuple(organisation.name for organisation in answer.orgs),
    )


def _ask(url: str, token: str) -> bytes:
    """The body of a hub's answer to somebody who has this token. Raises `SignInError`."""
    content = bytearray()
    try:
        with (
            httpx2.Client(timeout=_TIMEOUT) as client,
            client.stream("GET", url, headers={"Authorization": f"Bearer {token}"}) as answer,
        ):
            if answer.status_code in (401, 403):
                raise SignInError(f"Hugging Face does not know this token, or it has ended; {_READ_ONLY}")
            if answer.status_code == 429:
                raise SignInError("Hugging Face was asked too often; try again in some minutes")
            if answer.status_code != 200:
                raise SignInError(f"{_NO_ANSWER} (HTTP status {answer.status_code})")
            for chunk in answer.iter_bytes(64 * 1024):
                content += chunk
                if len(content) > _LARGEST_ANSWER:
                    raise SignInError(_NOT_UNDERSTOOD)
    except httpx2.HTTPError:
        raise SignInError(_NO_ANSWER) from None
    return bytes(content)


# ---- in a browser


class Provider(Protocol):
    """Somebody who says who people are, in their browsers."""

    name: str

    async def begin(self, request: Request, callback: str) -> Response:
        """Send the browser there; it comes back to the address `callback`. Raises `SignInError`."""

    async def finish(self, request: Request) -> Person:
        """Who came back. Raises `SignInError`; a second time, too, for the same answer."""


class OAuthClient(BaseModel):
    """Under which the provider knows this run; made by the organizer on the provider's page of applications."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    client_id: str = Field(min_length=1, max_length=200)
    client_secret: str = Field(min_length=1, max_length=500, repr=False)


class HuggingFace:
    """Sign-in with Hugging Face: OpenID Connect with PKCE, state and nonce, which wait in the browser's session."""

    name = "huggingface"

    def __init__(self, client: OAuthClient, endpoint: str | None = None) -> None:
        """:param endpoint: of the hub; default: Hugging Face's, or that of HF_ENDPOINT"""
        self._endpoint = endpoint or constants.ENDPOINT
        self._as = client
        self._client = self._fresh_client()

    def _fresh_client(self) -> Any:
        return OAuth().register(
            self.name,
            client_id=self._as.client_id,
            client_secret=self._as.client_secret,
            server_metadata_url=f"{self._endpoint}/.well-known/openid-configuration",
            client_kwargs={"scope": _SCOPE, "code_challenge_method": "S256", "timeout": _TIMEOUT},
        )

    async def begin(self, request: Request, callback: str) -> Response:
        try:
            return await self._client.authorize_redirect(request, callback)
        except (httpx2.HTTPError, *_NONSENSE):
            self._client = self._fresh_client()  # which has not learned that answer
            raise SignInError(_NO_ANSWER) from None

    async def finish(self, request: Request) -> Person:
        try:
            token = await self._client.authorize_access_token(request)
        except OAuthError as error:
            if error.error == "access_denied":
                raise SignInError("sign-in was cancelled at Hugging Face, so nothing has happened") from None
            raise SignInError(
                "this sign-in has ended, was used before, or was begun in another browser; begin it again"
            ) from None
        except httpx2.HTTPError:
            raise SignInError(_NO_ANSWER) from None
        except (JoseError, *_NONSENSE):
            raise SignInError(_NOT_UNDERSTOOD) from None
        claims, access = token.get("userinfo"), token.get("access_token")
        if not claims or not isinstance(access, str):  # without an id token, nobody has looked at the nonce
            raise SignInError(_NOT_UNDERSTOOD)
        content = await run_in_threadpool(_ask, f"{self._endpoint}/oauth/userinfo", access)
        try:
            answer = _UserInfo.model_validate_json(content)
        except ValidationError:
            raise SignInError(_NOT_UNDERSTOOD) from None
        if not hmac.compare_digest(answer.sub.encode(), str(claims.get("sub")).encode()):
            raise SignInError(_NOT_UNDERSTOOD)  # OpenID Connect Core 5.3.2: the answer is another person's
        return Person(
            username=answer.preferred_username,
            subject=answer.sub,
            provider=self.name,
            organisations=tuple(each.preferred_username for each in answer.orgs or ()),
        )


def provider_of(keys: Path) -> Provider | None:
    """The provider of sign-in in browsers, if the organizer gave this run an OAuth client.

    :param keys: the run's folder of secrets; its oauth.json is looked at where the environment names no client
    :raises RunDirectoryError: where the client cannot be used
    """
    path = keys / CLIENT_FILE
    content: object
    if CLIENT_ID in os.environ or CLIENT_SECRET in os.environ:
        source = f"{CLIENT_ID} and {CLIENT_SECRET}"
        content = {"client_id": os.environ.get(CLIENT_ID, ""), "client_secret": os.environ.get(CLIENT_SECRET, "")}
    else:
        source = str(path)
        try:
            if path.stat().st_mode & 0o077:
                raise RunDirectoryError(f"{path}: other users of this machine can read it; `chmod 600 {path}`")
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{path}: cannot be read ({type(error).__name__}); write it anew") from None
    try:
        return HuggingFace(OAuthClient.model_validate(content))
    except ValidationError as error:
        raise RunDirectoryError(
            f"{source}: no OAuth client ({error.errors(include_input=False)[0]['msg']}); "
            "it needs client_id and client_secret, as https://huggingface.co/settings/applications/new shows them"
        ) from None


def session_key(keys: Path) -> str:
    """The secret that signs the sessions of browsers, made when it is first needed; only the owner can read it.

    Who deletes the file and restarts the coordinator signs everybody out.

    :param keys: the run's folder of secrets
    :raises RunDirectoryError: where it cannot be used
    """
    return kept_secret(keys / _KEY_FILE, "everybody signs in again")
