"""What coordinator and volunteer say to each other over HTTP; the volunteer's requests are in swarm/membership.py.

GET  /api/v1/run                   RunDescription
POST /api/v1/memberships           MembershipRequest → 201 Admission, 202 Waiting, 403, 409 LeaseTaken, 429
POST /api/v1/tokens                TokenSignIn → the same answers
POST /api/v1/departures            DepartureRequest → 204
GET  /api/v1/tokenizer.json        GET /api/v1/status
GET  /api/v1/checkpoints/ROUND/F   with a DownloadRequest in the Authorization header
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from kantha.digests import FileDigest
from kantha.swarm.membership import MOST_NOTICE, Certificate, MembershipRequest
from kantha.training.checkpoint import CHECKPOINT_FILES, MANIFEST


class RemoteFile(FileDigest):
    """A file of the coordinator, which is believed only by its digest."""

    path: str = Field(
        pattern=r"^\w[\w./-]*$",  # no scheme, no host: a file comes from the coordinator or not at all
        description="Where to get it, relative to the run's address.",
    )


class Snapshot(BaseModel):
    """The newest checkpoint."""

    round: int = Field(description="After which it was saved; 0: the first weights.")
    files: dict[str, RemoteFile] = Field(description="By file name; checkpoint.json is the manifest of the others.")

    @field_validator("files")
    @classmethod
    def _whole_and_no_more(cls, files: dict[str, RemoteFile]) -> dict[str, RemoteFile]:
        # the volunteer makes paths of the names
        if wrong := files.keys() ^ {MANIFEST, *CHECKPOINT_FILES}:
            name = min(wrong)
            raise ValueError(f"{name!r} is {'no file of a snapshot' if name in files else 'missing'}")
        return files


class RunDescription(BaseModel):
    """What `GET /api/v1/run` answers: all that a stranger needs to join, with the digests to check it by."""

    kantha: Literal["run"] = Field("run", description="Says that this is a Kantha coordinator.")
    version: str = Field(description="The coordinator's version of Kantha.")
    fingerprint: str = Field(description="SHA-256 of the canonical spec.")
    spec: dict[str, Any] = Field(description="All that peers must agree on; `kantha init` explains every field.")
    public_key: str = Field(
        pattern="^[0-9a-f]{64}$", description="The run's Ed25519 key in hex; membership certificates are signed by it."
    )
    notice: str = Field("", max_length=MOST_NOTICE, description="The organizer's newest notice, with changes of keys.")
    sign_in: Literal["local", "huggingface"] = Field(
        "local", description="Who people are: local believes the name that somebody on this very machine gives."
    )
    bootstrap: list[str] = Field(description="Multiaddrs of peers that welcome newcomers.")
    tokenizer: RemoteFile = Field(description="Of the run; what all peers read text by.")
    snapshot: Snapshot = Field(description="What a newcomer may begin with where no peer gives it the state.")


class Admission(BaseModel):
    """A member is in; it asks again every `renew_seconds`, or its lease ends."""

    certificate: Certificate = Field(description="What other peers want to see.")
    notice: str = Field("", max_length=MOST_NOTICE, description="The organizer's newest; empty: there is none.")
    renew_seconds: float = Field(gt=0, le=3600, description="Until it should ask again.")


class Waiting(BaseModel):
    """Not in yet; the same question is asked again after `poll_seconds`."""

    state: Literal["sign_in", "asked"] = Field(description="Whose turn it is: its owner's, or a moderator's.")
    message: str = Field(max_length=500, description="What happens next, in a sentence for the person who waits.")
    code: str = Field("", max_length=20, description="sign_in: shown here, and confirmed in the browser.")
    path: str = Field("", max_length=200, description="sign_in: where to confirm it, relative to the run's address.")
    expires: float = Field(0.0, description="sign_in: when the code ends, seconds since 1970.")
    poll_seconds: float = Field(gt=0, le=60, description="Until it should ask again.")


class LeaseTaken(BaseModel):
    """The member's places on this service are taken."""

    detail: str = Field(max_length=1_000, description="In a sentence: where, since when, and how to end it.")


class TokenSignIn(BaseModel):
    """Signs in by a Hugging Face token, which is used once and forgotten."""

    model_config = ConfigDict(extra="forbid")
    request: MembershipRequest = Field(description="As for joining without a token.")
    token: SecretStr = Field(min_length=1, max_length=200, description="Of the kind that may only read.")
