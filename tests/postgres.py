"""A PostgreSQL server of the tests' own: its data in a folder of /tmp, reached by a Unix socket there alone."""

import glob
import os
import shutil
import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from commands import wait_for
from sqlalchemy import URL, create_engine, text

from kantha.swarm.processes import signal_when_parent_dies

_PATIENCE = 60.0  # seconds
_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "60",
}


def find_programs() -> Path | None:
    """The folder with PostgreSQL's programs; None where it is not installed."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)  # noqa: PTH207  Debian's, not on the PATH
    found = shutil.which("initdb")
    return Path(folders[0]) if folders else Path(found).parent if found else None


class PostgresServer:
    """Runs as `nobody` where the tests run as root: it refuses to run as that."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._user = "nobody" if os.getuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="kantha-pg-"))  # pytest's own are too deep for a socket's name
        if self._user:
            shutil.chown(self.folder, self._user)
        self._databases = 0
        self._free: list[str] = []  # URLs of databases that are empty again
        self._do("initdb", "--no-locale", "--encoding=UTF8", "--auth=trust", "--username=kantha", "--no-sync")
        self.start()

    def _do(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, "-D", self.folder / "data", *arguments],
            user=self._user,
            cwd=self.folder,
            check=True,
            capture_output=True,
            timeout=120,
        )

    def start(self) -> None:
        settings = [f"--{name}={value}" for name, value in _SETTINGS.items()]
        self._process = subprocess.Popen(
            [self._programs / "postgres", "-D", "data", f"--unix_socket_directories={self.folder}", *settings],
            user=self._user,
            cwd=self.folder,
            preexec_fn=partial(signal_when_parent_dies, signal.SIGQUIT),  # tests may be killed
            stderr=(self.folder / "log").open("ab"),
        )
        is_ready = [self._programs / "pg_isready", "--quiet", f"--host={self.folder}"]
        wait_for(lambda: subprocess.run(is_ready, check=False).returncode == 0, _PATIENCE, "PostgreSQL is ready")

    @property
    def is_down(self) -> bool:
        return self._process.poll() is not None

    def stop(self) -> None:
        """As if it crashed."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(_PATIENCE)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str = "postgres") -> str:
        return URL.create(
            "postgresql", "kantha", database=database, query={"host": str(self.folder)}
        ).render_as_string()

    def make_database(self) -> str:
        """URL of an empty one."""
        if self._free:
            return self._free.pop()
        self._databases += 1
        name = f"run_{self._databases}"
        self._order(self.url(), f"CREATE DATABASE {name}")
        return self.url(name)

    def take_back(self, url: str) -> None:
        """A new one would take 300 files, and the time to copy them."""
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        self._order(url, f"{others} AND pid <> pg_backend_pid()", "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
        self._free.append(url)

    @staticmethod
    def _order(url: str, *statements: str) -> None:
        engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
        engine.dispose()
