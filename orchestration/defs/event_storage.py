"""Selects Dagster's storage of runs, events and schedules: SQLite in its folder, or PostgreSQL by environment variable.

Once a folder is set up for PostgreSQL, its dagster.yaml records that, without the address: a user who has not set the
variable gets an error instead of a second, separate history in SQLite.
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
# Runs, events and schedules are stored in PostgreSQL, at the address in {POSTGRES_URL}.
storage:
  custom:
    module: {_MODULE}
    class: PostgresStorage
"""
_SECTIONS = ("storage", "run_storage", "event_log_storage", "schedule_storage")
_DRIVERS = ("postgresql", "postgresql+psycopg2")
_CONNECT_SECONDS = 10
_SETUP_LOCK_KEY = 0x7468726F7567686C
"""Key of the advisory lock: "throughl" in ASCII."""


class Storage(StrEnum):
    """Where Dagster stores its history."""

    SQLITE = "SQLite"
    POSTGRES = "PostgreSQL"
    CUSTOM = "custom"
    """A storage that the user configured in dagster.yaml."""


def named_storage(configuration: Path) -> Storage:
    """Return the storage in a dagster.yaml; SQLite, Dagster's default, if it configures none or does not exist."""
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
    return Storage.POSTGRES if _MODULE in str(sections) else Storage.CUSTOM


def agreed_storage(configuration: Path) -> Storage:
    """Return the storage to use; raises ThroughlineError if environment and dagster.yaml contradict each other."""
    named, url = named_storage(configuration), postgres_url()
    if url is not None and named is Storage.CUSTOM:
        raise ThroughlineError(
            f"{configuration}: configures a storage, but {POSTGRES_URL} is set; unset the variable, or remove the "
            "storage from the file"
        )
    if url is None and named is Storage.POSTGRES:
        raise ThroughlineError(
            f"{configuration}: this installation stores its runs in PostgreSQL, but {POSTGRES_URL} is not set; set it, "
            "or remove the section `storage` from the file to start a new history in SQLite"
        )
    return Storage.POSTGRES if url is not None else named


@contextmanager
def exclusive_setup() -> Iterator[None]:
    """Keep other processes from creating the tables of a new PostgreSQL database while the block runs.

    Raises ThroughlineError if the extra is missing, the address is wrong or the server does not respond.
    """
    import sqlalchemy

    with _connection() as connection:
        # A transaction-level lock also works through a connection pooler.
        connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SETUP_LOCK_KEY})
        yield


def describe_storage(folder: Path) -> str:
    """Query the storage of Dagster's folder and return one line about it; raises ThroughlineError if it does not
    respond."""
    configuration = folder / "dagster.yaml"
    storage = agreed_storage(configuration)
    if storage is Storage.CUSTOM:
        return f"Dagster stores its runs as configured in {configuration}"
    if storage is Storage.POSTGRES:
        with _connection() as connection:
            version = ".".join(str(number) for number in connection.dialect.server_version_info or ())
            where = _redacted(address())
        return f"Dagster stores its runs in PostgreSQL, {where}; the server responds (version {version})"
    database = folder / "history" / "runs.db"
    if not database.is_file():
        return f"Dagster will store its runs in SQLite, under {folder}"
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened:
            (num_runs,) = opened.execute("SELECT COUNT(*) FROM runs").fetchone()
    except sqlite3.Error as error:
        raise ThroughlineError(f"{database}: Dagster's SQLite is not readable ({error})") from error
    return f"Dagster stores its runs in SQLite, under {folder}; it is readable ({num_runs} runs)"


def address() -> "URL":
    """Return the address of the PostgreSQL server; raises ThroughlineError, without the value, if it is invalid."""
    import sqlalchemy

    try:
        url = sqlalchemy.make_url(postgres_url() or "")
    except (sqlalchemy.exc.ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in _DRIVERS or not url.database or "@" in (url.host or ""):
        # The value is not shown: it may contain a password anywhere.
        raise ThroughlineError(
            f"{POSTGRES_URL}: expected postgresql://user:password@host:5432/database, with any of :/?#@% in the "
            "password as its percent code"
        )
    # SQLAlchemy would choose psycopg 3, whose connections close while dagster-postgres still uses them.
    return url.set(drivername=_DRIVERS[1])


def _redacted(url: "URL") -> str:
    """Return user, server and database, without anything secret."""
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
        raise ThroughlineError(f"PostgreSQL, {_redacted(url)}: {_reason(error, url)}") from error


def _reason(error: Exception, url: "URL") -> str:
    reason = " ".join(str(getattr(error, "orig", None) or error).split())
    return reason.replace(url.password, "***") if url.password else reason
