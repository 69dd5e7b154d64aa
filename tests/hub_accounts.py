"""A Hugging Face on loopback, as far as it says who people are: sign-in with OAuth and OpenID Connect, and `whoami`.

Shapes and manners are those of huggingface.co: discovery, an authorization page for a browser, PKCE (S256), a code that
is good once, a client that proves itself by HTTP basic, a signed id token with the nonce, `userinfo` with
organisations, `whoami-v2` with the kind of a token. There are no passwords here: who sits at the browser names himself.
"""

import base64
import hashlib
import hmac
import html
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx2
import uvicorn
from canaries import ACCESS_TOKEN, CLIENT_SECRET, CODE, TOKEN
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT_ID = "kantha-tests"
_KEY = RSAKey.generate_key(2048, {"kid": "1", "use": "sig", "alg": "RS256"})


@dataclass
class Account:
    name: str
    subject: str
    organisations: tuple[str, ...] = ()


@dataclass
class Token:
    """:param role: read, write or fineGrained; None: not made on the page of tokens, but by some OAuth application"""

    account: Account
    role: str | None
    permissions: tuple[str, ...] = ()


@dataclass
class _Grant:
    account: Account
    client_id: str
    redirect_uri: str
    scope: str
    nonce: str | None
    challenge: str


@dataclass
class Accounts:
    """What the server holds, and what came to it. Tests change both.

    :param url: of the server
    :param redirect_uris: where an answer may be sent; a test adds that of its coordinator
    :param alter: makes another answer of an endpoint's, by its name: to see what a hub that is broken or hostile does
    """

    url: str = ""
    redirect_uris: set[str] = field(default_factory=set)
    people: dict[str, Account] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)  # what people made on their page of tokens
    alter: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # METHOD PATH?QUERY
    scopes: list[str] = field(default_factory=list)  # that were asked for
    access_tokens: dict[str, tuple[Account, str]] = field(default_factory=dict)  # with their scope
    grants: dict[str, _Grant] = field(default_factory=dict)  # by code

    def add(self, name: str, *organisations: str) -> Account:
        """A new account, with a subject that follows from its name."""
        account = Account(name, hashlib.sha256(name.encode()).hexdigest()[:24], organisations)
        self.people[name] = account
        return account

    def add_token(self, name: str, role: str | None = "read", *permissions: str) -> str:
        token = f"{TOKEN}{secrets.token_hex(14)}"
        self.tokens[token] = Token(self.people[name], role, permissions)
        return token

    def allow(self, authorization_url: str, name: str, choice: str = "allow") -> str:
        """Do what a person does in a browser on the authorization page; returns where the browser is sent then."""
        with httpx2.Client() as browser:
            assert browser.get(authorization_url).status_code == 200
            asked = urlsplit(authorization_url)
            answer = browser.post(
                f"{self.url}/oauth/authorize?{asked.query}", data={"username": name, "choice": choice}
            )
        assert answer.status_code == 303, answer.text
        return str(answer.headers["location"])


