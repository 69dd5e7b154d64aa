"""`kantha serve`: one process that is a run's web service and its place in the swarm."""

import errno
import importlib.util
import ipaddress
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from kantha.coordinator.admission import SignIn
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.service import Coordinator
from kantha.errors import (
    MissingPackageError,
    PortTakenError,
    ProcessEndedError,
    StorageError,
    UnreachableError,
    printable,
)
from kantha.swarm.node import log_to_file
from kantha.swarm.processes import start_again
from kantha.web.app import build_app
from kantha.web.signin import CLIENT_FILE, provider_of, session_key

_GRACE = 5  # seconds that open HTTP requests get when the coordinator stops
_PORT_SECONDS = 5.0  # the children of a coordinator that was killed hold its ports until they have died, too


def serve(
    path: Path,
    host: str,
    port: int,
    p2p_port: int | None,
    say: Callable[[str], None],
    sign_in: SignIn = "local",
    address: str | None = None,
    wandb: str | None = None,
) -> None:
    """Serve the run at `path` until SIGINT or SIGTERM; `say` is told in a sentence what happens.

    Where a child process that this program needs is gone, it starts again.

    :param host: IP address to listen on; 0.0.0.0 and :: are all of this machine's
    :param p2p_port: TCP port of the swarm; by default the one used before, or any free one the first time
    :param address: the run's public link; by default the one at which it listens
    :param wandb: PROJECT or ENTITY/PROJECT at Weights & Biases to mirror the run's curves to
    """
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        raise MissingPackageError("--wandb: its client is not installed; run: pip install 'kantha[wandb]'")
    try:
        _serve(path, host, port, p2p_port, say, sign_in, address, wandb)
    except ProcessEndedError as error:
        start_again(error, say)


def _serve(
    path: Path,
    host: str,
    port: int,
    p2p_port: int | None,
    say: Callable[[str], None],
    sign_in: SignIn,
    address: str | None,
    wandb: str | None,
) -> None:
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        raise UnreachableError(f"--host {host}: not an IP address; use 127.0.0.1 for this machine only") from None
    host = str(ip)
    if address is not None:
        address = _checked(address, sign_in)
    elif sign_in == "huggingface" and not ip.is_loopback:
        raise UnreachableError(
            f"--host {host} with --sign-in huggingface: give the link that people open with --address https://…"
        )
    run = RunDirectory.open(path)
    run.lock()
    try:
        log_to_file(run.log)
    except OSError as error:
        raise StorageError(f"{run.log}: cannot be written ({error.strerror}); make room on that disk") from None
    has_browsers = False
    if sign_in == "huggingface":  # looked at before the swarm's processes are forked: a mistake there is told at once
        has_browsers = provider_of(run.keys) is not None
        session_key(run.keys)
    with _bind(host, port, "--port") as listener:
        with _bind(host, p2p_port or run.p2p_port or 0, "--p2p-port") as probe:
            p2p_port = probe.getsockname()[1]
        run.set_p2p_port(p2p_port)
        address = address or _link(host, listener.getsockname()[1])
        coordinator = Coordinator(run, host, p2p_port, address, say, sign_in, wandb)
        server = uvicorn.Server(
            uvicorn.Config(
                build_app(coordinator, any_host=ip.is_unspecified),
                log_level="warning",
                # Who asks is judged by the connection, not by what a header claims. Where people come from anywhere,
                # a proxy on this machine, which has the TLS, says whom it speaks for.
                proxy_headers=sign_in != "local",
                forwarded_allow_ips=["127.0.0.1", "::1"],
                timeout_graceful_shutdown=_GRACE,
            )
        )

        def leave(*_: object) -> None:
            server.should_exit = True

        coordinator.on_failure = leave
        # From here on there may be a checkpoint to save. uvicorn has handlers of its own while it runs, and raises the
        # signal that ended it once more when it is done.
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, leave)
        coordinator.start()
        try:
            say(f"{run.spec.name}: going on from round {coordinator.resumed_from}")
            say(f"the run's page: {address}")
            if sign_in == "local":
                say(f"to join:        kantha join {address} --name YOUR-NAME")
            else:
                say(f"to join:        kantha join {address}#{run.key().public_key}")
            if sign_in == "huggingface" and not has_browsers:
                say(
                    f"there is no {run.keys / CLIENT_FILE}, so nobody can sign in with a browser, moderators neither; "
                    "people join with --token (docs/moderators.md)"
                )
            server.run(sockets=[listener])
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.default_int_handler)
            say("stopping: saving a checkpoint, leaving the swarm (Ctrl-C again ends at once) …")
        finally:
            try:
                coordinator.stop()
            finally:
                if coordinator.failure is not None:
                    raise coordinator.failure  # and not what came of it while stopping
    say("stopped")


def _checked(address: str, sign_in: SignIn) -> str:
    """The run's public link, without a slash at its end. Raises `UnreachableError` for one that cannot be used."""
    try:
        parts = urlsplit(address)
        is_whole = bool(parts.hostname) and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole or parts.username or parts.query or parts.fragment or address != printable(address):
        raise UnreachableError("--address: not a link like https://kantha.example, with nothing after the path")
    name = str(parts.hostname)
    try:
        is_here = name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        is_here = False
    if sign_in == "local" and not is_here:
        raise UnreachableError(
            f"--address {address} with --sign-in local: that lets in volunteers of this machine only; "
            "add --sign-in huggingface, or leave --address out"
        )
    if parts.scheme != "https" and not is_here:
        raise UnreachableError(f"--address {address}: sign-in goes over https:// only, else others could read it")
    return address.rstrip("/")


def _link(host: str, port: int) -> str:
    """The run's link. What listens on all addresses is reached, from this machine, by loopback's."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _bind(host: str, port: int, option: str) -> socket.socket:
    """A TCP socket that listens on the port, or a free one for 0. Raises `PortTakenError`."""
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # For a restart: the connections of the program before stay for a minute. It also lets two programs bind one
        # port, but only one of them listen, so that is done at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise PortTakenError(f"cannot listen on {host} port {port} ({error.strerror}); choose others") from None
            if time.monotonic() > deadline:
                raise PortTakenError(
                    f"port {port} of {host} is used by another program; end it, or choose another with {option}"
                ) from None
        time.sleep(0.1)
