"""One peer of the swarm: a libp2p daemon, a DHT node, and the reports that peers exchange."""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from pathlib import Path
from typing import Any

import hivemind.dht.node
import psutil
from hivemind.dht import DHT, DHTNode
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.schema import SchemaValidator
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils import get_dht_time
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr
from pydantic.v1 import ValidationError

from kantha.errors import MembershipError, SwarmError
from kantha.swarm.guard import Guard, answers_a_peer, guarded_p2p
from kantha.swarm.identity import PeerIdentity, peer_id_of
from kantha.swarm.membership import CLOCK_SKEW, Certificate
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
_ADDRESS = re.compile(
    r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])"  # IPv4
    r"|(?<=/ip6/)[0-9a-fA-F:.]+|(?<=\[)[0-9a-fA-F]*:[0-9a-fA-F:.]+(?=\])"  # IPv6, in a multiaddr or with a port
)
_OWN_ADDRESSES = ("127.0.0.1", "0.0.0.0", "::1", "::")
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
    """hivemind's DHT process, guarded, which takes the libp2p daemon with it whatever happens to the program."""

    def __init__(self, guard: Guard, run: str, **options: Any) -> None:
        """:param run: part of the calls' names"""
        self.guard = guard
        self._run = run
        self._replica: P2P | None = None
        super().__init__(**options)

    def run(self) -> None:
        end_with_children_when_parent_dies()
        leave_terminal_group()
        self.tasks: set[asyncio.Task[Any] | None] = set()
        # in this process only; hivemind has no other way to give its DHT a P2P that is not made yet
        hivemind.dht.node.P2P = guarded_p2p(self.guard, f"{self._run}::dht.greet")
        super().run()

    async def replicate_p2p(self) -> P2P:
        """Called by hivemind in the averager process."""
        if self._replica is None:
            daemon = self.run_coroutine(DHT._get_p2p_daemon_listen_maddr)
            self._replica = await guarded_p2p(self.guard, f"{self._run}::averager.greet").replicate(daemon)
        return self._replica

    _get, _store, _run_coroutine = _kept(DHT._get), _kept(DHT._store), _kept(DHT._run_coroutine)


class _MembersRecords(RecordValidatorBase):
    """A peer stores members' reports, signed by the peers that they speak of, and nothing else.

    What is read is only checked for whose it is: hivemind drops all that a peer answers where one record of it is bad,
    and a record may have been stored before its peer's certificate was revoked. `Node.reports` looks at each.
    """

    priority = -1  # the last: the schema has 0, the signature 10

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def validate(self, record: DHTRecord) -> bool:
        try:
            peer_id = _owner(DHTProtocol.serializer.loads(record.subkey))
            if peer_id is None or record.expiration_time > get_dht_time() + LIFETIME + CLOCK_SKEW:
                return False
            if answers_a_peer.get():
                self._guard.read(DHTProtocol.serializer.loads(record.value)["certificate"], peer_id)
        except (MembershipError, ValueError) as error:
            _log.info("refused a report: %s", error)
            return False
        return True


def _owner(subkey: object) -> str | None:
    """The peer id whose key must have signed a record under this subkey; None: it is not protected by exactly one."""
    owner = RSASignatureValidator._PUBLIC_KEY_RE.fullmatch(subkey) if isinstance(subkey, bytes) else None
    return peer_id_of(owner.group(1).decode()) if owner is not None else None


