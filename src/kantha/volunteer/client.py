"""The volunteer's side of the coordinator's API: everything that arrives is checked before it is used."""

import ipaddress
import json
import os
import shutil
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
    printable,
)
from kantha.spec import RunSpec
from kantha.swarm.identity import PeerIdentity
from kantha.swarm.membership import Certificate, MembershipRequest, Service

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_ATTEMPTS = 3  # downloads of one file before giving up; each goes on where the last one broke off
_LARGEST_ANSWER = 4 * 2**20  # bytes of JSON
_LARGEST_FILE = 64 * 2**30


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
                base_url=f"{self.url}/",
                timeout=_TIMEOUT,
                headers={"User-Agent": f"kantha/{__version__}"},
                trust_env=not _is_loopback(httpx.URL(self.url).host),  # no proxy leads to this machine
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise self._no_address(error) from None

    def __enter__(self) -> "CoordinatorClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def describe(self) -> tuple[RunDescription, RunSpec]:
        """The run, and its spec checked against its fingerprint. Raises `FingerprintError`."""
        status, body = self._send("GET", "api/v1/run")
        try:
            if status != 200:
                raise ValueError(f"HTTP {status}")
            description = RunDescription.model_validate_json(body)
        except ValueError as error:
            reason = _first_mistake(error) if isinstance(error, ValidationError) else error
            raise NotACoordinatorError(
                f"{self.url}: something answers there, but not as a Kantha coordinator does ({reason}); "
                "copy the link from the run's page"
            ) from None
        version = printable(description.version)
        try:
            spec = RunSpec.model_validate(description.spec)
        except ValidationError as error:
            raise FingerprintError(
                f"{self.url}: this Kantha ({__version__}) cannot read the run's spec, made by {version} "
                f"({_first_mistake(error)}); `pip install --upgrade kantha`"
            ) from None
        if spec.fingerprint != description.fingerprint:
            raise FingerprintError(
                f"{self.url}: the run spec does not match its fingerprint (announced "
                f"{printable(description.fingerprint[:12])}…, computed {spec.fingerprint[:12]}…); this Kantha is "
                f"{__version__}, the coordinator's {version}: use the same, or tell the organizer"
            )
        return description, spec

    def request_membership(self, request: MembershipRequest) -> Certificate:
        """Ask to be let in. Raises `MembershipError` with the coordinator's reason."""
        status, body = self._send("POST", "api/v1/memberships", content=request.model_dump_json())
        if status == 201:
            try:
                return Certificate.model_validate_json(body)
            except ValidationError:
                raise NotACoordinatorError(f"{self.url}: answered with something that is no certificate") from None
        try:
            reason = json.loads(body)["detail"]
        except (ValueError, KeyError, TypeError, RecursionError):
            reason = f"HTTP {status}"
        raise MembershipError(f"{self.url}: not let in: {printable(reason)}")

    def download(self, file: RemoteFile, target: Path, advance: Callable[[int], None] | None = None) -> None:
        """Bring a file to `target`, resuming what is there in part; it appears there only when it is whole.

        `advance` is told how many bytes came nearer, what was there in part included. Raises `DigestError` where the
        coordinator sends another file than it announced, and `StorageError` where the disk refuses.
        """
        # half of another file must not be taken for half of this one: all snapshots of a run are equally large
        partial = target.with_name(f"{target.name}.{file.sha256[:12]}.partial")
        told = 0

        def arrived(position: int) -> None:
            nonlocal told
            if advance is not None and position > told:
                advance(position - told)
                told = position

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for other in target.parent.glob(f"{target.name}.*partial"):
                if other != partial:
                    other.unlink()
            self._check_room(file, partial)
            for attempt in range(_ATTEMPTS):
                try:
                    self._fetch(file, partial, arrived)
                    break
                except httpx.TransportError as error:
                    if attempt == _ATTEMPTS - 1:
                        raise UnreachableError(
                            f"{self.url}: the connection broke {_ATTEMPTS} times while downloading {target.name} "
                            f"({_reason(error)}); join again, it goes on where it stopped"
                        ) from None
            check_file(partial, file)
            partial.replace(target)
        except DigestError as error:
            partial.unlink(missing_ok=True)
            raise DigestError(
                f"{self.url}: sent a {target.name} that is not the one it announced ({error}); "
                "join again, and tell the organizer if it stays so"
            ) from None
        except OSError as error:
            raise StorageError(f"{target}: cannot be written ({error.strerror}); make room on that disk") from None

    def _check_room(self, file: RemoteFile, partial: Path) -> None:
        if file.size > _LARGEST_FILE:
            raise StorageError(f"{self.url}: announces a file of {file.size // 2**30} GiB; tell the organizer")
        missing = file.size - (partial.stat().st_size if partial.exists() else 0)
        free = shutil.disk_usage(partial.parent).free
        if missing > free:
            raise StorageError(
                f"{partial.parent}: needs {missing / 1e6:,.0f} MB for the download, {free / 1e6:,.0f} MB are free; "
                "make room on that disk, or set KANTHA_HOME to a folder on another"
            )

    def _fetch(self, file: RemoteFile, partial: Path, arrived: Callable[[int], None]) -> None:
        done = partial.stat().st_size if partial.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # digest and size are those of the bytes that are sent
        if done:
            headers["Range"] = f"bytes={done}-"
        with self._http.stream("GET", file.path, headers=headers) as response:
            if response.status_code == 416:  # all of it is there already
                arrived(done)
                return
            if response.status_code not in (200, 206):
                raise NotACoordinatorError(
                    f"{self.url}: has no {file.path} (HTTP {response.status_code}); join again in a moment"
                )
            with partial.open("ab" if response.status_code == 206 else "wb") as out:
                for chunk in response.iter_raw():
                    if out.tell() + len(chunk) > file.size:
                        raise DigestError(f"more than {file.size} bytes")
                    out.write(chunk)
                    arrived(out.tell())
                out.flush()
                os.fsync(out.fileno())

    def _send(self, method: str, path: str, content: str | None = None) -> tuple[int, bytes]:
        """HTTP status and body."""
        headers = {"Content-Type": "application/json"} if content is not None else {}
        body = bytearray()
        try:
            with self._http.stream(method, path, content=content, headers=headers) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _LARGEST_ANSWER:
                        raise self._no_coordinator("sends more than any would")
                return response.status_code, bytes(body)
        except httpx.UnsupportedProtocol:
            raise UnreachableError(f"{self.url}: not a web address; copy the link from the run's page") from None
        except (httpx.InvalidURL, UnicodeError) as error:  # only found out when the name is looked up
            raise self._no_address(error) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(
                f"{self.url}: nobody answers there ({_reason(error)}); check the address and that the coordinator runs"
            ) from None
        except httpx.RemoteProtocolError:
            raise self._no_coordinator("does not speak HTTP") from None
        except httpx.DecodingError:
            raise self._no_coordinator("sends what cannot be decompressed") from None
        except httpx.TransportError as error:
            raise UnreachableError(
                f"{self.url}: the connection broke ({_reason(error)}); try again in a minute"
            ) from None

    def _no_address(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"{printable(self.url)}: not an address ({printable(error)}); copy the link from the run's page"
        )

    def _no_coordinator(self, what: str) -> NotACoordinatorError:
        return NotACoordinatorError(
            f"{self.url}: something answers there, but it {what}, so it is no Kantha coordinator; "
            "copy the link from the run's page"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_mistake(error: ValidationError) -> str:
    first = error.errors()[0]
    return printable(f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": "), 200)


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
