"""The coordinator's web service: the API, and the run's page."""

import ipaddress

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse

from kantha import __version__
from kantha.api import RunDescription
from kantha.coordinator.pages import page_router
from kantha.coordinator.rundir import TOKENIZER_FILE
from kantha.coordinator.service import Coordinator
from kantha.coordinator.status import RunStatus
from kantha.errors import MembershipError
from kantha.swarm.membership import Certificate, MembershipRequest

_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


def build_app(coordinator: Coordinator) -> FastAPI:
    """The web application of one served run."""
    app = FastAPI(title="Kantha coordinator", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(page_router(coordinator.status), include_in_schema=False)

    @app.get("/api/v1/run")
    def describe() -> RunDescription:
        return coordinator.describe()

    @app.post("/api/v1/memberships", status_code=201)
    def join(wish: MembershipRequest, request: Request) -> Certificate:
        if not _is_local(request):
            raise HTTPException(403, "this coordinator only lets in volunteers on its own machine")
        try:
            return coordinator.certify(wish)
        except MembershipError as error:
            raise HTTPException(403, str(error)) from None

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


def _is_local(request: Request) -> bool:
    """Whether the request comes from this machine itself; behind a proxy everything seems to, so that is refused."""
    if any(header in request.headers for header in _PROXY_HEADERS) or request.client is None:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False
