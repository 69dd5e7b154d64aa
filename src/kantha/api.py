"""What coordinator and volunteer say to each other over HTTP, besides memberships (swarm/membership.py)."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from kantha.digests import FileDigest


class RemoteFile(FileDigest):
    path: str = Field(description="Where to get it, relative to the run's address.")


class Snapshot(BaseModel):
    """The newest checkpoint."""

    round: int
    files: dict[str, RemoteFile] = Field(description="By file name; checkpoint.json is the manifest of the others.")


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
