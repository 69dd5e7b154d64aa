"""The secrets of all tests, and the search for them in what the tests leave behind.

Each has a mark that nothing else has. When the session ends, no file below pytest's folder may hold one, but for the
few that are made to, by us or by the hub's library: else the session fails, and says which file and which secret,
without the secret.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_MARK = "zQ7canary"
CLIENT_SECRET = f"{_MARK}ClientSecretVx4"
TOKEN = f"hf_{_MARK}TokenVx4"
ACCESS_TOKEN = f"hf_oauth_{_MARK}AccessTokenVx4"
CODE = f"{_MARK}CodeVx4"
CHAT = f"{_MARK}ChatVx4"
API_KEY = f"{_MARK}ApiKeyVx4"

_FOUND = re.compile(rb"zQ7canary([A-Za-z]+?)Vx4|-----BEGIN [A-Z ]*(PRIVATE KEY)-----")
_MADE_TO_HOLD = re.compile(r"oauth\.json|notify\.txt|[\w-]+\.pem|(stored_)?tokens?")
_WEIGHTS = (".safetensors", ".bin", ".npy", ".arrow", ".parquet", ".png")  # large, and of numbers only
_LARGEST = 32 * 2**20  # bytes


def leaks(folder: Path) -> list[str]:
    """Where a secret is that must not be there, and which one."""
    found = []
    for path in folder.rglob("*"):
        if path.suffix in _WEIGHTS or _MADE_TO_HOLD.fullmatch(path.name) or path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            for name in sorted({b"".join(match).decode() for match in _FOUND.findall(file.read(_LARGEST))}):
                found.append(f"{path.relative_to(folder)}: {name}")
    return found


@pytest.fixture(scope="session", autouse=True)
def _no_secret_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    if found := leaks(tmp_path_factory.getbasetemp()):
        pytest.fail("secrets were left in files:\n" + "\n".join(found), pytrace=False)
