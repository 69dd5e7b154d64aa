import importlib
import shutil
import stat
import subprocess
import sys
import threading
import traceback
from datetime import date
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from postgres import PostgresServer
from sqlalchemy import text

import kantha.coordinator
from kantha.coordinator.database import Database, Table, has_records, open_database
from kantha.coordinator.ledger import Ledger, RunTotals
from kantha.coordinator.migrations import config_for
from kantha.coordinator.rundir import RunDirectory
from kantha.errors import MissingPackageError, NewerRunError, RunDirectoryError, StorageError


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def test_only_its_owner_reads_it_and_what_sqlite_puts_beside_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "ledger.sqlite")
    with database.session() as session:
        session.execute(text("CREATE TABLE a (b)"))
        session.execute(text("INSERT INTO a VALUES (1)"))
    assert modes(tmp_path) == {"ledger.sqlite": 0o600, "ledger.sqlite-wal": 0o600, "ledger.sqlite-shm": 0o600}
    database.close()


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.touch(mode=0o644)
    Database(path).close()
    assert modes(tmp_path) == {"ledger.sqlite": 0o600}


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere/ledger\.sqlite: .*No such file"):
        Database(tmp_path / "nowhere" / "ledger.sqlite")


def test_what_two_read_before_they_write_is_not_lost(database: Database) -> None:
    """One reads when the other has written, so that of two instances only one can get the last place."""
    with database.session() as session:
        session.execute(text("CREATE TABLE a (b INTEGER)"))
        session.execute(text("INSERT INTO a VALUES (0)"))
    start = threading.Barrier(4)

    def count() -> None:
        start.wait(timeout=10)
        for _ in range(25):
            with database.session() as session:
                before = session.execute(text("SELECT b FROM a")).scalar_one()
                session.execute(text("UPDATE a SET b = :after"), {"after": before + 1})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with database.reading() as session:
        assert session.execute(text("SELECT b FROM a")).scalar_one() == 100


def test_who_reads_sees_one_moment_whoever_writes(database: Database) -> None:
    with database.session() as session:
        session.execute(text("CREATE TABLE a (b INTEGER)"))
        session.execute(text("INSERT INTO a VALUES (7)"))
    with database.reading() as reader:
        assert reader.execute(text("SELECT b FROM a")).scalar() == 7
        with database.session() as writer:
            writer.execute(text("UPDATE a SET b = 8"))
        assert reader.execute(text("SELECT b FROM a")).scalar() == 7
    with database.reading() as reader:
        assert reader.execute(text("SELECT b FROM a")).scalar() == 8


def test_a_transaction_that_fails_leaves_nothing(database: Database) -> None:
    with database.session() as session:
        session.execute(text("CREATE TABLE a (b INTEGER)"))

    def fail() -> None:
        with database.session() as session:
            session.execute(text("INSERT INTO a VALUES (7)"))
            session.execute(text("INSERT INTO nowhere VALUES (7)"))

    with pytest.raises(StorageError, match="the ledger cannot be used"):
        fail()
    with database.reading() as session:
        assert session.execute(text("SELECT COUNT(*) FROM a")).scalar() == 0


