"""The volunteer's side of the coordinator's API: everything that arrives is checked before it is used."""

import base64
import ipaddress
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import httpx
from pydantic import ValidationError

from kantha import __version__
from kantha.api import Admission, RemoteFile, RunDescription, TokenSignIn, Waiting
from kantha.digests import check_file
from kantha.errors import (
    DigestError,
    FingerprintError,
    KanthaError,
    LeaseError,
    MembershipError,
    NotACoordinatorError,
    SignInError,
    StorageError,
    UnreachableError,
    printable,
)
from kantha.spec import RunSpec
from kantha.swarm.membership import DepartureRequest, DownloadRequest, MembershipRequest

_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_BUSY_SECONDS = 30.0  # that a 429 is waited out, all together: a request is too old after a minute
_ATTEMPTS = 3  # downloads of one file before giving up; each goes on where the last one broke off
_LARGEST_ANSWER = 4 * 2**20  # bytes of JSON
_LARGEST_FILE = 64 * 2**30


class CoordinatorClient:
    """A connection to the coordinator at a run's link. A context manager, safe to share by threads.

    All methods raise `UnreachableError` where nobody answers, or not now, and `NotACoordinatorError` where somebody
    else does.
    """

    def __init__(self, url: str) -> None:
        """:param url: the run's link; it may end in # and the run's public key, which then is the one believed"""
        url, mark, key = url.partition("#")
        if "://" not in url:
            url = f"http://{url}"
        self.url = url.rstrip("/")
        if mark and not re.fullmatch("[0-9a-fA-F]{64}", key):
            raise self._no_address(ValueError("what follows # is not a run's key, 64 hexadecimal digits"))
        self.run_key = key.lower() or None
        self._hurry = threading.Event()
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

    def ask(self, request: MembershipRequest) -> Admission | Waiting:
        """Ask to be let in, or to stay.

        Raises `MembershipError` with the coordinator's reason, `LeaseError` where another instance has the place.
        """
        return self._admission("api/v1/memberships", request.model_dump_json())

    def sign_in(self, sign_in: TokenSignIn) -> Admission | Waiting:
        """The same, saying who it is by a token. Raises `SignInError` where the token would travel unencrypted."""
        self.check_token_may_travel()
        content = {
            "request": sign_in.request.model_dump(mode="json"),
            "token": sign_in.token.get_secret_value(),
        }
        return self._admission("api/v1/tokens", json.dumps(content))

    def check_token_may_travel(self) -> None:
        """Raises `SignInError` unless what is sent to the coordinator is encrypted, or stays on this machine."""
        if not is_private(self.url):
            raise SignInError(
                f"{self.url}: your token would go there unencrypted, so it is not sent; "
                "use the run's https:// link, or join without --token and sign in on its page"
            )

    def depart(self, request: DepartureRequest) -> None:
        """Give the lease back. Raises `MembershipError` where it is not taken back."""
        status, body = self._send("POST", "api/v1/departures", request.model_dump_json())
        if status != 204:
            raise self._refusal(status, body)

    def hurry(self) -> None:
        """From now on, wait for nothing: what the coordinator is too busy for fails at once."""
        self._hurry.set()

    def _admission(self, path: str, content: str) -> Admission | Waiting:
        status, body = self._send("POST", path, content)
        try:
            if status == 201:
                return Admission.model_validate_json(body)
            if status == 202:
                return Waiting.model_validate_json(body)
        except ValidationError:
            raise NotACoordinatorError(
                f"{self.url}: answered with something that is no certificate; this Kantha is {__version__}, "
                "use the same as the coordinator"
            ) from None
        raise self._refusal(status, body)

    def _refusal(self, status: int, body: bytes) -> KanthaError:
        """What an answer that is not a good one means; only a coordinator's own word is taken for a refusal."""
        try:
            detail = json.loads(body)["detail"]
        except (ValueError, KeyError, TypeError, RecursionError):
            detail = None
        reason = printable(detail, 1_000) if isinstance(detail, str) else ""
        if status >= 500:
            told = f"HTTP {status}" + (f": {reason}" if reason else "")
            return UnreachableError(f"{self.url}: cannot answer now ({told}); try again in a minute")
        if not reason or status < 400 or status in (404, 405):
            return NotACoordinatorError(
                f"{self.url}: answered with HTTP {status}, as no coordinator of this version ({__version__}) does; "
                "use the coordinator's version of Kantha, or look for a proxy in between"
            )
        if status == 409:
            return LeaseError(f"{self.url}: {reason}")
        return MembershipError(f"{self.url}: not let in: {reason}")

    def download(
        self,
        file: RemoteFile,
        target: Path,
        advance: Callable[[int], None] | None = None,
        sign: Callable[[], DownloadRequest] | None = None,
    ) -> None:
        """Bring a file to `target`, resuming what is there in part; it appears there only when it is whole.

        :param advance: told how many bytes came nearer, what was there in part included
        :param sign: makes the request of a member, anew for each time that the connection is made: it is good once
        :raises DigestError: where the coordinator sends another file than it announced
        :raises MembershipError: where it gives this one to members only
        :raises StorageError: where the disk refuses
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
                    self._fetch(file, partial, arrived, sign)
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

    def _fetch(
        self,
        file: RemoteFile,
        partial: Path,
        arrived: Callable[[int], None],
        sign: Callable[[], DownloadRequest] | None,
        busy: float = 0.0,
    ) -> None:
        """:param busy: seconds that a coordinator was waited for which had too much to do"""
        done = partial.stat().st_size if partial.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # digest and size are those of the bytes that are sent
        if done:
            headers["Range"] = f"bytes={done}-"
        if sign is not None:
            request = base64.urlsafe_b64encode(sign().model_dump_json().encode()).decode()
            headers["Authorization"] = f"Kantha {request}"
        with self._http.stream("GET", file.path, headers=headers) as response:
            if response.status_code == 416:  # all of it is there already
                arrived(done)
                return
            if response.status_code in (401, 403):
                raise self._refusal(response.status_code, self._read(response))
            if response.status_code in (200, 206):
                with partial.open("ab" if response.status_code == 206 else "wb") as out:
                    for chunk in response.iter_raw():
                        if out.tell() + len(chunk) > file.size:
                            raise DigestError(f"more than {file.size} bytes")
                        out.write(chunk)
                        arrived(out.tell())
                    out.flush()
                    os.fsync(out.fileno())
                return
        if response.status_code != 429:
            raise NotACoordinatorError(
                f"{self.url}: has no {file.path} (HTTP {response.status_code}); join again in a moment"
            )
        busy += self._wait_until_less_busy(response, busy)
        self._fetch(file, partial, arrived, sign, busy)

    def _send(self, method: str, path: str, content: str | None = None) -> tuple[int, bytes]:
        """HTTP status and body. Where the coordinator asks for it, the same is sent again later."""
        headers = {"Content-Type": "application/json"} if content is not None else {}
        busy = 0.0
        try:
            while True:
                with self._http.stream(method, path, content=content, headers=headers) as response:
                    if response.status_code != 429:
                        return response.status_code, self._read(response)
                busy += self._wait_until_less_busy(response, busy)
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

    def _read(self, response: httpx.Response) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > _LARGEST_ANSWER:
                raise self._no_coordinator("sends more than any would")
        return bytes(body)

    def _wait_until_less_busy(self, response: httpx.Response, busy: float) -> float:
        """Wait as long as a 429 asks for; returns the seconds. Raises `UnreachableError` where that is too long.

        :param busy: seconds waited before
        """
        asked = response.headers.get("Retry-After", "")
        pause = float(asked[:9]) if asked.isdecimal() else 5.0  # it may be a date, and other people's clocks differ
        if busy + pause > _BUSY_SECONDS or self._hurry.wait(max(pause, 0.1)):
            raise UnreachableError(
                f"{self.url}: had too many requests from here, and asks to wait {pause:.0f} s; try again then"
            )
        return max(pause, 0.1)

    def _no_address(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"{printable(self.url)}: not an address ({printable(error)}); copy the link from the run's page"
        )

    def _no_coordinator(self, what: str) -> NotACoordinatorError:
        return NotACoordinatorError(
            f"{self.url}: something answers there, but it {what}, so it is no Kantha coordinator; "
            "copy the link from the run's page"
        )


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent there: it is encrypted, or stays on this machine."""
    address = httpx.URL(url)
    return address.scheme == "https" or (address.scheme == "http" and _is_loopback(address.host))


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
