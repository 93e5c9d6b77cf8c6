"""Sets up and opens Dagster's own storage. Losing it loses history, never provenance."""

import os
import platform
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.defs.event_storage import POSTGRES_SECTION, Storage, agreed_storage, exclusive_setup, named_storage
from pipelines.core.atomic import exclusive, write_bytes

if TYPE_CHECKING:
    from dagster import DagsterInstance

_PROCESS_TAG = "throughline/process"
_CONFIGURATION = """\
# Written once by throughline; edit it freely.
telemetry:
  enabled: false
nux:
  enabled: false
# A stage may use the whole machine: one run at a time, others wait in the queue.
concurrency:
  runs:
    max_concurrent_runs: 1
"""


def dagster_home(home: Path) -> Path:
    """Return the folder of Dagster's storage: DAGSTER_HOME if set, else a folder under `home`."""
    named = os.environ.get("DAGSTER_HOME")
    return Path(named).absolute() if named else home / "dagster"


def prepare_dagster_home(home: Path) -> Path:
    """Create Dagster's folder with its configuration if it is missing, and set DAGSTER_HOME.

    If the environment names a PostgreSQL server, it is entered into the configuration. Raises ThroughlineError if the
    two contradict each other.
    """
    folder = dagster_home(home)
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "dagster.yaml"
    storage = agreed_storage(configuration)
    text = configuration.read_text() if configuration.exists() else _CONFIGURATION
    if storage is Storage.POSTGRES and named_storage(configuration) is Storage.SQLITE:
        text = f"{text.rstrip()}\n{POSTGRES_SECTION}"
        write_bytes(configuration, text.encode())
    elif not configuration.exists():
        write_bytes(configuration, text.encode())
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


def open_instance(home: Path) -> "DagsterInstance":
    """Return the persistent instance under `home`.

    Raises ThroughlineError if its PostgreSQL server can't be reached.
    """
    from dagster import DagsterInstance

    folder = prepare_dagster_home(home)
    storage = agreed_storage(folder / "dagster.yaml")
    # Two processes that create its tables at the same time would fail.
    alone = exclusive(folder / "opening.lock")
    with alone, exclusive_setup() if storage is Storage.POSTGRES else nullcontext():
        instance = DagsterInstance.get()
    _close_dead_runs(instance)
    return instance


def process_tags() -> dict[str, str]:
    """Return run tags that name this process."""
    return {_PROCESS_TAG: f"{platform.node()} {os.getpid()}"}


def _close_dead_runs(instance: "DagsterInstance") -> None:
    """Mark the runs of killed command-line processes as failed; otherwise they would block the queue forever."""
    from dagster import DagsterRunStatus, RunsFilter

    for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED, DagsterRunStatus.STARTING])):
        host, _, pid = run.tags.get(_PROCESS_TAG, "").partition(" ")
        if host == platform.node() and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            instance.report_run_failed(run, "its process was killed")
