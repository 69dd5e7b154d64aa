"""Membership: who may take part, said by the run's key, checkable by everyone without asking anyone.

A volunteer proves that it holds a peer's key (`MembershipRequest`) and gets a certificate bound to that peer id. Peers
verify certificates with the run's public key alone, so the coordinator may be away.
"""

import json
import time
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kantha.errors import MembershipError, printable
from kantha.spec import OneLine
from kantha.swarm.identity import PeerIdentity, peer_id_of, verify_signature

LIFETIME = 24 * 3600  # seconds a certificate is valid
CLOCK_SKEW = 60  # seconds that two machines' clocks may differ

Service = Literal["local", "kaggle", "colab"]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def canonical(self, exclude: set[str] | None = None) -> bytes:
        return json.dumps(self.model_dump(mode="json", exclude=exclude), sort_keys=True, separators=(",", ":")).encode()


class MembershipRequest(_Message):
    """What a volunteer sends to be let in; the signature proves that it holds the peer's key."""

    run: str = Field(pattern="^[0-9a-f]{64}$", description="The run's fingerprint.")
    username: OneLine = Field(min_length=1, max_length=40)
    service: Service = "local"
    public_key: str = Field(max_length=2_000, description="The peer's public key, OpenSSH form.")
    issued: int = Field(description="When this was asked, seconds since 1970; an old request is refused.")
    signature: str = Field("", max_length=2_000, description="By the peer's key over all other fields.")

    @classmethod
    def signed(cls, identity: PeerIdentity, run: str, username: str, service: Service) -> "MembershipRequest":
        """Raises `MembershipError` where the name cannot be used."""
        try:
            request = cls(
                run=run, username=username, service=service, public_key=identity.public_key, issued=int(time.time())
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise MembershipError(
                f"{printable(username, 40)!r} cannot be your name here ({reason}); give another with --name"
            ) from None
        signature = identity.sign(request.canonical(exclude={"signature"}))
        return request.model_copy(update={"signature": signature})

    def verified_peer_id(self) -> str:
        """The peer id that asks. Raises `MembershipError` where the signature or the time is wrong."""
        difference = abs(int(time.time()) - self.issued)
        if difference > CLOCK_SKEW:
            raise MembershipError(
                f"this machine's clock differs from the coordinator's by {difference} s; "
                f"set it right (at most {CLOCK_SKEW} s are allowed) and join again"
            )
        if not verify_signature(self.public_key, self.canonical(exclude={"signature"}), self.signature):
            raise MembershipError("the request is not signed by the key that it names; join again")
        return peer_id_of(self.public_key)


class Membership(_Message):
    """The right of one peer to take part in one run."""

    run: str
    username: str
    peer_id: str
    service: Service
    roles: tuple[Literal["trainer", "averager"], ...]
    issued: int
    expires: int


class Certificate(_Message):
    """A membership and the signature of the run's key over its canonical form, in hex."""

    membership: Membership
    signature: str

    def verify(self, run_public_key: str, run: str, peer_id: str) -> Membership:
        """The membership, if it is genuine, for this run and peer, and in date. Raises `MembershipError` if not."""
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(run_public_key))
            key.verify(bytes.fromhex(self.signature), self.membership.canonical())
        except (ValueError, InvalidSignature):
            raise MembershipError("the membership certificate is not signed by the run's key") from None
        if (self.membership.run, self.membership.peer_id) != (run, peer_id):
            raise MembershipError("the membership certificate is for another run or another peer")
        if not self.membership.issued - CLOCK_SKEW <= time.time() <= self.membership.expires + CLOCK_SKEW:
            raise MembershipError("the membership certificate is out of date, or this machine's clock is wrong")
        return self.membership


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

    def certify(self, request: MembershipRequest, peer_id: str) -> Certificate:
        now = int(time.time())
        membership = Membership(
            run=request.run,
            username=request.username,
            peer_id=peer_id,
            service=request.service,
            roles=("trainer",),
            issued=now,
            expires=now + LIFETIME,
        )
        return Certificate(membership=membership, signature=self.sign(membership.canonical()).hex())
