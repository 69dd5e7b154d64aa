"""The tables' history: each revision brings the tables of the one before up to date, through Alembic."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from kantha.errors import NewerRunError

HERE = Path(__file__).parent


def config_for(connection: Connection) -> Config:
    """What Alembic's commands need to work on this connection, in its transaction."""
    config = Config()
    config.set_main_option("script_location", str(HERE).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def is_newest(connection: Connection, name: str) -> bool:
    """Whether the tables are those of this program. Raises `NewerRunError` where it does not know them.

    :param name: of the database, for the error
    """
    version = MigrationContext.configure(connection).get_current_revision()
    if version is None:
        return False
    try:
        _scripts().get_revision(version)
    except CommandError:
        raise NewerRunError(
            f"{name}: written by a newer Kantha (tables {version}, this one has {_scripts().get_current_head()}); "
            "update with `pip install --upgrade kantha`"
        ) from None
    return version == _scripts().get_current_head()


def upgrade(connection: Connection, name: str) -> None:
    """Raises as `is_newest`."""
    if not is_newest(connection, name):
        command.upgrade(config_for(connection), "head")


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(HERE))
