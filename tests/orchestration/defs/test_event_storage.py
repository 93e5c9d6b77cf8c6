import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.cli.doctor import Level, _storage
from orchestration.defs.event_storage import describe_storage
from orchestration.defs.instance import open_instance, prepare_dagster_home
from pipelines.core.environment import POSTGRES_URL
from pipelines.core.errors import ThroughlineError
from tests.orchestration.conftest import NUMBERS
from tests.orchestration.defs.postgres import PASSWORD, USER, PostgresServer, free_port, running_postgres
from tests.orchestration.lineage.test_sharing import ROOT, run_two_at_once, versions
from tests.orchestration.small.stages import IndexConfig, SmallProfile

NOWHERE = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:1/postgres"
READ_BACK = """
import json
from dagster import DagsterEventType, DagsterInstance

runs = []
with DagsterInstance.get() as instance:
    for run in instance.get_runs():
        entries = instance.all_logs(run.run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION)
        events = [entry.asset_materialization for entry in entries]
        made = [[item.asset_key.path[0], item.partition, item.tags["dagster/data_version"]] for item in events]
        runs.append([run.status.value, len(instance.all_logs(run.run_id)), made])
    parts = instance.get_dynamic_partitions("part")
print(json.dumps([runs, parts]))
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))
    monkeypatch.delenv(POSTGRES_URL, raising=False)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_postgres() as running:
        yield running


def files_with(folder: Path, word: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


@pytest.mark.slow
def test_two_concurrent_runs_are_stored_in_postgresql_and_read_by_another_process(
    tmp_path: Path, home: Path, server: PostgresServer, finished_outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(POSTGRES_URL, server.create_database("two_runs"))
    outputs_of_runs = run_two_at_once(tmp_path, home)
    assert versions(home / "outputs") == versions(finished_outputs)
    assert list(home.rglob("*.db")) == [], "nothing is written to SQLite"
    assert files_with(home, PASSWORD) == []
    assert not any(PASSWORD in text for text in outputs_of_runs)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "dagster.yaml").write_text((home / "dagster" / "dagster.yaml").read_text())
    environment = os.environ | {"DAGSTER_HOME": str(elsewhere)}
    done = subprocess.run(
        [sys.executable, "-c", READ_BACK], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    runs, parts = json.loads(done.stdout)
    assert parts == list(NUMBERS)
    assert [status for status, _, _ in runs] == ["SUCCESS", "SUCCESS"]
    # Files that are read one by one are recorded too, as separate assets.
    outputs = [entry for _, _, made in runs for entry in made if not entry[0].endswith("_parts")]
    recorded = {f"{stage} {partition} {version}" for stage, partition, version in outputs}
    assert recorded == versions(home / "outputs")
    assert all(num_events > len(made) > 0 for _, num_events, made in runs)


@pytest.mark.slow
def test_a_wrong_address_fails_with_one_sentence_without_the_password(
    home: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {
        server.url(password="guess-it"): f'password authentication failed for user "{USER}"',
        server.url(database="absent"): 'database "absent" does not exist',
        f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{free_port()}/postgres": "Connection refused",
        f"mysql://{USER}:{PASSWORD}@127.0.0.1/d": "expected postgresql://user:password@host:5432/database",
        f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{PASSWORD}/d": "expected postgresql://user:password@host",
        f"postgresql://{USER}:a@{PASSWORD}@127.0.0.1/d": "expected postgresql://user:password@host",
        PASSWORD: "expected postgresql://user:password@host",
    }
    for address, sentence in wrong.items():
        monkeypatch.setenv(POSTGRES_URL, address)
        with pytest.raises(ThroughlineError) as caught, open_instance(home):
            pass
        message = str(caught.value)
        assert sentence in message
        assert "\n" not in message
        assert not any(secret in message for secret in (PASSWORD, "guess-it"))
    assert list(home.rglob("*.db")) == []
    assert files_with(home, PASSWORD) == []


@pytest.mark.slow
def test_the_command_line_prints_the_error_last(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment = os.environ | {"THROUGHLINE_HOME": str(home), POSTGRES_URL: NOWHERE}
    command = [
        sys.executable,
        "-m",
        "orchestration.cli.main",
        "run",
        "--profile",
        "single_gpu",
        "--select",
        "laion_index",
    ]
    done = subprocess.run(
        [*command, "--set", f'source=["{tmp_path}"]'], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: PostgreSQL, database postgres of user {USER} at 127.0.0.1:1: connection to server")
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stderr


@pytest.mark.slow
def test_doctor_reports_the_storage_and_whether_it_responds(
    home: Path, server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = SmallProfile(home=home, index=IndexConfig(numbers=NUMBERS))
    assert _storage(profile).message == f"Dagster will store its runs in SQLite, under {home / 'dagster'}"
    with open_instance(home):
        pass
    assert (
        _storage(profile).message
        == f"Dagster stores its runs in SQLite, under {home / 'dagster'}; it is readable (0 runs)"
    )
    monkeypatch.setenv(POSTGRES_URL, server.url())
    diagnostic = _storage(profile)
    assert diagnostic.level is Level.GOOD
    assert (
        f"in PostgreSQL, database postgres of user {USER} at 127.0.0.1:{server.port}; the server" in diagnostic.message
    )
    monkeypatch.setenv(POSTGRES_URL, NOWHERE)
    assert _storage(profile).level is Level.BAD
    (home / "dagster" / "history" / "runs.db").write_bytes(b"not a database" * 100)
    monkeypatch.delenv(POSTGRES_URL)
    assert "SQLite is not readable" in _storage(profile).message


def test_a_missing_extra_fails_with_the_command_that_installs_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POSTGRES_URL, NOWHERE)
    monkeypatch.setitem(sys.modules, "dagster_postgres", None)
    with pytest.raises(ThroughlineError, match="dagster_postgres is not installed; install it with: pip install"):
        open_instance(home)
    diagnostic = _storage(SmallProfile(home=home, index=IndexConfig(numbers=NUMBERS)))
    assert diagnostic.fix == "pip install 'throughline[postgres]'"


def test_a_folder_set_up_for_postgresql_starts_no_second_history(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare_dagster_home(home)
    own = (folder / "dagster.yaml").read_text() + "retention:\n  schedule:\n    purge_after_days: 90"
    (folder / "dagster.yaml").write_text(own)
    monkeypatch.setenv(POSTGRES_URL, NOWHERE)
    prepare_dagster_home(home)
    text = (folder / "dagster.yaml").read_text()
    assert text.startswith(own), "the user's own lines are kept"
    prepare_dagster_home(home)
    assert (folder / "dagster.yaml").read_text() == text
    monkeypatch.delenv(POSTGRES_URL)
    with pytest.raises(ThroughlineError, match=f"stores its runs in PostgreSQL, but {POSTGRES_URL} is not set"):
        open_instance(home)
    assert list(home.rglob("*.db")) == []


@pytest.mark.slow
def test_a_storage_that_the_user_configured_is_not_changed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "dagster"
    folder.mkdir(parents=True)
    own = f"storage:\n  sqlite:\n    base_dir: {home / 'sqlite'}\n"
    (folder / "dagster.yaml").write_text(own)
    with open_instance(home):
        pass
    assert (home / "sqlite").is_dir()
    assert describe_storage(folder) == f"Dagster stores its runs as configured in {folder / 'dagster.yaml'}"
    monkeypatch.setenv(POSTGRES_URL, NOWHERE)
    with pytest.raises(ThroughlineError, match="configures a storage, but"):
        open_instance(home)
    assert (folder / "dagster.yaml").read_text() == own
