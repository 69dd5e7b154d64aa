"""The volunteer's side of the coordinator's API: everything that arrives is checked before it is used."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx
from pydantic import ValidationError

from kantha import __version__
from kantha.api import RemoteFile, RunDescription
from kantha.digests import check_file
from kantha.errors import (
    DigestError,
    FingerprintError,
    MembershipError,
    NotACoordinatorError,
    StorageError,
    UnreachableError,
)
from kantha.spec import RunSpec
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import Certificate, MembershipRequest, Service

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_ATTEMPTS = 3  # downloads of one file before giving up; each goes on where the last one broke off


class CoordinatorClient:
    """A connection to the coordinator at a run's link. A context manager.

    All methods raise `UnreachableError` where nobody answers and `NotACoordinatorError` where somebody else does.
    """

    def __init__(self, url: str) -> None:
        if "://" not in url:
            url = f"http://{url}"
        self.url = url.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=f"{self.url}/", timeout=_TIMEOUT, headers={"User-Agent": f"kantha/{__version__}"}
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise UnreachableError(f"{url}: not an address ({error}); copy the link from the run's page") from None

    def __enter__(self) -> "CoordinatorClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def describe(self) -> tuple[RunDescription, RunSpec]:
        """The run, and its spec checked against its fingerprint. Raises `FingerprintError`."""
        response = self._send("GET", "api/v1/run")
        try:
            description = RunDescription.model_validate_json(response.content)
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}")
        except ValueError:
            raise NotACoordinatorError(
                f"{self.url}: something answers there (HTTP {response.status_code}), but it is not a Kantha "
                "coordinator; copy the link from the run's page"
            ) from None
        try:
            spec = RunSpec.model_validate(description.spec)
        except ValidationError as error:
            first = error.errors()[0]
            raise FingerprintError(
                f"{self.url}: this Kantha ({__version__}) cannot read the run's spec, made by {description.version} "
                f"({'.'.join(map(str, first['loc']))}: {first['msg']}); `pip install --upgrade kantha`"
            ) from None
        if spec.fingerprint != description.fingerprint:
            raise FingerprintError(
                f"{self.url}: the run spec does not match its fingerprint (announced {description.fingerprint[:12]}…, "
                f"computed {spec.fingerprint[:12]}…); this Kantha is {__version__}, the coordinator's "
                f"{description.version}: use the same, or tell the organizer"
            )
        return description, spec

    def request_membership(self, request: MembershipRequest) -> Certificate:
        """Ask to be let in. Raises `MembershipError` with the coordinator's reason."""
        response = self._send("POST", "api/v1/memberships", content=request.model_dump_json())
        if response.status_code == 201:
            try:
                return Certificate.model_validate_json(response.content)
            except ValidationError:
                raise NotACoordinatorError(f"{self.url}: answered with something that is no certificate") from None
        try:
            reason = response.json()["detail"]
        except (ValueError, KeyError, TypeError):
            reason = f"HTTP {response.status_code}"
        raise MembershipError(f"{self.url}: not let in: {reason}")

    def download(self, file: RemoteFile, target: Path, advance: Callable[[int], None] | None = None) -> None:
        """Bring a file to `target`, resuming what is there in part; it appears there only when it is whole.

        `advance` is told the bytes of every piece that arrives. Raises `DigestError` where the coordinator sends
        another file than it announced, and `StorageError` where the disk refuses.
        """
        partial = target.with_name(f"{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(_ATTEMPTS):
                try:
                    self._fetch(file, partial, advance)
                    break
                except httpx.TransportError as error:
                    if attempt == _ATTEMPTS - 1:
                        raise UnreachableError(
                            f"{self.url}: the connection broke {_ATTEMPTS} times while downloading {target.name} "
                            f"({_reason(error)}); join again, it goes on where it stopped"
                        ) from None
            try:
                check_file(partial, file)
            except DigestError as error:
                partial.unlink(missing_ok=True)
                raise DigestError(
                    f"{self.url}: sent a {target.name} that is not the one it announced ({error}); "
                    "join again, and tell the organizer if it stays so"
                ) from None
            partial.replace(target)
        except OSError as error:
            raise StorageError(f"{target}: cannot be written ({error.strerror}); make room on that disk") from None

    def _fetch(self, file: RemoteFile, partial: Path, advance: Callable[[int], None] | None) -> None:
        done = partial.stat().st_size if partial.exists() else 0
        if done > file.size:
            done = 0
        headers = {"Range": f"bytes={done}-"} if done else {}
        with self._http.stream("GET", file.path, headers=headers) as response:
            if response.status_code == 416:  # all of it is there already
                return
            if response.status_code not in (200, 206):
                raise NotACoordinatorError(
                    f"{self.url}: has no {file.path} (HTTP {response.status_code}); join again in a moment"
                )
            with partial.open("ab" if response.status_code == 206 else "wb") as out:
                if advance is not None and response.status_code == 206:
                    advance(done)
                for chunk in response.iter_bytes():
                    if out.tell() + len(chunk) > file.size:
                        raise DigestError(f"{self.url}: sends more of {file.path} than it announced")
                    out.write(chunk)
                    if advance is not None:
                        advance(len(chunk))
                out.flush()
                os.fsync(out.fileno())

    def _send(self, method: str, path: str, content: str | None = None) -> httpx.Response:
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            return self._http.request(method, path, content=content, headers=headers)
        except httpx.UnsupportedProtocol:
            raise UnreachableError(f"{self.url}: not a web address; copy the link from the run's page") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(
                f"{self.url}: nobody answers there ({_reason(error)}); check the address and that the coordinator runs"
            ) from None
        except httpx.RemoteProtocolError:
            raise NotACoordinatorError(
                f"{self.url}: something answers there, but it does not speak HTTP; copy the link from the run's page"
            ) from None
        except httpx.TransportError as error:
            raise UnreachableError(
                f"{self.url}: the connection broke ({_reason(error)}); try again in a minute"
            ) from None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def request_membership(
    client: CoordinatorClient, description: RunDescription, identity: PeerIdentity, username: str, service: Service
) -> Certificate:
    """Obtain a certificate for this peer and check it as other peers will."""
    request = MembershipRequest.signed(identity, description.fingerprint, username, service)
    certificate = client.request_membership(request)
    certificate.verify(description.public_key, description.fingerprint, identity.peer_id)
    return certificate
