"""The coordinator's web service: the API, the run's page, and the pages about persons where people sign in."""

from functools import partial
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kantha import __version__
from kantha.api import Admission, LeaseTaken, RunDescription, TokenSignIn, Waiting
from kantha.coordinator.limiter import POSTS, TOKENS, Limiter, TooManyRequestsError, address_of, is_local
from kantha.coordinator.rundir import TOKENIZER_FILE
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.errors import LeaseError, MembershipError, SignInError, StorageError, printable
from kantha.swarm.membership import DepartureRequest, MembershipRequest
from kantha.web import dashboard, desk, oneself, people, polls, signin, volunteers, world
from kantha.web import join as ways_to_join
from kantha.web.site import FORM_TYPES, Site, largest_form

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_STATUS: dict[type[Exception], int] = {  # by what goes wrong
    MembershipError: 403,
    SignInError: 403,
    LeaseError: 409,
    TooManyRequestsError: 429,
    StorageError: 503,
}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    201: {"description": "In: the certificate is good for some hours, and is asked for again before it ends."},
    202: {"model": Waiting, "description": "Not in yet: somebody has to sign in, or a moderator to decide."},
    403: {"description": "Not let in; the text says why, and what to do."},
    409: {"model": LeaseTaken, "description": "Another machine has this member's place on this service."},
    429: {"description": "Too often; Retry-After says when to come again."},
}
_ABOUT = """\
What everybody may ask of this run, and what its volunteers say to the coordinator. What GET answers is
public, but for checkpoints, which are for members. There is no key to ask for: `kantha join` shows who it is by signing
what it sends. Times are in seconds since 1970, losses in nats."""
# Of all that is no page: what it is, it is not a document, and nobody else's to frame or to keep.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_LARGEST_BODY = 16 * 1024  # bytes; a membership request has about 2,000
_MOST_DIGITS = 20  # of a length; Python makes no number of thousands


def build_app(coordinator: Coordinator, any_host: bool = False) -> FastAPI:
    """The web application of one served run.

    :param any_host: whether it may be looked at under every host name, not only this machine's and the link's
    """
    app = FastAPI(title="Kantha coordinator", version=__version__, description=_ABOUT, docs_url=None, redoc_url=None)
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
    for pages in (dashboard, people, oneself, ways_to_join, desk, volunteers, polls, world):
        pages.add_pages(site)

    @app.get("/api/v1/run", summary="What it takes to join")
    def describe() -> RunDescription:
        """The run's spec, its key, where its swarm is, and the digests of all files that a newcomer needs."""
        return coordinator.describe()

    @app.post("/api/v1/memberships", status_code=201, responses=_ANSWERS, summary="Join, or stay")
    def join(wish: MembershipRequest, response: Response) -> Admission | Waiting:
        """A peer asks for a membership certificate, in a request that its key signed; the same one is never good
        twice."""
        return _with_status(response, coordinator.admission.admit(wish))

    @app.post("/api/v1/tokens", status_code=201, responses=_ANSWERS, summary="Join by a Hugging Face token")
    def sign_in(wish: TokenSignIn, request: Request, response: Response) -> Admission | Waiting:
        """For machines without a browser near them. The token may only read; it is used once, and kept nowhere."""
        if coordinator.sign_in == "local":
            raise MembershipError("this run knows no sign-in; join without a token, with --name")
        limiter.hit(TOKENS, "token", address_of(request))
        person = signin.whoami(wish.token.get_secret_value())
        return _with_status(response, coordinator.admission.sign_in_with(wish.request, person))

    @app.post(
        "/api/v1/departures", status_code=204, responses={403: _ANSWERS[403], 429: _ANSWERS[429]}, summary="Leave"
    )
    def leave(wish: DepartureRequest) -> None:
        """The member's place is free at once, for another of its machines."""
        coordinator.admission.depart(wish)

    @app.get("/api/v1/status", summary="The run at a glance")
    def status() -> RunStatus:
        """What the run's page shows. It is made anew once a second at most."""
        return coordinator.status()

    @app.get(f"/api/v1/{TOKENIZER_FILE}", summary="The run's tokenizer")
    def tokenizer() -> FileResponse:
        """As the library `tokenizers` reads it. Its digest is in the run's spec."""
        return FileResponse(coordinator.run.tokenizer, media_type="application/json")

    @app.get(
        "/api/v1/checkpoints/{round_number}/{name}",
        responses={403: _ANSWERS[403], 404: {"description": "There is no such checkpoint; it may have been replaced."}},
        summary="A file of a checkpoint, for members",
    )
    def checkpoint(
        round_number: Annotated[int, PathParameter(description="Of the checkpoint.")],
        name: Annotated[str, PathParameter(description="One of the files that `/api/v1/run` names.")],
        request: Request,
    ) -> FileResponse:
        """Takes a signed request in the Authorization header: `Kantha`, and its JSON in base64. Parts of a file can be
        asked for by Range."""
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
    """Turns away what nobody should ask, by its headers alone: before any of its body is read. And whatever is answered
    says what a browser may do with it, in the words of pages (site.py) or else in the strictest ones.

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

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await answer(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """HTTP status and reason; None lets the request in."""
        looks = request.method in ("GET", "HEAD")
        if not (self._any_host and looks) and _host_name(request) not in self._names:
            return 400, "this coordinator is not known by that host name; use the link that `kantha serve` printed"
        if looks:
            return None
        if self._only_local and not is_local(request):
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
