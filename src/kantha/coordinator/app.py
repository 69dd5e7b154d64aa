"""The coordinator's web service: the API, and the run's page."""

import ipaddress
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kantha import __version__
from kantha.api import RunDescription
from kantha.coordinator.pages import page_router
from kantha.coordinator.rundir import TOKENIZER_FILE
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.errors import MembershipError, StorageError
from kantha.swarm.membership import Certificate, MembershipRequest

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_LARGEST_BODY = 16 * 1024  # bytes; a membership request has about 2,000


def build_app(coordinator: Coordinator, any_host: bool = False) -> FastAPI:
    """The web application of one served run.

    :param any_host: whether it may be looked at under every host name, not only this machine's and the link's
    """
    app = FastAPI(title="Kantha coordinator", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(_Door, names={*_LOCAL_NAMES, urlsplit(coordinator.address).hostname or ""}, any_host=any_host)
    app.include_router(page_router(coordinator.status), include_in_schema=False)

    @app.get("/api/v1/run")
    def describe() -> RunDescription:
        return coordinator.describe()

    @app.post("/api/v1/memberships", status_code=201)
    def join(wish: MembershipRequest) -> Certificate:
        try:
            return coordinator.certify(wish)
        except MembershipError as error:
            raise HTTPException(403, str(error)) from None
        except StorageError as error:
            raise HTTPException(503, str(error)) from None

    @app.get("/api/v1/status")
    def status() -> RunStatus:
        return coordinator.status()

    @app.get(f"/api/v1/{TOKENIZER_FILE}")
    def tokenizer() -> FileResponse:
        return FileResponse(coordinator.run.tokenizer, media_type="application/json")

    @app.get("/api/v1/checkpoints/{round_number}/{name}")
    def checkpoint(round_number: int, name: str) -> FileResponse:
        path = coordinator.checkpoint_file(round_number, name)
        if path is None:
            raise HTTPException(404, "no such checkpoint; it may have been replaced by a newer one")
        return FileResponse(path)

    return app


class _Door:
    """Turns away what nobody should ask, by its headers alone: before any of its body is read.

    A page from elsewhere in a browser on this machine must not speak for it. It cannot under its own host name (which
    somebody may have pointed to this machine), nor in JSON (for which browsers ask us first, and get no leave).
    """

    def __init__(self, app: ASGIApp, names: set[str], any_host: bool) -> None:
        self._app = app
        self._names = names
        self._any_host = any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self._app
        if scope["type"] == "http" and (refusal := self._refusal(Request(scope))) is not None:
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
        if not _is_local(request):
            return 403, "this coordinator only lets in volunteers on its own machine"
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "only application/json is understood"
        length = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            return 411, "the length of the body has to be told"
        if int(length) > _LARGEST_BODY:
            return 413, f"the body is larger than {_LARGEST_BODY} bytes"
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
