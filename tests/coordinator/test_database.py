import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from kantha.coordinator.database import Database
from kantha.errors import StorageError


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


def test_what_two_read_before_they_write_is_not_lost(tmp_path: Path) -> None:
    """One reads when the other has written, so that of two instances only one can get the last place."""
    database = Database(tmp_path / "ledger.sqlite")
    with database.session() as session:
        session.execute(text("CREATE TABLE a (b)"))
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
    database.close()


def test_another_program_may_read_while_this_one_writes(tmp_path: Path) -> None:
    database = Database(tmp_path / "ledger.sqlite")
    with database.session() as session:
        session.execute(text("CREATE TABLE a (b)"))
        session.execute(text("INSERT INTO a VALUES (7)"))
    program = (
        "import sys; from pathlib import Path; from sqlalchemy import text\n"
        "from kantha.coordinator.database import Database\n"
        "with Database(Path(sys.argv[1])).reading() as session:\n"
        "    print(session.execute(text('SELECT b FROM a')).scalar())"
    )
    with database.session() as session:
        session.execute(text("UPDATE a SET b = 8"))
        done = subprocess.run(
            [sys.executable, "-c", program, str(database.path)], capture_output=True, text=True, timeout=60, check=False
        )
    assert done.stdout == "7\n", done.stderr
    database.close()
