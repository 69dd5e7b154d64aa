"""`kantha verify-certificate`: whether a certificate of contribution is genuine, and what it proves."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from kantha.coordinator.certificate import MOST_BYTES, Certificate, key_of_run, read_certificate
from kantha.errors import VerificationError
from kantha.volunteer.client import CoordinatorClient


def verify_certificate(path: Path, link: str | None, say: Callable[[str], None]) -> None:
    """Say in sentences what the certificate in a file proves.

    Raises `VerificationError` where it does not hold, and, where the run has to be asked for its keys, what
    `CoordinatorClient.describe` raises.

    :param link: of the run, with its key; None: whose key it is stays open
    """
    try:
        with path.open("rb") as file:
            certificate = read_certificate(file.read(MOST_BYTES + 1))
        certificate.check()
        key = _whose_key(certificate, link)
    except OSError as error:
        raise VerificationError(f"{path}: cannot be read ({error.strerror})") from None
    except VerificationError as error:
        raise VerificationError(f"{path}: {error}") from None
    say(f"It holds: {certificate.sentence}.")
    say(key)
    say(f"Run fingerprint {certificate.run}. Only these words are signed, not the picture around them.")


def _whose_key(certificate: Certificate, link: str | None) -> str:
    if link is None:
        return (
            f"It is signed by the key {certificate.public_key}. That this is the run's key is not proved yet: compare "
            "it with the end of the run's link, or give that with --link."
        )
    with CoordinatorClient(link) as client:
        if client.run_key is None:
            raise VerificationError(f"the link {client.url} has no key; copy it whole from the run's page: URL#KEY")
        if certificate.public_key == client.run_key:
            return "It is signed by the run's key, the one in the link."
        description, spec = client.describe()
    if spec.fingerprint != certificate.run:
        raise VerificationError(f"it is of another run than {client.url}, of the fingerprint {certificate.run[:16]}…")
    change = key_of_run(certificate, client.run_key, description.notice)
    if change is None:
        return "It is signed by the run's key, which has followed the one in the link."
    day = datetime.fromtimestamp(change.old_until, UTC).date()
    return (
        f"It is signed by a key that was the run's until {day}, as the run's key of today confirms. If that one was "
        "replaced because it was stolen, a thief could have made this: ask for a new certificate, to be sure."
    )