@contextmanager
def serving() -> Iterator[Accounts]:
    accounts = Accounts()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accounts.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(_app(accounts), log_level="warning", proxy_headers=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield accounts
        finally:
            server.should_exit = True
            thread.join()


def _app(hub: Accounts) -> FastAPI:
    app = FastAPI()

    def answer(endpoint: str, content: dict[str, Any], status: int = 200) -> Response:
        changed = hub.alter.get(endpoint, lambda same: same)(content)
        return changed if isinstance(changed, Response) else JSONResponse(changed, status)

    @app.middleware("http")
    async def note(request: Request, go_on: Callable[[Request], Any]) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        hub.requests.append(f"{request.method} {request.url.path}{query}")
        return await go_on(request)

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/.well-known/openid-configuration")
    def discovery() -> Response:
        return answer(
            "discovery",
            {
                "issuer": hub.url,
                "authorization_endpoint": f"{hub.url}/oauth/authorize",
                "token_endpoint": f"{hub.url}/oauth/token",
                "userinfo_endpoint": f"{hub.url}/oauth/userinfo",
                "jwks_uri": f"{hub.url}/oauth/jwks",
                "scopes_supported": ["openid", "profile", "email", "read-repos", "write-repos"],
                "response_types_supported": ["code"],
                "grant_types_supported": ["authorization_code"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": ["RS256"],
                "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
                "code_challenge_methods_supported": ["S256"],
            },
        )

    @app.get("/oauth/jwks")
    def jwks() -> Response:
        return answer("jwks", {"keys": [_KEY.as_dict(private=False)]})

    def wrong(query: Any) -> str | None:
        if query.get("client_id") != CLIENT_ID or query.get("redirect_uri") not in hub.redirect_uris:
            return "unknown client, or a redirect_uri that it has not registered"
        if query.get("response_type") != "code" or query.get("code_challenge_method") != "S256":
            return "only codes with PKCE (S256) are given here"
        return None

    @app.get("/oauth/authorize")
    def authorize(request: Request) -> Response:
        if (reason := wrong(request.query_params)) is not None:
            return HTMLResponse(reason, 400)
        scope = request.query_params.get("scope", "")
        hub.scopes.append(scope)
        return HTMLResponse(
            f"""<!doctype html><html lang="en"><title>Authorize</title><h1>Local hub</h1>
            <form method="post">
            <p>{html.escape(CLIENT_ID)} would like to know: {html.escape(scope)}</p>
            <label>Username <input name="username"></label>
            <button name="choice" value="allow">Authorize</button>
            <button name="choice" value="deny">Cancel</button>
            </form></html>"""
        )

    @app.post("/oauth/authorize")
    async def choose(request: Request) -> Response:
        query = request.query_params
        if (reason := wrong(query)) is not None:
            return HTMLResponse(reason, 400)
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        back = {"state": query["state"]} if "state" in query else {}
        if form.get("choice") == "allow":
            code = f"{CODE}{secrets.token_urlsafe(16)}"
            hub.grants[code] = _Grant(
                hub.people[form["username"]],
                query["client_id"],
                query["redirect_uri"],
                query.get("scope", ""),
                query.get("nonce"),
                query["code_challenge"],
            )
            back["code"] = code
        else:
            back |= {"error": "access_denied", "error_description": "The user denied the request"}
        return RedirectResponse(f"{query['redirect_uri']}?{urlencode(back)}", 303)

    @app.post("/oauth/token")
    async def token(request: Request) -> Response:
        expected = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        if not hmac.compare_digest(request.headers.get("authorization", ""), f"Basic {expected}"):
            return JSONResponse({"error": "invalid_client", "error_description": "Invalid client secret"}, 401)
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        grant = hub.grants.pop(form.get("code", ""), None)  # good once, whatever comes of it
        proof = base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest())
        if (
            grant is None
            or form.get("grant_type") != "authorization_code"
            or form.get("redirect_uri") != grant.redirect_uri
            or proof.rstrip(b"=").decode() != grant.challenge
        ):
            return JSONResponse({"error": "invalid_grant", "error_description": "Code not found"}, 400)
        access = f"{ACCESS_TOKEN}{secrets.token_hex(12)}"
        hub.access_tokens[access] = (grant.account, grant.scope)
        now = int(time.time())
        claims = {
            "iss": hub.url,
            "sub": grant.account.subject,
            "aud": grant.client_id,
            "iat": now,
            "exp": now + 3600,
            "nonce": grant.nonce,
            "name": grant.account.name.title(),
            "preferred_username": grant.account.name,
        }
        claims = hub.alter.get("claims", lambda same: same)(claims)
        return answer(
            "token",
            {
                "access_token": access,
                "token_type": "bearer",
                "expires_in": 28_800,
                "scope": grant.scope,
                "id_token": jwt.encode({"alg": "RS256", "kid": "1"}, claims, _KEY),
            },
        )

    @app.get("/oauth/userinfo")
    def userinfo(request: Request) -> Response:
        known = hub.access_tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if known is None or "openid" not in known[1].split():
            return JSONResponse({"error": "Invalid credentials in Authorization header"}, 401)
        account, scope = known
        content: dict[str, Any] = {"sub": account.subject}
        if "profile" in scope.split():
            content |= {
                "name": account.name.title(),
                "preferred_username": account.name,
                "profile": f"{hub.url}/{account.name}",
                "picture": f"{hub.url}/avatars/{account.subject}.svg",
                "website": "",
                "isPro": False,
                "orgs": [
                    {
                        "sub": hashlib.sha256(name.encode()).hexdigest()[:24],
                        "name": name.title(),
                        "preferred_username": name,
                        "picture": f"{hub.url}/avatars/{name}.svg",
                        "isEnterprise": False,
                    }
                    for name in account.organisations
                ],
            }
        return answer("userinfo", content)

    @app.get("/api/whoami-v2")
    def whoami(request: Request) -> Response:
        token = hub.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if token is None:
            return answer("whoami", {"error": "Invalid username or password."}, 401)
        account = token.account
        kind: dict[str, Any] = {"type": "oauth"}
        if token.role is not None:
            access: dict[str, Any] = {
                "displayName": "mine",
                "role": token.role,
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
            if token.role == "fineGrained":
                entity = {"_id": account.subject, "type": "user", "name": account.name}
                scoped = [{"entity": entity, "permissions": list(token.permissions)}]
                access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
            kind = {"type": "access_token", "accessToken": access}
        return answer(
            "whoami",
            {
                "type": "user",
                "id": account.subject,
                "name": account.name,
                "fullname": account.name.title(),
                "canPay": False,
                "isPro": False,
                "avatarUrl": f"{hub.url}/avatars/{account.subject}.svg",
                "orgs": [
                    {"type": "org", "id": hashlib.sha256(name.encode()).hexdigest()[:24], "name": name}
                    for name in account.organisations
                ],
                "auth": kind,
            },
        )

    return app
