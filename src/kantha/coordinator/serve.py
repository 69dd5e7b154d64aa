"""`kantha serve`: one process that is a run's web service and its place in the swarm."""

import errno
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from kantha.coordinator.app import build_app
from kantha.coordinator.rundir import RunDirectory
from kantha.coordinator.service import Coordinator
from kantha.errors import PortTakenError
from kantha.swarm.node import log_to_file

_GRACE = 5  # seconds that open HTTP requests get when the coordinator stops


def serve(path: Path, host: str, port: int, p2p_port: int | None, say: Callable[[str], None]) -> None:
    """Serve the run at `path` until SIGINT or SIGTERM; `say` is told in a sentence what happens.

    :param p2p_port: TCP port of the swarm; by default the one used before, or any free one the first time
    """
    run = RunDirectory.open(path)
    run.lock()
    log_to_file(run.log)
    listener = _bind(host, port, "--port")
    port = listener.getsockname()[1]
    with _bind(host, p2p_port or run.p2p_port or 0, "--p2p-port") as probe:
        p2p_port = probe.getsockname()[1]
    run.set_p2p_port(p2p_port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    coordinator = Coordinator(run, host, p2p_port, address, say)
    try:
        say(f"{run.spec.name}: going on from round {coordinator.resumed_from}")
        say(f"the run's page: {address}")
        say(f"to join:        kantha join {address} --name YOUR-NAME")
        coordinator.start()
        server = uvicorn.Server(
            uvicorn.Config(
                build_app(coordinator),
                log_level="warning",
                proxy_headers=False,  # who asks is judged by the connection, not by what a header claims
                timeout_graceful_shutdown=_GRACE,
            )
        )
        # uvicorn raises the signal that ended it once more when it is done; there is still a checkpoint to save
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: None)
        server.run(sockets=[listener])
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler)
        say("stopping: saving a checkpoint, leaving the swarm (Ctrl-C again ends at once) …")
    finally:
        coordinator.stop()
    if coordinator.failure is not None:
        raise coordinator.failure
    say("stopped")


def _bind(host: str, port: int, option: str) -> socket.socket:
    """A TCP socket bound to the port, or a free one for 0. Raises `PortTakenError`."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTakenError(
                f"port {port} of {host} is used by another program; end it, or choose another with {option}"
            ) from None
        raise PortTakenError(f"cannot listen on {host} port {port} ({error.strerror}); choose others") from None
    return listener
