"""A peer's libp2p identity: an RSA key on disk, whose public half hashes to the peer id.

The same key signs what the peer says in the DHT, so that a report can be traced to the peer id in a certificate.
"""

import base64
import hashlib
from pathlib import Path

import multihash
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hivemind.p2p import P2P, PeerID
from hivemind.proto import crypto_pb2
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from kantha.errors import SwarmError


class PeerIdentity:
    """The key of one peer."""

    def __init__(self, path: Path) -> None:
        """Load the identity at `path`; where there is none, make one (readable by the owner only)."""
        self.path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            P2P.generate_identity(str(path))
        try:
            encoded = crypto_pb2.PrivateKey.FromString(path.read_bytes()).data
            self.key = RSAPrivateKey.__new__(RSAPrivateKey)
            self.key.__setstate__({"_private_key": encoded})
        except Exception as error:  # noqa: BLE001  of the file, of protobuf, of the cryptography: each has its own
            raise SwarmError(
                f"{path}: not a readable peer identity ({error}); delete the file to start with a new one"
            ) from None
        self.public_key: str = self.key.get_public_key().to_bytes().decode()
        self.peer_id = peer_id_of(self.public_key)

    def sign(self, message: bytes) -> str:
        """RSA-PSS signature with SHA-256, in base64."""
        return self.key.sign(message).decode()


def peer_id_of(public_key: str) -> str:
    """The peer id, in base58, of an RSA public key in OpenSSH form. Raises `ValueError` for anything else.

    https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
    """
    try:
        key = serialization.load_ssh_public_key(public_key.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError("not an RSA key")
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    encoded = crypto_pb2.PublicKey(key_type=crypto_pb2.RSA, data=der).SerializeToString()
    return PeerID(multihash.encode(hashlib.sha256(encoded).digest(), "sha2-256")).to_base58()


def verify_signature(public_key: str, message: bytes, signature: str) -> bool:
    """Whether `signature` (base64) over `message` was made with the private half of `public_key` (OpenSSH form)."""
    try:
        base64.b64decode(signature, validate=True)
        return bool(RSAPublicKey.from_bytes(public_key.encode()).verify(message, signature.encode()))
    except (ValueError, UnsupportedAlgorithm):
        return False
