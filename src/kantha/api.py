"""What coordinator and volunteer say to each other over HTTP, besides memberships (swarm/membership.py)."""

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from kantha.digests import FileDigest
from kantha.training.checkpoint import CHECKPOINT_FILES, MANIFEST


class RemoteFile(FileDigest):
    path: str = Field(
        pattern=r"^\w[\w./-]*$",  # no scheme, no host: a file comes from the coordinator or not at all
        description="Where to get it, relative to the run's address.",
    )


class Snapshot(BaseModel):
    """The newest checkpoint."""

    round: int
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
    spec: dict[str, Any]
    public_key: str = Field(description="The run's Ed25519 key in hex; membership certificates are signed by it.")
    bootstrap: list[str] = Field(description="Multiaddrs of peers that welcome newcomers.")
    tokenizer: RemoteFile
    snapshot: Snapshot
