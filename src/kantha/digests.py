"""Files that are believed only by their digest."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from kantha.errors import DigestError


class FileDigest(BaseModel):
    """How a file must be, to be believed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of all of it, in hex.")
    size: int = Field(ge=0, description="Bytes.")

    def matches(self, path: Path) -> bool:
        """Whether the file is there and is this one."""
        try:
            check_file(path, self)
        except DigestError:
            return False
        return True


def digest_of(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return FileDigest(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def check_file(path: Path, expected: FileDigest) -> None:
    """Raises `DigestError` where the file is missing or another one."""
    try:
        found = digest_of(path)
    except OSError as error:
        raise DigestError(f"{path}: cannot be read ({error.strerror}); get it again") from None
    if (found.sha256, found.size) != (expected.sha256, expected.size):
        raise DigestError(
            f"{path}: damaged or changed (SHA-256 {found.sha256[:12]}…, {found.size} bytes; announced "
            f"{expected.sha256[:12]}…, {expected.size} bytes); delete it to get it again"
        )
