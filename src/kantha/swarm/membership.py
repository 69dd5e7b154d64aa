"""Membership: who may take part, said by the run's key, checkable by everyone without asking anyone.

A volunteer proves that it holds a peer's key (`PeerRequest`) and gets a certificate bound to that peer id. Peers verify
certificates with the run's public key alone (`Trust`), so the coordinator may be away. What the organizer takes back,
a new run key, announcements and that the run is paused are told by a `Notice`, which every peer hands on.
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kantha.errors import MembershipError, printable
from kantha.spec import OneLine, Service
from kantha.swarm.identity import PeerIdentity, peer_id_of, verify_signature

LIFETIME = 12 * 3600  # seconds a certificate is valid: for so long members do without the coordinator
RENEWAL = 3600  # seconds after which a member that asks gets a new certificate
CLOCK_SKEW = 60  # seconds that two machines' clocks may differ
OLD_KEY_SECONDS = 900  # that certificates of a replaced run key are still good, for all to get new ones
MOST_CERTIFICATE = 2_000  # bytes as JSON
MOST_NOTICE = 256 * 1024  # bytes as JSON
MOST_ANNOUNCEMENTS = 3  # at once
MOST_WORDS = 300  # characters of an announcement, and of the reason why a run is paused
_HEX_KEY = "^[0-9a-f]{64}$"


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def canonical(self, exclude: set[str] | None = None) -> bytes:
        return json.dumps(self.model_dump(mode="json", exclude=exclude), sort_keys=True, separators=(",", ":")).encode()


class PeerRequest(_Message):
    """What a peer asks of the coordinator; the signature proves that it holds the peer's key. Good for once."""

    purpose: Literal["join", "leave", "download"] = Field(description="Says what this request is good for.")
    run: str = Field(pattern="^[0-9a-f]{64}$", description="The run's fingerprint.")
    public_key: str = Field(max_length=2_000, description="The peer's public key, OpenSSH form.")
    issued: int = Field(
        ge=0, le=2**53, description="When this was asked, seconds since 1970; an old request is refused."
    )
    nonce: str = Field(pattern="^[0-9a-f]{32}$", description="Drawn anew for every request; a second use is refused.")
    signature: str = Field("", max_length=2_000, description="By the peer's key over all other fields.")

    @classmethod
    def signed(cls, identity: PeerIdentity, run: str, **fields: object) -> Self:
        """A request of this moment. Raises `pydantic.ValidationError` where a field cannot be used."""
        request = cls.model_validate(
            {
                "run": run,
                "public_key": identity.public_key,
                "issued": int(time.time()),
                "nonce": secrets.token_hex(16),
                **fields,
            }
        )
        signature = identity.sign(request.canonical(exclude={"signature"}))
        return request.model_copy(update={"signature": signature})

    def verified_peer_id(self) -> str:
        """The peer id that asks. Raises `MembershipError` where the signature or the time is wrong.

        Whether the nonce is new is for the coordinator to know.
        """
        difference = abs(int(time.time()) - self.issued)
        if difference > CLOCK_SKEW:
            raise MembershipError(
                f"this machine's clock differs from the coordinator's by {difference} s; "
                f"set it right (at most {CLOCK_SKEW} s are allowed) and join again"
            )
        if not verify_signature(self.public_key, self.canonical(exclude={"signature"}), self.signature):
            raise MembershipError("the request is not signed by the key that it names; join again")
        return peer_id_of(self.public_key)


class MembershipRequest(PeerRequest):
    """To be let in, or to stay: the lease of a member that asks again is renewed."""

    purpose: Literal["join"] = Field("join", description="Says that this is a request to join.")
    username: OneLine = Field("", max_length=40, description="Of a run without sign-in: the name to be known by.")
    service: Service = Field("local", description="Where the machine is.")
    instance: OneLine = Field("", max_length=60, description="This machine, for its owner to know it by.")
    take_over: bool = Field(False, description="End the member's other instances on this service.")

    @classmethod
    def signed(cls, identity: PeerIdentity, run: str, **fields: object) -> Self:
        """Raises `MembershipError` where the name cannot be used."""
        try:
            return super().signed(identity, run, **fields)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            name = printable(fields.get("username", ""), 40)
            raise MembershipError(f"{name!r} cannot be your name here ({reason}); give another with --name") from None


class DepartureRequest(PeerRequest):
    """To give the lease back."""

    purpose: Literal["leave"] = Field("leave", description="Says that this is a request to leave.")


class DownloadRequest(PeerRequest):
    """To read one file of a checkpoint: sent as `Authorization: Kantha BASE64`, of the request as JSON."""

    purpose: Literal["download"] = "download"


