"""The coordinator's one database, through SQLAlchemy: a SQLite file, or PostgreSQL where `KANTHA_DATABASE_URL` says so.

The command line writes into it while a run is served. Transactions that write come one after the other on both, so that
what one has read is still so when it writes; those that only read see one moment, and wait for nobody.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, String, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from kantha.errors import MissingPackageError, RunDirectoryError, StorageError, printable

if TYPE_CHECKING:
    from kantha.coordinator.rundir import RunDirectory

URL_VARIABLE = "KANTHA_DATABASE_URL"
_OWNER_ONLY = 0o600
_WAIT_SECONDS = 10  # for others that write, and for a server that does not answer
_WRITERS = 0x6B616E746861  # PostgreSQL's number of the lock that writing transactions take; "kantha"
_DRIVER = "postgresql+psycopg"


class Table(DeclarativeBase):
    """Base of all tables. A changed one needs a migration: `python -m kantha.coordinator.migrations` writes it."""


class _Run(Table):
    """Whose records these are; one row."""

    __tablename__ = "run"
    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))


class Database:
    """Safe to use from several threads and processes."""

    def __init__(self, place: Path | str) -> None:
        """
        :param place: the file, made where it is missing, which only its owner can read; or the URL of a PostgreSQL
            database, a secret that is told to nobody

        Raises `StorageError`, and `MissingPackageError` where the driver for PostgreSQL is not installed.
        """
        self._is_migrated = False
        if isinstance(place, Path):
            self.path: Path | None = place
            self._name = str(place)
            self._hint = "make room on that disk, and see that the file is whole and may be written"
            self._engine = self._open_file(place)
        else:
            self.path = None
            self._name = f"the database of {URL_VARIABLE}"
            self._hint = "see that its server runs, lets this program in, and has room"
            self._engine = _connect(place)

    def _open_file(self, path: Path) -> Engine:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, _OWNER_ONLY))
            for name in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
                if name.exists():  # SQLite makes the other two with the mode of the first
                    name.chmod(_OWNER_ONLY)
        except OSError as error:
            raise self._refused(error.strerror) from None
        engine = create_engine(URL.create("sqlite", database=str(path)), max_overflow=40)

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: object) -> None:
            connection.isolation_level = (
                None  # else sqlite3 begins a transaction at the first change, after what is read
            )
            connection.execute(f"PRAGMA busy_timeout={_WAIT_SECONDS * 1000}")
            connection.execute("PRAGMA journal_mode=WAL")  # readers do not wait for the writer

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN" if _only_reads(connection) else "BEGIN IMMEDIATE")

        return engine

    def migrate(self) -> None:
        """Make the tables, or bring those of an older Kantha up to date. Raises `NewerRunError` for a newer one's."""
        if self._is_migrated:
            return
        from kantha.coordinator import migrations  # it imports Alembic, which takes a moment

        with self.reading() as session:
            is_newest = migrations.is_newest(session.connection(), self._name)
        if not is_newest:
            with self.session() as session:
                migrations.upgrade(session.connection(), self._name)
        self._is_migrated = True

    def claim(self, fingerprint: str) -> None:
        """These are the records of this run from now on. Raises `RunDirectoryError` where they are another's."""
        with self.reading() as session:
            row = session.get(_Run, 1)
        if row is None:
            with self.session() as session:
                row = session.get(_Run, 1)
                if row is None:
                    session.add(_Run(id=1, fingerprint=fingerprint))
                    return
        if row.fingerprint != fingerprint:
            raise RunDirectoryError(
                f"{self._name}: holds the records of another run; each run needs a database of its own"
            )

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: what it reads stays so until it ends, and all that it changes is kept, or nothing.

        Raises `StorageError` where the disk refuses, or the server does not answer.
        """
        try:
            with Session(self._engine) as session, session.begin():
                yield session
        except (DBAPIError, NoConnectionError) as error:
            raise self._refused(self._reason(error)) from None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that changes nothing, and waits for nobody. What it has read may be used after it.

        Raises `StorageError`.
        """
        try:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                session.connection(execution_options={"reads": True})
                yield session
        except (DBAPIError, NoConnectionError) as error:
            raise self._refused(self._reason(error)) from None

    def close(self) -> None:
        self._engine.dispose()

    def _reason(self, error: DBAPIError | NoConnectionError) -> object:
        original = error.orig if isinstance(error, DBAPIError) else None
        if self.path is not None:
            return original or "too many wait for it"
        # Only what the server itself says: where the URL was mistyped, the driver's own words may hold the password.
        said = getattr(getattr(original, "diag", None), "message_primary", None)
        return printable(said) if said else "there is no connection to it"

    def _refused(self, reason: object) -> StorageError:
        return StorageError(f"{self._name}: the ledger cannot be used ({reason}); {self._hint}")


def open_database(run: "RunDirectory") -> Database:
    """A run's records, wherever they are, with all tables.

    Raises `StorageError`, `NewerRunError`, `RunDirectoryError` where they are elsewhere or another run's, and
    `MissingPackageError`.
    """
    url, elsewhere = os.environ.get(URL_VARIABLE, ""), run.elsewhere
    if not url and elsewhere.exists():
        raise RunDirectoryError(f"{run.path}: its records are in PostgreSQL; set {URL_VARIABLE} as where it is served")
    if url and not elsewhere.exists() and run.ledger.exists():
        raise RunDirectoryError(
            f"{run.path}: its records are in {run.ledger.name} already; unset {URL_VARIABLE}, which is for runs that "
            "were never served without it"
        )
    database = Database(url or run.ledger)
    try:
        database.migrate()
        database.claim(run.spec.fingerprint)
        if url and not elsewhere.exists():
            try:
                elsewhere.write_text(f"The records of this run are in the database of {URL_VARIABLE}.\n")
            except OSError as error:
                raise StorageError(f"{elsewhere}: cannot be written ({error.strerror}); make room there") from None
    except BaseException:
        database.close()
        raise
    return database


def has_records(run: "RunDirectory") -> bool:
    """Whether a run was ever served, so that `open_database` opens what is there, and makes nothing."""
    return run.ledger.exists() or run.elsewhere.exists()


def insert(session: Session, table: type[Table]) -> sqlite.Insert | postgresql.Insert:
    """INSERT in the database's own dialect, which knows what to do where a row is there already (`on_conflict_…`)."""
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def _only_reads(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("reads", False))


def _connect(text: str) -> Engine:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = URL.create("")
    if url.drivername not in ("postgres", "postgresql", _DRIVER) or not url.database:
        raise StorageError(f"{URL_VARIABLE}: has to be like postgresql://user:password@host/database; mend or unset it")
    try:
        engine = create_engine(
            url.set(drivername=_DRIVER),
            pool_pre_ping=True,  # a server that was started again has forgotten the connections from before
            pool_size=10,
            max_overflow=20,
            pool_timeout=_WAIT_SECONDS,
            hide_parameters=True,
            connect_args={
                "connect_timeout": _WAIT_SECONDS,
                "keepalives_idle": _WAIT_SECONDS,
                "tcp_user_timeout": _WAIT_SECONDS * 1000,
                "options": f"-c lock_timeout={_WAIT_SECONDS}s",
            },
        )
    except ModuleNotFoundError:
        raise MissingPackageError(
            f"{URL_VARIABLE} needs the driver for PostgreSQL: pip install 'kantha[postgresql]'"
        ) from None

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(
            "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"
            if _only_reads(connection)
            # each statement sees what was committed before it: also by the one that this waited for
            else f"SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SELECT pg_advisory_xact_lock({_WRITERS})"
        )

    return engine