class Node:
    """This machine's place in the swarm.

    It forks processes and must be made in the main thread, before CUDA is initialised.
    """

    def __init__(
        self,
        identity: PeerIdentity,
        guard: Guard,
        *,
        bootstrap: Sequence[str] = (),
        listen: Sequence[str] = (),
        outbound_only: bool = False,
    ) -> None:
        """
        :param guard: of this peer; its run is part of every key, so that other runs' peers are never met
        :param bootstrap: multiaddrs of peers that are already in the swarm
        :param listen: multiaddrs to accept connections on
        :param outbound_only: accept no connections (client mode)
        :raises SwarmError: when nobody at `bootstrap` answers, or the libp2p daemon does not start
        """
        self.identity = identity
        self.outbound_only = outbound_only
        self.guard = guard
        self.prefix = f"kantha-{guard.trust.run[:32]}"
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
                guard,
                self.prefix,
                initial_peers=list(bootstrap) or None,
                start=True,
                client_mode=outbound_only,
                host_maddrs=list(listen) or ["/ip4/127.0.0.1/tcp/0"],
                no_listen=outbound_only,
                identity_path=str(identity.path),
                record_validators=[
                    SchemaValidator(ReportSchema, allow_extra_keys=False, prefix=self.prefix),
                    _MembersRecords(guard),
                    signature,
                ],
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
        """The newest report of every member, by peer id; whatever else there is, is left out."""
        found = self._call(self.dht.get(self._key, latest=True, return_future=True))
        if found is None or not isinstance(found.value, dict):
            return {}
        reports = {}
        for subkey, entry in found.value.items():
            try:
                peer_id = _owner(subkey)
                if peer_id is not None:
                    report = Report.parse_obj(entry.value)
                    self.guard.read(report.certificate, peer_id)
                    reports[peer_id] = report
            except (ValidationError, ValueError) as error:
                _log.warning("left out a malformed report: %s", error)
            except MembershipError as error:  # revoked, or ended: what such a peer wrote stays for some minutes
                _log.debug("left out a report: %s", error)
        return reports

    # ---- membership

    def set_certificate(self, certificate: Certificate) -> None:
        """Show this one from now on. Raises `MembershipError` where it is not good."""
        self.guard.trust.verify(certificate, self.peer_id)
        self.guard.certificate = certificate

    def take_notice(self, notice: str) -> None:
        """Hear what the organizer tells all. Raises `MembershipError` where it is not genuine."""
        self.guard.trust.take(notice)

    def notice(self) -> str:
        """The newest notice that was heard, from peers too; empty: none was."""
        return self.guard.trust.notice

    def tell_membership(self) -> None:
        """Bring the guard of the DHT's process to what this one knows, and the other way round. Raises `SwarmError`."""
        certificate, notice = self.guard.certificate, self.guard.trust.notice
        heard = self._call(
            self.dht.run_coroutine(
                partial(_tell, certificate=certificate, notice=notice, number=self.guard.trust.number),
                return_future=True,
            )
        )
        if heard:
            self.guard.trust.take(heard)

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


async def _tell(dht: Any, _node: DHTNode, certificate: Certificate, notice: str, number: int) -> str:
    """In the DHT's process: a notice that is newer than the program's, or nothing."""
    dht.guard.certificate = certificate
    if notice:
        dht.guard.trust.take(notice)
    return dht.guard.trust.notice if dht.guard.trust.number > number else ""


async def _greet(_dht: DHT, node: DHTNode, peers: Sequence[PeerID]) -> None:
    await asyncio.gather(*(node.protocol.call_ping(peer) for peer in peers))


class _Discreet(logging.Formatter):
    """libp2p tells which addresses it could not reach; where people are is not for a file that may be shown around."""

    def format(self, record: logging.LogRecord) -> str:
        return _ADDRESS.sub(
            lambda found: found[0] if found[0] in _OWN_ADDRESSES else "(address)", super().format(record)
        )


def _in_one_line(record: logging.LogRecord) -> bool:
    """hivemind writes a traceback for every message of a peer that it cannot read; a peer may send many."""
    if record.name == "hivemind.p2p.p2p_daemon" and record.exc_info:
        record.msg, record.exc_info = f"{record.msg} {record.exc_info[1]!r}", None
    return True


def log_to_file(path: Path) -> None:
    """Send hivemind's log, and our own, to a file instead of the terminal. Call it before a `Node` is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_Discreet("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(_in_one_line)
    use_hivemind_log_handler("nowhere")
    for name in ("hivemind", "kantha", "asyncio"):  # asyncio: hivemind's loops complain of tasks they leave behind
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