class Membership(_Message):
    """The right of one peer to take part in one run."""

    serial: str = Field(pattern="^[0-9a-f]{16}$", description="By which it can be revoked.")
    run: str = Field(description="The run's fingerprint.")
    username: str = Field(description="Whose peer it is.")
    peer_id: str = Field(description="The hash of the peer's public key, as libp2p writes it.")
    service: Service = Field(description="Where the machine is.")
    roles: tuple[Literal["trainer", "averager"], ...] = Field(
        description="What it does: compute gradients, or only take part in the averaging."
    )
    issued: int = Field(description="Seconds since 1970.")
    expires: int = Field(description="Seconds since 1970.")


class Certificate(_Message):
    """A membership and the signature of the run's key over its canonical form, in hex."""

    membership: Membership = Field(description="What is certified.")
    signature: str = Field(max_length=128, description="Ed25519, by the run's key, in hex.")

    def verify(self, run_public_key: str, run: str, peer_id: str) -> Membership:
        """The membership, if it is genuine, for this run and peer, and in date. Raises `MembershipError` if not."""
        if not _is_signed(run_public_key, self.membership.canonical(), self.signature):
            raise MembershipError("the membership certificate is not signed by the run's key")
        if (self.membership.run, self.membership.peer_id) != (run, peer_id):
            raise MembershipError("the membership certificate is for another run or another peer")
        now = time.time()
        if now < self.membership.issued - CLOCK_SKEW:
            raise MembershipError(
                f"the membership certificate begins {self.membership.issued - now:.0f} s from now: this machine's "
                f"clock is slow by that, or the coordinator's is fast; set it right (at most {CLOCK_SKEW} s are "
                "allowed)"
            )
        if now > self.membership.expires + CLOCK_SKEW:
            raise MembershipError(
                f"the membership certificate ended {now - self.membership.expires:.0f} s ago, or this machine's clock "
                "is wrong; join again"
            )
        return self.membership


class KeyChange(_Message):
    """The run's key says which key follows it. Good once: a second successor of one key is not believed."""

    run: str = Field(pattern="^[0-9a-f]{64}$")
    old: str = Field(pattern=_HEX_KEY)
    new: str = Field(pattern=_HEX_KEY)
    old_until: int = Field(description="When certificates by the old key end, seconds since 1970.")
    signature: str = Field("", max_length=128, description="By the old key over all other fields, in hex.")

    def is_genuine(self, run: str) -> bool:
        return self.run == run and _is_signed(self.old, self.canonical(exclude={"signature"}), self.signature)


class Announcement(_Message):
    """What the moderators tell everybody, on the pages and in the consoles of volunteers."""

    id: int = Field(ge=1, le=2**53)
    text: OneLine = Field(min_length=1, max_length=MOST_WORDS)
    time: int = Field(ge=0, le=2**53, description="When it was made, seconds since 1970.")
    until: int = Field(ge=0, le=2**53, description="When it ends, seconds since 1970.")


class Notice(_Message):
    """What the organizer tells all peers. The newest counts."""

    run: str = Field(pattern="^[0-9a-f]{64}$")
    number: int = Field(ge=1, le=2**53, description="Milliseconds since 1970, or one more than the notice before.")
    revoked: dict[str, int] = Field(max_length=5_000, description="When a revoked certificate ends, by its serial.")
    changes: tuple[KeyChange, ...] = Field((), max_length=100, description="Of the run's key, oldest first.")
    announcements: tuple[Announcement, ...] = Field((), max_length=MOST_ANNOUNCEMENTS, description="Oldest first.")
    paused: OneLine = Field("", max_length=MOST_WORDS, description="Why nobody shall compute now; empty: go on.")
    signature: str = Field("", max_length=128, description="By the run's newest key over `content`, in hex.")

    @property
    def content(self) -> bytes:
        """What is signed: all other fields, without what it does not tell, as older notices were signed."""
        empty = {name for name in ("announcements", "paused") if not getattr(self, name)}
        return self.canonical(exclude={"signature", *empty})


