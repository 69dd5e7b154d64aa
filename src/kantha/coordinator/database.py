"""The coordinator's one SQLite file, through SQLAlchemy. The command line writes into it while a run is served."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Session

from kantha.errors import StorageError

_OWNER_ONLY = 0o600


class Table(DeclarativeBase):
    """Base of all tables."""


class Database:
    """Safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; only its owner can read it. Raises `StorageError`."""
        self.path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, _OWNER_ONLY))
            for name in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
                if name.exists():  # SQLite makes the other two with the mode of the first
                    name.chmod(_OWNER_ONLY)
        except OSError as error:
            raise self._refused(error.strerror) from None
        self._engine: Engine = create_engine(f"sqlite:///{path}")

        @event.listens_for(self._engine, "connect")
        def _configure(connection: Any, _record: object) -> None:
            connection.isolation_level = (
                None  # else sqlite3 begins a transaction at the first change, after what is read
            )
            connection.execute("PRAGMA busy_timeout=10000")
            connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer

        @event.listens_for(self._engine, "begin")
        def _begin(connection: Connection) -> None:
            reads = connection.get_execution_options().get("reads", False)
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    def make_tables(self) -> None:
        """Those that are missing."""
        with self.session() as session:
            Table.metadata.create_all(session.connection())

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: what it reads stays so until it ends, and all that it changes is kept, or nothing.

        Raises `StorageError` where the disk refuses.
        """
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except DatabaseError as error:
            raise self._refused(error.orig) from None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that changes nothing, and waits for nobody. Raises `StorageError`."""
        try:
            with Session(self._engine) as session, session.begin():
                session.connection(execution_options={"reads": True})
                yield session
        except DatabaseError as error:
            raise self._refused(error.orig) from None

    def close(self) -> None:
        self._engine.dispose()

    def _refused(self, reason: object) -> StorageError:
        return StorageError(
            f"{self.path}: the ledger cannot be used ({reason}); make room on that disk, "
            "and see that the file is whole and may be written"
        )
