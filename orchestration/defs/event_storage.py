"""Where Dagster keeps runs, events and schedules: SQLite in its folder, or the PostgreSQL that the environment names.

Once a folder is set up for PostgreSQL its dagster.yaml says so, without the address: a colleague who has not set the
variable is told, and never begins a second history in SQLite beside the first.
"""

import importlib.util
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.environment import POSTGRES_URL, postgres_url
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection, Engine

INSTALL = "pip install 'throughline[postgres]'"
_MODULE = "orchestration.defs.postgres"
POSTGRES_SECTION = f"""\
# Runs, events and schedules are kept in PostgreSQL, at the address that {POSTGRES_URL} holds.
storage:
  custom:
    module: {_MODULE}
    class: PostgresStorage
"""
_SECTIONS = ("storage", "run_storage", "event_log_storage", "schedule_storage")
_DRIVERS = ("postgresql", "postgresql+psycopg2")
_CONNECT_SECONDS = 10
_SET_UP_KEY = 0x7468726F7567686C
"""Of the advisory lock; "throughl" in ASCII."""


class Storage(StrEnum):
    """What Dagster keeps its history in."""

    SQLITE = "SQLite"
    POSTGRES = "PostgreSQL"
    OWN = "its own"
    """A storage that a person wrote into dagster.yaml."""


def named_storage(configuration: Path) -> Storage:
    """Return what a dagster.yaml names; SQLite is what Dagster takes where it names nothing or is not there."""
    import yaml

    try:
        content = yaml.safe_load(configuration.read_text()) or {}
    except FileNotFoundError:
        return Storage.SQLITE
    except yaml.YAMLError as error:
        raise ThroughlineError(f"{configuration}: not readable as YAML ({' '.join(str(error).split())})") from error
    sections = {name: content[name] for name in _SECTIONS if name in content}
    if not sections:
        return Storage.SQLITE
    return Storage.POSTGRES if _MODULE in str(sections) else Storage.OWN


def agreed_storage(configuration: Path) -> Storage:
    """Return the storage to use; raises ThroughlineError where environment and dagster.yaml contradict each other."""
    named, url = named_storage(configuration), postgres_url()
    if url is not None and named is Storage.OWN:
        raise ThroughlineError(
            f"{configuration}: names a storage of its own, and {POSTGRES_URL} is set; unset the variable, or take the "
            "storage out of the file"
        )
    if url is None and named is Storage.POSTGRES:
        raise ThroughlineError(
            f"{configuration}: this installation keeps its runs in PostgreSQL, and {POSTGRES_URL} is not set; set it, "
            "or take the section `storage` out of the file to begin a new history in SQLite"
        )
    return Storage.POSTGRES if url is not None else named


@contextmanager
def set_up_alone() -> Iterator[None]:
    """Keep other processes from creating the tables of a new PostgreSQL database while the block runs.

    Raises ThroughlineError where the extra is missing, the address is wrong or the server does not answer.
    """
    import sqlalchemy

    with _connection() as connection:
        # A transaction's lock, which a connection pooler in front of the server understands too.
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SET_UP_KEY})
        yield


def described_storage(folder: Path) -> str:
    """Ask the storage of Dagster's folder something and return one line about it; raises ThroughlineError where it
    does not answer."""
    configuration = folder / "dagster.yaml"
    storage = agreed_storage(configuration)
    if storage is Storage.OWN:
        return f"Dagster keeps its runs as {configuration} says"
    if storage is Storage.POSTGRES:
        with _connection() as connection:
            version = ".".join(str(number) for number in connection.dialect.server_version_info or ())
            return f"Dagster keeps its runs in PostgreSQL, {_shown(address())}; the server answers (version {version})"
    database = folder / "history" / "runs.db"
    if not database.is_file():
        return f"Dagster keeps its runs in SQLite, under {folder}, from the first run on"
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
            (num_runs,) = opened.execute("SELECT COUNT(*) FROM runs").fetchone()
    except sqlite3.Error as error:
        raise ThroughlineError(f"{database}: Dagster's SQLite does not answer ({error})") from error
    return f"Dagster keeps its runs in SQLite, under {folder}; it answers ({num_runs} runs)"


def address() -> "URL":
    """Return the address of the PostgreSQL; raises ThroughlineError where it is none, without repeating it."""
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(postgres_url() or "")
    except (sqlalchemy.exc.ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in _DRIVERS or not url.database or "@" in (url.host or ""):
        # What was given is not repeated: a password may stand anywhere in it.
        raise ThroughlineError(
            f"{POSTGRES_URL}: expected postgresql://user:password@host:5432/database, with any of :/?#@% in the "
            "password as its percent code"
        )
    # SQLAlchemy would take psycopg 3, whose connections close where dagster-postgres goes on using them.
    return url.set(drivername=_DRIVERS[1])


def _shown(url: "URL") -> str:
    """Return user, server and database, and nothing that may be secret."""
    host = url.host or url.query.get("host") or "this machine"
    return f"database {url.database} of user {url.username or 'unnamed'} at {host}:{url.port or 5432}"


@contextmanager
def _connection() -> "Iterator[Connection]":
    import sqlalchemy

    missing = [name for name in ("dagster_postgres", "psycopg2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ThroughlineError(f"{POSTGRES_URL} is set, but {missing[0]} is not installed; install it with: {INSTALL}")
    url = address()
    timeout: dict[str, Any] = {} if "connect_timeout" in url.query else {"connect_timeout": _CONNECT_SECONDS}
    engine: Engine = sqlalchemy.create_engine(url, connect_args=timeout, poolclass=sqlalchemy.pool.NullPool)
    try:
        with engine.begin() as connection:
            yield connection
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise ThroughlineError(f"PostgreSQL, {_shown(url)}: {_reason(error, url)}") from error


def _reason(error: Exception, url: "URL") -> str:
    said = " ".join(str(getattr(error, "orig", None) or error).split())
    return said.replace(url.password, "***") if url.password else said
