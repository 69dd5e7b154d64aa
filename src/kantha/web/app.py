"""The coordinator's web service: the API, the run's page, and the pages about persons where people sign in."""

import ipaddress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kantha import __version__
from kantha.api import Admission, LeaseTaken, RunDescription, TokenSignIn, Waiting
from kantha.coordinator.limiter import POSTS, TOKENS, Limiter, TooManyRequestsError, address_of
from kantha.coordinator.rundir import TOKENIZER_FILE
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.errors import LeaseError, MembershipError, SignInError, StorageError, printable
from kantha.swarm.membership import DepartureRequest, MembershipRequest
from kantha.web import dashboard, desk, people, polls, signin
from kantha.web import join as ways_to_join
from kantha.web.site import FORM_TYPES, Site, largest_form

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_STATUS: dict[type[Exception], int] = {  # by what goes wrong
    MembershipError: 403,
    SignInError: 403,
    LeaseError: 409,
    TooManyRequestsError: 429,
    StorageError: 503,
}
_ANSWERS: dict[int | str, dict[str, Any]] = {202: {"model": Waiting}, 409: {"model": LeaseTaken}}
_LARGEST_BODY = 16 * 1024  # bytes; a membership request has about 2,000
_MOST_DIGITS = 20  # of a length; Python makes no number of thousands


def build_app(coordinator: Coordinator, any_host: bool = False) -> FastAPI:
    """The web application of one served run.

    :param any_host: whether it may be looked at under every host name, not only this machine's and the link's
    """
    app = FastAPI(title="Kantha coordinator", version=__version__, docs_url=None, redoc_url=None)
    limiter = Limiter()
    only_local = coordinator.sign_in == "local"
    site = Site(app, coordinator, None if only_local else signin.provider_of(coordinator.run.keys))
    app.add_middleware(  # after that of the sessions, so that it is asked before
        _Door,
        names={*_LOCAL_NAMES, urlsplit(coordinator.address).hostname or ""},
        any_host=any_host,
        only_local=only_local,
        limiter=limiter,
    )
    for kind, code in _STATUS.items():
        app.add_exception_handler(kind, partial(_tell, code))
    app.add_exception_handler(RequestValidationError, _tell_what_is_malformed)
    for pages in (dashboard, people, ways_to_join, desk, polls):
        pages.add_pages(site)

    @app.get("/api/v1/run")
    def describe() -> RunDescription:
        return coordinator.describe()

    @app.post("/api/v1/memberships", status_code=201, responses=_ANSWERS)
    def join(wish: MembershipRequest, response: Response) -> Admission | Waiting:
        return _with_status(response, coordinator.admission.admit(wish))

    @app.post("/api/v1/tokens", status_code=201, responses=_ANSWERS)
    def sign_in(wish: TokenSignIn, request: Request, response: Response) -> Admission | Waiting:
        if coordinator.sign_in == "local":
            raise MembershipError("this run knows no sign-in; join without a token, with --name")
        limiter.hit(TOKENS, "token", address_of(request))
        person = signin.whoami(wish.token.get_secret_value())
        return _with_status(response, coordinator.admission.sign_in_with(wish.request, person))

    @app.post("/api/v1/departures", status_code=204)
    def leave(wish: DepartureRequest) -> None:
        coordinator.admission.depart(wish)

    @app.get("/api/v1/status")
    def status() -> RunStatus:
        return coordinator.status()

    @app.get(f"/api/v1/{TOKENIZER_FILE}")
    def tokenizer() -> FileResponse:
        return FileResponse(coordinator.run.tokenizer, media_type="application/json")

    @app.get("/api/v1/checkpoints/{round_number}/{name}")
    def checkpoint(round_number: int, name: str, request: Request) -> FileResponse:
        coordinator.admission.check_download(request.headers.get("authorization", ""))
        path = coordinator.checkpoint_file(round_number, name)
        if path is None:
            raise HTTPException(404, "no such checkpoint; it may have been replaced by a newer one")
        return FileResponse(path)

    return app


def _with_status(response: Response, answer: Admission | Waiting) -> Admission | Waiting:
    if isinstance(answer, Waiting):
        response.status_code = 202
    return answer


def _tell(status: int, _request: Request, error: Exception) -> JSONResponse:
    headers = {"Retry-After": str(error.seconds)} if isinstance(error, TooManyRequestsError) else None
    return JSONResponse({"detail": str(error)}, status, headers)


def _tell_what_is_malformed(_request: Request, error: Exception) -> JSONResponse:
    """Where, and what is wrong there; never what was sent, which may hold a token."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    detail = [
        {
            "loc": [printable(part, 60) for part in problem["loc"]],
            "msg": printable(problem["msg"]),
            "type": problem["type"],
        }
        for problem in problems[:20]
    ]
    return JSONResponse({"detail": detail}, 422)


class _Door:
    """Turns away what nobody should ask, by its headers alone: before any of its body is read.

    A page from elsewhere in a browser on this machine must not speak for it. It cannot under its own host name (which
    somebody may have pointed to this machine), nor in JSON (for which browsers ask us first, and get no leave). The
    forms of the pages have a protection of their own (site.py).
    """

    def __init__(self, app: ASGIApp, names: set[str], any_host: bool, only_local: bool, limiter: Limiter) -> None:
        self._app = app
        self._names = names
        self._any_host = any_host
        self._only_local = only_local
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self._app
        try:
            refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        except TooManyRequestsError as error:
            answer = _tell(429, Request(scope), error)
            answer.headers["Connection"] = "close"
        else:
            if refusal is not None:
                status, reason = refusal
                # with "close", the server does not wait for the rest of the body either
                answer = JSONResponse({"detail": reason}, status, headers={"Connection": "close"})
        await answer(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """HTTP status and reason; None lets the request in."""
        looks = request.method in ("GET", "HEAD")
        if not (self._any_host and looks) and _host_name(request) not in self._names:
            return 400, "this coordinator is not known by that host name; use the link that `kantha serve` printed"
        if looks:
            return None
        if self._only_local and not _is_local(request):
            return 403, "this coordinator only lets in volunteers on its own machine"
        self._limiter.hit(POSTS, "post", address_of(request))
        types: tuple[str, ...] = ("application/json",)
        largest = _LARGEST_BODY
        if (form := largest_form(request.url.path)) is not None:
            types, largest = FORM_TYPES, form
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in types:
            return 415, f"only {' and '.join(types)} is understood"
        length = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            return 411, "the length of the body has to be told"
        if len(length) > _MOST_DIGITS or int(length) > largest:
            return 413, f"the body is larger than {largest} bytes"
        return None


def _host_name(request: Request) -> str | None:
    """The host that the request is for, in lower case, without its port."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def _is_local(request: Request) -> bool:
    """Whether the request comes from this machine itself; behind a proxy everything seems to, so that is refused."""
    if any(header in request.headers for header in _PROXY_HEADERS) or request.client is None:
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback  # mapped: as an IPv6 socket sees IPv4
    except ValueError:
        return False
