"""Signing in by a Hugging Face token, where there is no browser at hand: found, checked, and never kept.

Only a token that can do nothing but read is given to the coordinator. What it may do is asked of Hugging Face, and of
nobody else, before that.
"""

import getpass
import sys
from typing import Any

import httpx
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from pydantic import BaseModel, SecretStr, ValidationError

from kantha.errors import SignInError
from kantha.hub_tokens import TokenAuth
from kantha.volunteer.client import is_private

_TIMEOUT = 20.0  # seconds
_LONGEST = 200  # characters
_HOW = "make one of the type Read at https://huggingface.co/settings/tokens, give it to nobody else, and use that"


class _WhoAmI(BaseModel):
    """What /api/whoami-v2 answers, as far as it is used here."""

    name: str
    auth: TokenAuth


def read_only_token() -> SecretStr:
    """The token of `hf auth login`, of HF_TOKEN, or of a hidden prompt, if Hugging Face says that it can only read.

    Raises `SignInError` where there is none, or none that may be given away.
    """
    token = _find()
    answer = _ask(token)
    if not answer.auth.can_only_read:
        raise SignInError(
            "your Hugging Face token may do more than read, so it is not sent: nobody should have a token that can "
            f"write in your name; {_HOW}"
        )
    return token


def _find() -> SecretStr:
    try:
        token = huggingface_hub.get_token()
    except (
        HfHubHTTPError,
        httpx.HTTPError,
        OSError,
        ValueError,
    ) as error:  # it may have to be renewed over the network
        raise SignInError(
            f"the Hugging Face token that is stored here cannot be used ({type(error).__name__}); "
            "set HF_TOKEN to another one"
        ) from None
    if token is None:
        if not sys.stdin.isatty():
            raise SignInError(
                f"there is no Hugging Face token on this machine; {_HOW}: set HF_TOKEN, or run `hf auth login`"
            )
        try:
            token = getpass.getpass("Hugging Face token of the type Read (it is not shown, and not kept): ")
        except EOFError:
            token = ""
    token = token.strip()
    if not token or len(token) > _LONGEST or not (token.isascii() and token.isprintable()) or " " in token:
        raise SignInError(f"what was given is no Hugging Face token; {_HOW}")
    return SecretStr(token)


def _ask(token: SecretStr) -> _WhoAmI:
    """Whose it is, and what it may do. It goes to Hugging Face, or where HF_ENDPOINT says."""
    url = f"{constants.ENDPOINT}/api/whoami-v2"
    if not is_private(url):
        raise SignInError(f"HF_ENDPOINT is {constants.ENDPOINT}: your token would go there unencrypted; use https://")
    try:
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token.get_secret_value()}"}, timeout=_TIMEOUT)
    except httpx.HTTPError as error:
        raise SignInError(
            f"{constants.ENDPOINT} does not answer ({type(error).__name__}), so nobody can say what your token may do; "
            "try again, or join without --token"
        ) from None
    if answer.status_code == 401:
        raise SignInError(f"Hugging Face does not know this token, or it has ended; {_HOW}")
    if answer.status_code == 429:
        raise SignInError("Hugging Face was asked too often whose token this is; try again in some minutes")
    try:
        if answer.status_code != 200:
            raise ValueError(f"HTTP {answer.status_code}")
        content: Any = answer.json()
        return _WhoAmI.model_validate(content)
    except (ValidationError, ValueError):
        raise SignInError(
            f"{constants.ENDPOINT} did not say what your token may do (HTTP {answer.status_code}), so it is not sent; "
            "try again, or join without --token"
        ) from None
