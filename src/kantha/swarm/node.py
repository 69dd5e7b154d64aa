"""One peer of the swarm: a libp2p daemon, a DHT node, and the reports that peers exchange."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from hivemind.dht import DHT, DHTNode
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.schema import SchemaValidator
from hivemind.p2p import P2PDaemonError, PeerID
from hivemind.utils import get_dht_time
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr
from pydantic.v1 import ValidationError

from kantha.errors import SwarmError
from kantha.swarm.identity import PeerIdentity, peer_id_of
from kantha.swarm.processes import (
    end_with_children_when_parent_dies,
    leave_terminal_group,
    prepare_forks,
)
from kantha.swarm.reports import LIFETIME, Report, ReportSchema

_UNREACHABLE = (
    "no peer of the swarm answers at {where} ({reason}); "
    "check that the coordinator runs and that this network lets TCP connections out"
)
_CALL_TIMEOUT = 20.0  # seconds for one look-up or store in the DHT
_log = logging.getLogger(__name__)


def _kept(method: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
    """A task of the DHT's process that lives until it is done.

    hivemind forgets the task that a message started when the next message comes, asyncio has weak references only, and
    a reader of the libp2p daemon's socket is known to nobody but the task that waits for it: such a task was collected
    as garbage, and whoever asked waited for ever.
    """

    async def run(self: "_DaemonProcess", *args: Any, **kwargs: Any) -> None:
        task = asyncio.current_task()
        self.tasks.add(task)
        try:
            await method(self, *args, **kwargs)
        finally:
            self.tasks.discard(task)

    return run


class _DaemonProcess(DHT):
    """hivemind's DHT process, which takes the libp2p daemon with it whatever happens to the program."""

    def run(self) -> None:
        end_with_children_when_parent_dies()
        leave_terminal_group()
        self.tasks: set[asyncio.Task[Any] | None] = set()
        super().run()

    _get, _store, _run_coroutine = _kept(DHT._get), _kept(DHT._store), _kept(DHT._run_coroutine)


class Node:
    """This machine's place in the swarm.

    It forks processes and must be made in the main thread, before CUDA is initialised.
    """

    def __init__(
        self,
        run: str,
        identity: PeerIdentity,
        *,
        bootstrap: Sequence[str] = (),
        listen: Sequence[str] = (),
        outbound_only: bool = False,
    ) -> None:
        """
        :param run: fingerprint of the run spec; part of every key, so that other runs' peers are never met
        :param bootstrap: multiaddrs of peers that are already in the swarm
        :param listen: multiaddrs to accept connections on
        :param outbound_only: accept no connections (client mode)
        :raises SwarmError: when nobody at `bootstrap` answers, or the libp2p daemon does not start
        """
        self.identity = identity
        self.outbound_only = outbound_only
        self.run = run
        self.prefix = f"kantha-{run[:32]}"
        try:
            self._bootstrap = [PeerID.from_base58(Multiaddr(address)["p2p"]) for address in bootstrap]
        except (ValueError, LookupError) as error:
            raise SwarmError(f"the coordinator gave an address of the swarm that is none ({error})") from None
        self._key = f"{self.prefix}_reports"
        signature = RSASignatureValidator(identity.key)
        self._subkey = signature.local_public_key
        prepare_forks()
        try:
            self.dht = _DaemonProcess(
                initial_peers=list(bootstrap) or None,
                start=True,
                client_mode=outbound_only,
                host_maddrs=list(listen) or ["/ip4/127.0.0.1/tcp/0"],
                no_listen=outbound_only,
                identity_path=str(identity.path),
                record_validators=[SchemaValidator(ReportSchema, prefix=self.prefix), signature],
            )
        except P2PDaemonError as error:
            if "bootstrap" in str(error):
                raise SwarmError(_UNREACHABLE.format(where=", ".join(bootstrap), reason=error)) from None
            if "already taken" in str(error):
                raise SwarmError(
                    f"another machine is in this swarm with the same identity ({identity.path}); "
                    "delete that file here if it was copied from there, and join again"
                ) from None
            raise SwarmError(f"the libp2p daemon did not start: {error}; try again in a minute") from None
        except (OSError, RuntimeError) as error:
            raise SwarmError(_UNREACHABLE.format(where=", ".join(bootstrap), reason=error)) from None
        # the DHT's process does not notice when the daemon that it started is gone
        self._daemon = next(child for child in psutil.Process(self.dht.pid).children() if child.name() == "p2pd")

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def addresses(self) -> list[str]:
        """Multiaddrs under which others can reach this peer. Raises `SwarmError`."""
        found = self._call(self.dht.run_coroutine(_visible_addresses, return_future=True))
        return [str(address) for address in found]

    def publish(self, report: Report) -> None:
        """Put this peer's report into the DHT, signed, over the one before. Raises `SwarmError` if nobody stored it."""
        stored = self._call(
            self.dht.store(
                self._key,
                subkey=self._subkey,
                value=report.dict(),
                expiration_time=get_dht_time() + LIFETIME,
                return_future=True,
            )
        )
        if not stored:
            raise SwarmError("no peer of the swarm took this peer's report")

    def reports(self) -> dict[str, Report]:
        """The newest report of every peer, by peer id; whatever is unsigned or malformed is left out."""
        found = self._call(self.dht.get(self._key, latest=True, return_future=True))
        if found is None or not isinstance(found.value, dict):
            return {}
        reports = {}
        for subkey, entry in found.value.items():
            try:
                public_key = RSASignatureValidator._PUBLIC_KEY_RE.fullmatch(subkey)
                if public_key is not None:
                    reports[peer_id_of(public_key.group(1).decode())] = Report.parse_obj(entry.value)
            except (ValidationError, ValueError) as error:
                _log.warning("left out a malformed report: %s", error)
        return reports

    def rejoin(self) -> None:
        """Greet the bootstrap peers again: a coordinator that was restarted knows nobody, and may be forgotten."""
        if self._bootstrap:
            self._call(self.dht.run_coroutine(partial(_greet, peers=self._bootstrap), return_future=True))

    def is_alive(self) -> bool:
        """Whether the DHT's process and the libp2p daemon run."""
        return bool(self.dht.is_alive()) and self._daemon.is_running() and self._daemon.status() != psutil.STATUS_ZOMBIE

    def close(self) -> None:
        self.dht.shutdown()

    def _call(self, future: Any) -> Any:
        try:
            return future.result(timeout=_CALL_TIMEOUT)
        except FutureTimeoutError:
            raise SwarmError(f"the swarm did not answer within {_CALL_TIMEOUT:.0f} s") from None
        except Exception as error:  # the DHT's process hands on whatever went wrong there
            raise SwarmError(f"the swarm's DHT failed: {error!r}") from error


async def _visible_addresses(_dht: DHT, node: DHTNode) -> Any:
    return await node.get_visible_maddrs(latest=True)


async def _greet(_dht: DHT, node: DHTNode, peers: Sequence[PeerID]) -> None:
    await asyncio.gather(*(node.protocol.call_ping(peer) for peer in peers))


def log_to_file(path: Path) -> None:
    """Send hivemind's log, and our own, to a file instead of the terminal. Call it before a `Node` is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    use_hivemind_log_handler("nowhere")
    for name in ("hivemind", "kantha", "asyncio"):  # asyncio: hivemind's loops complain of tasks they leave behind
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