def test_another_program_may_read_while_this_one_writes(database: Database, place: Path | str) -> None:
    with database.session() as session:
        session.execute(text("CREATE TABLE a (b INTEGER)"))
        session.execute(text("INSERT INTO a VALUES (7)"))
    program = (
        "import sys; from pathlib import Path; from sqlalchemy import text\n"
        "from kantha.coordinator.database import Database\n"
        "place = sys.argv[1] if '://' in sys.argv[1] else Path(sys.argv[1])\n"
        "with Database(place).reading() as session:\n"
        "    print(session.execute(text('SELECT b FROM a')).scalar())"
    )
    with database.session() as session:
        session.execute(text("UPDATE a SET b = 8"))
        done = subprocess.run(
            [sys.executable, "-c", program, str(place)], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.stdout == "7\n", done.stderr


# ---- the tables' history


def tables_of(database: Database) -> list[Any]:
    """What would have to change for the tables to be those of this program."""
    with database.session() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        return compare_metadata(context, Table.metadata)


def test_migrated_tables_are_those_of_this_program(database: Database) -> None:
    for module in iter_modules(kantha.coordinator.__path__):
        importlib.import_module(f"kantha.coordinator.{module.name}")
    database.migrate()
    assert tables_of(database) == []


def test_two_programs_may_migrate_at_once(place: Path | str) -> None:
    databases = [Database(place) for _ in range(4)]
    threads = [threading.Thread(target=database.migrate) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with databases[0].reading() as session:
        assert session.execute(text("SELECT COUNT(*) FROM totals")).scalar() == 1
    for database in databases:
        database.close()


def test_the_ledger_of_a_newer_kantha_is_left_alone(database: Database) -> None:
    database.migrate()
    with database.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    newer = Database(database.path) if database.path else database
    newer._is_migrated = False
    with pytest.raises(NewerRunError, match=r"newer Kantha \(tables 9999"):
        newer.migrate()


def test_an_older_ledger_is_brought_up_to_date_with_all_that_it_knows(tmp_path: Path) -> None:
    """One of a Kantha from before there were migrations, as its tables were made then."""
    database = Database(tmp_path / "ledger.sqlite")
    with database.session() as session:
        command.upgrade(config_for(session.connection()), "0001")
        for statement in [
            "DROP TABLE alembic_version",
            "DROP TABLE pairings",  # of a Kantha from still longer ago
            "INSERT INTO people VALUES (7, 'asha', 'Asha', NULL, 'approved', '', 0, '', 0)",
            "INSERT INTO machines VALUES ('b', 9, 0)",
            "INSERT INTO certificates VALUES ('0f', 'c', 8, 1, 2, 0, '', '')",
            *(
                f"INSERT INTO members VALUES ('{peer}', '{name}', 'local', 0, 0)"
                for peer, name in (("a", "Asha"), ("b", "Rafiq"), ("c", "Mitu"), ("d", "Karim"))
            ),
            # round, peer, lineage, samples, seconds, waited, losses, peers, seen
            "INSERT INTO contributions VALUES (1, 'a', 'x', 10, 2.5, 0.5, 50, 5, 2, 100)",
            "INSERT INTO contributions VALUES (1, 'b', 'x', 30, 2.5, 0.5, 90, 3, 2, 90)",
            "INSERT INTO contributions VALUES (1, 'c', 'x', 60, 0, 0, 0, 0, 0, 80)",
            "INSERT INTO contributions VALUES (2, 'a', 'y', 10, 1, 0, 50, 5, 2, 86500)",
            "INSERT INTO contributions VALUES (2, 'd', 'y', 0, 1, 1, 0, 0, 2, 86400)",
            "INSERT INTO failed_rounds VALUES (2, 'parts are missing')",
            "INSERT INTO failed_rounds VALUES (3, 'not done yet')",
        ]:
            session.execute(text(statement))
    ledger = Ledger(database)
    assert tables_of(database) == []
    assert ledger.totals() == RunTotals(rounds=2, samples=110, failed=1, seconds=7.0, waited=2.0, people=3)
    first, second = ledger.rounds()
    assert (first.samples, first.volunteers, first.finished, first.loss) == (100, 3, 80.0, 148 / 40)
    assert (second.samples, second.volunteers, second.finished, second.reason) == (10, 1, 86500.0, "parts are missing")
    assert ledger.samples_by_peer() == {"a": 20, "b": 30, "c": 60, "d": 0}
    assert ledger.people_of_peers() == {"a": 7, "b": 9, "c": 8, "d": None}
    assert [
        (entry.person, entry.day.day, entry.samples) for entry in ledger.activity_between(*[date(1970, 1, 2)] * 2)
    ] == [
        (None, 2, 0),
        (7, 2, 10),
    ]
    ledger.close()


# ---- whose records they are, and where


def test_a_run_s_records_are_where_they_were_before(
    run_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.open(run_path)
    assert not has_records(run)
    monkeypatch.setenv("KANTHA_DATABASE_URL", postgres.make_database())
    for _ in range(2):
        open_database(run).close()
    assert has_records(run)
    assert not run.ledger.exists()
    monkeypatch.delenv("KANTHA_DATABASE_URL")
    with pytest.raises(RunDirectoryError, match="its records are in PostgreSQL; set KANTHA_DATABASE_URL"):
        open_database(run)
    assert not run.ledger.exists()


def test_records_in_a_file_are_not_left_behind(
    run_path: Path, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.open(run_path)
    open_database(run).close()
    assert has_records(run)
    monkeypatch.setenv("KANTHA_DATABASE_URL", postgres.make_database())
    with pytest.raises(
        RunDirectoryError, match=r"its records are in ledger\.sqlite already; unset KANTHA_DATABASE_URL"
    ):
        open_database(run)


def test_two_runs_do_not_share_a_database(
    run_path: Path, database: Database, place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.migrate()
    database.claim("f" * 64)
    database.claim("f" * 64)
    run = RunDirectory.open(run_path)
    if isinstance(place, Path):
        database.close()
        shutil.copy(place, run.ledger)
    else:
        monkeypatch.setenv("KANTHA_DATABASE_URL", place)
    with pytest.raises(RunDirectoryError, match="holds the records of another run"):
        open_database(run)
    assert not run.elsewhere.exists()


SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"postgresql://asha:{SECRET}@127.0.0.1:1/run", "there is no connection to it"),
        (f"postgresql://asha:p@{SECRET}@127.0.0.1:1/run", "there is no connection to it"),
        (f"postgresql://asha:p/{SECRET}@127.0.0.1:1/run", "there is no connection to it"),
        (f"postgresql://asha:{SECRET}@127.0.0.1:port/run", "has to be like postgresql://user:password@host/database"),
        (f"mysql://asha:{SECRET}@127.0.0.1/run", "has to be like postgresql://user:password@host/database"),
        (f"postgresql://asha:{SECRET}@127.0.0.1", "has to be like postgresql://user:password@host/database"),
        (SECRET, "has to be like postgresql://user:password@host/database"),
        (f"sqlite:///{SECRET}", "has to be like postgresql://user:password@host/database"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_and_stays_secret(
    url: str, says: str, run_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KANTHA_DATABASE_URL", url)
    with caplog.at_level(0), pytest.raises(StorageError) as caught:
        open_database(RunDirectory.open(run_path))
    assert says in str(caught.value)
    assert "KANTHA_DATABASE_URL" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert SECRET not in shown


def test_what_the_server_says_is_told(postgres: PostgresServer) -> None:
    database = Database(postgres.url("nowhere"))
    with pytest.raises(StorageError, match=r"the database of KANTHA_DATABASE_URL: .*see that its server runs"):
        database.migrate()


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kantha\[postgresql\]'"):
        Database("postgresql://asha@127.0.0.1/run")