class Trust:
    """What one peer believes about who is a member: the run's key, and the newest notice. Safe to share by threads."""

    def __init__(self, run: str, run_key: str) -> None:
        """
        :param run: the run's fingerprint
        :param run_key: its public key in hex, from the run's link or its coordinator
        """
        self.run = run
        self._chain: list[tuple[str, float]] = [(run_key, float("inf"))]  # keys, and until when; the newest last
        self._notice: Notice | None = None

    @property
    def run_key(self) -> str:
        """The newest, in hex."""
        return self._chain[-1][0]

    @property
    def number(self) -> int:
        """Of the newest notice; 0: none was heard."""
        return self._notice.number if self._notice is not None else 0

    @property
    def notice(self) -> str:
        """The newest notice as JSON, to be handed on; empty: none was heard."""
        return self._notice.model_dump_json() if self._notice is not None else ""

    @property
    def announcements(self) -> tuple[Announcement, ...]:
        """That have not ended, oldest first."""
        told = self._notice.announcements if self._notice is not None else ()
        return tuple(each for each in told if each.until > time.time())

    @property
    def paused(self) -> str:
        """Why nobody shall compute now; empty: the run goes on."""
        return self._notice.paused if self._notice is not None else ""

    def take(self, text: str | bytes) -> bool:
        """Believe a notice if it is newer; returns whether it is. Raises `MembershipError` where it is not genuine."""
        try:
            notice = Notice.model_validate_json(text) if len(text) <= MOST_NOTICE else None
        except ValidationError:
            notice = None
        if notice is None or notice.run != self.run:
            raise MembershipError("a notice is damaged, too long, or another run's")
        if notice.number <= self.number:
            return False
        chain = list(self._chain)
        known = [key for key, _ in chain]
        for change in notice.changes:
            if change.old not in known:  # from before this peer came
                continue
            if not change.is_genuine(self.run):
                raise MembershipError("a notice names a successor of the run's key that this key does not confirm")
            at = known.index(change.old)
            if at + 1 < len(known):
                if known[at + 1] != change.new:
                    raise MembershipError("a notice names another successor of the run's key than the one known here")
                continue
            chain[at] = (change.old, float(change.old_until))
            chain.append((change.new, float("inf")))
            known.append(change.new)
        if not _is_signed(known[-1], notice.content, notice.signature):
            raise MembershipError("a notice is not signed by the run's key")
        self._chain, self._notice = chain, notice
        return True

    def verify(self, certificate: Certificate, peer_id: str) -> Membership:
        """The membership, if a key of the run signed it, it is this peer's, in date and not revoked.

        Raises `MembershipError` if not.
        """
        reason: MembershipError | None = None
        for key, until in reversed(self._chain):
            if time.time() > until + CLOCK_SKEW:
                break
            try:
                membership = certificate.verify(key, self.run, peer_id)
            except MembershipError as error:
                reason = reason or error
                continue
            if self.is_revoked(membership.serial):
                raise MembershipError("the membership certificate was revoked; join again to hear why")
            return membership
        raise reason or MembershipError("the membership certificate is not signed by the run's key")

    def is_signed(self, content: bytes, signature: str, *, newest: bool = False) -> bool:
        """Whether the run's key signed this; where it was changed, the old one counts for a while, too.

        :param newest: only the newest counts
        """
        keys = [key for key, until in self._chain if time.time() <= until + CLOCK_SKEW]
        return any(_is_signed(key, content, signature) for key in (keys[-1:] if newest else keys))

    def is_revoked(self, serial: str) -> bool:
        return self._notice is not None and serial in self._notice.revoked


def _is_signed(key: str, content: bytes, signature: str) -> bool:
    """:param key: Ed25519 public key in hex"""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), content)
    except (ValueError, InvalidSignature):
        return False
    return True


class RunKey:
    """The run's Ed25519 key, kept by the coordinator in a file that only its owner can read."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls, path: Path) -> "RunKey":
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(pem)
        return cls(key)

    @classmethod
    def load(cls, path: Path) -> "RunKey":
        """Raises `OSError` or `ValueError` for a file that is no such key."""
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path} holds no Ed25519 key")
        return cls(key)

    @property
    def public_key(self) -> str:
        """In hex."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, content: bytes) -> bytes:
        return self._key.sign(content)

    def certify(
        self,
        run: str,
        username: str,
        peer_id: str,
        service: Service = "local",
        roles: tuple[Literal["trainer", "averager"], ...] = ("trainer",),
        lifetime: int = LIFETIME,
    ) -> Certificate:
        """:param lifetime: seconds"""
        now = int(time.time())
        membership = Membership(
            serial=secrets.token_hex(8),
            run=run,
            username=username,
            peer_id=peer_id,
            service=service,
            roles=roles,
            issued=now,
            expires=now + lifetime,
        )
        return Certificate(membership=membership, signature=self.sign(membership.canonical()).hex())

    def notify(
        self,
        run: str,
        revoked: Mapping[str, int],
        changes: Sequence[KeyChange] = (),
        after: int = 0,
        announcements: Sequence[Announcement] = (),
        paused: str = "",
    ) -> Notice:
        """:param after: number of the notice before, which this one must exceed, whatever the clock says"""
        notice = Notice(
            run=run,
            number=max(time.time_ns() // 10**6, after + 1),
            revoked=dict(revoked),
            changes=tuple(changes),
            announcements=tuple(announcements),
            paused=paused,
        )
        return notice.model_copy(update={"signature": self.sign(notice.content).hex()})

    def change_to(self, new: str, run: str) -> KeyChange:
        """Name the successor of this key.

        :param new: its public key, in hex
        """
        change = KeyChange(run=run, old=self.public_key, new=new, old_until=int(time.time()) + OLD_KEY_SECONDS)
        return change.model_copy(update={"signature": self.sign(change.canonical(exclude={"signature"})).hex()})
