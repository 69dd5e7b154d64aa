"""For developers: `python -m kantha.coordinator.migrations "what is new"` writes a revision of what changed in the
tables since the last one. Read it before it is committed: Alembic sees no renaming, and moves no data.
"""

import argparse
import importlib
import tempfile
from pathlib import Path
from pkgutil import iter_modules

from alembic import command

import kantha.coordinator
from kantha.coordinator.database import Database
from kantha.coordinator.migrations import HERE, config_for


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kantha.coordinator.migrations", description=__doc__)
    parser.add_argument("what", help="is new, in a few words: the name of the revision")
    what = parser.parse_args().what
    for module in iter_modules(kantha.coordinator.__path__):
        if not module.ispkg:
            importlib.import_module(f"kantha.coordinator.{module.name}")
    number = 1 + max((int(path.name[:4]) for path in (HERE / "versions").glob("[0-9]*.py")), default=0)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "ledger.sqlite")
        if number > 1:
            database.migrate()
        with database.session() as session:
            command.revision(config_for(session.connection()), what, autogenerate=True, rev_id=f"{number:04d}")
        database.close()


if __name__ == "__main__":
    main()
