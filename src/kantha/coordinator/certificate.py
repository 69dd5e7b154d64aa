"""The certificate of contribution: what one volunteer gave to a run, by the ledger, signed by the run's key.

Anybody can check it without the coordinator: the signature proves that whoever holds the key says so, and the run's
link has the key. What is drawn around it (templates/certificate.svg) is not signed; the figures inside are.
"""

import json
from datetime import UTC, date, datetime
from typing import Literal
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kantha.errors import VerificationError, printable
from kantha.spec import OneLine
from kantha.swarm.membership import CLOCK_SKEW, KeyChange, Notice, RunKey, Trust

MOST_BYTES = 256 * 1024  # of a file that may hold one
ELEMENT = "kantha-certificate"  # id of the SVG's metadata that has the certificate as JSON
_SIGNATURE_DIGITS = 128
_LATEST = 253_402_300_799  # the end of the year 9999 in seconds since 1970, beyond which there are no dates
_SVG = "{http://www.w3.org/2000/svg}"


class Contribution(BaseModel):
    """What one person gave to one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["kantha-contribution"] = "kantha-contribution"
    run: str = Field(pattern="^[0-9a-f]{64}$", description="The run's fingerprint.")
    run_name: OneLine = Field(min_length=1, max_length=80)
    person: int = Field(ge=1, le=2**53, description="The person's number in this run: /volunteers/NUMBER.")
    name: OneLine = Field(min_length=1, max_length=96, description="The name that this person chose to be shown by.")
    samples: int = Field(ge=1, le=2**53, description="Samples in finished rounds.")
    seconds: int = Field(ge=0, le=2**53, description="Spent computing, on all machines together.")
    rounds: int = Field(ge=1, le=2**53, description="Finished rounds with samples of this person.")
    first_day: date = Field(description="UTC; of the first sample.")
    last_day: date = Field(description="UTC; of the last sample.")

    def signed(self, key: RunKey, now: float) -> "Certificate":
        """
        :param key: the run's newest
        :param now: seconds since 1970
        """
        unsigned = Certificate(
            **self.model_dump(), issued=int(now), public_key=key.public_key, signature="0" * _SIGNATURE_DIGITS
        )
        return unsigned.model_copy(update={"signature": key.sign(unsigned.content).hex()})


class Certificate(Contribution):
    """A contribution, and the signature of the run's key over it."""

    issued: int = Field(ge=0, le=2**53, description="Seconds since 1970.")
    public_key: str = Field(pattern="^[0-9a-f]{64}$", description="The run's Ed25519 key then, in hex.")
    signature: str = Field(pattern=f"^[0-9a-f]{{{_SIGNATURE_DIGITS}}}$", description="Over all other fields, in hex.")

    @property
    def content(self) -> bytes:
        """What is signed: the other fields as canonical JSON, under a word that nothing else of the run begins with."""
        fields = self.model_dump(mode="json", exclude={"signature"})
        return b"contribution:" + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()

    def check(self) -> None:
        """Raises `VerificationError` where the key named in it did not sign this."""
        if not Trust(self.run, self.public_key).is_signed(self.content, self.signature):
            raise VerificationError(
                "the signature does not belong to these figures: the certificate was changed after it was made, or "
                "made up; ask for the original"
            )

    @property
    def sentence(self) -> str:
        """What it says, for a person."""
        days = (
            f"on {self.first_day}" if self.first_day == self.last_day else f"from {self.first_day} to {self.last_day}"
        )
        rounds = f"{self.rounds:,} round{'s' * (self.rounds != 1)}"
        samples = f"{self.samples:,} sample{'s' * (self.samples != 1)}"
        return (
            f"{self.name} gave {samples} in {rounds} and {self.seconds / 3600:,.1f} hours of computing to the run "
            f"“{self.run_name}”, {days} (volunteer {self.person}; as of {self.issued_moment})"
        )

    @property
    def issued_moment(self) -> str:
        return datetime.fromtimestamp(min(self.issued, _LATEST), UTC).strftime("%Y-%m-%d %H:%M UTC")


def read_certificate(content: bytes) -> Certificate:
    """The certificate in a file of JSON, or in an SVG picture. Raises `VerificationError` for anything else."""
    if len(content) > MOST_BYTES:
        raise VerificationError(f"larger than {MOST_BYTES:,} bytes, so no certificate; take the original SVG or JSON")
    try:
        text = content.decode("utf-8-sig")
        if text.lstrip().startswith("<"):
            text = _embedded(text)
        return Certificate.model_validate_json(text)
    except UnicodeDecodeError:
        raise VerificationError(
            "is no text: a picture like a PNG proves nothing by itself; take the SVG or the JSON that it was made from"
        ) from None
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(map(str, mistake["loc"]))
        raise VerificationError(
            f"holds no certificate of contribution ({printable(f'{where}: ' if where else '', 60)}"
            f"{printable(mistake['msg'], 200)}); take the original SVG or JSON"
        ) from None


def _embedded(text: str) -> str:
    if "<!" in text.replace("<!--", ""):  # entities could make a small file a large one
        raise VerificationError("this SVG declares entities, which no certificate does; take the original SVG or JSON")
    try:
        elements = ElementTree.fromstring(text).iter(f"{_SVG}metadata")
        found = next((element.text for element in elements if element.get("id") == ELEMENT), None)
    except ElementTree.ParseError as error:
        raise VerificationError(f"this SVG is damaged ({error}); take the original SVG or JSON") from None
    if not found:
        raise VerificationError("this SVG has no certificate inside; take the original SVG or JSON")
    return found


def key_of_run(certificate: Certificate, run_key: str, notice: str = "") -> KeyChange | None:
    """Whether the certificate's key is, or was, the run's, told from one key that certainly is.

    :param run_key: of the run's link
    :param notice: the organizer's newest, where the key may have changed since one or the other
    :returns: None where it is the run's key by all that is known; else the change by which another one replaced it
    :raises VerificationError: where it is not the run's, or signed something after it was replaced
    :raises MembershipError: where the notice is not genuine
    """
    keys, replaced = {run_key}, dict[str, KeyChange]()
    if notice:
        trust = Trust(certificate.run, run_key)
        trust.take(notice)
        keys.add(trust.run_key)
        # the newest key signed the notice, so it confirms the changes that led to it
        for change in reversed(Notice.model_validate_json(trust.notice).changes):
            if change.new in keys and change.is_genuine(certificate.run):
                keys.add(change.old)
                replaced[change.old] = change
    if certificate.public_key not in keys:
        raise VerificationError(
            f"it is signed by the key {certificate.public_key[:16]}…, which is none of this run's; it was made up, or "
            "the link is another run's"
        )
    change_from = replaced.get(certificate.public_key)
    if change_from is not None and certificate.issued > change_from.old_until + CLOCK_SKEW:
        raise VerificationError(
            f"it is signed by the key {certificate.public_key[:16]}… after another one had replaced that; ask for a "
            "new certificate"
        )
    return change_from
