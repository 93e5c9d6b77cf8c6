"""A stage of small units that Ray workers import: its units can kill their worker or raise, and record attempts."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

from pipelines.cluster.config import WorkersConfig
from pipelines.cluster.units import ray_tasks, run_units
from pipelines.core.config import FrozenConfig, execution_field
from pipelines.core.errors import ThroughlineError
from pipelines.runner.units import StageRun
from tests.plain_stage import plain_stage

NUM_UNITS = 6
NAMES = [f"{number:05d}" for number in range(NUM_UNITS)]


class RayToyConfig(FrozenConfig):
    workers: WorkersConfig = execution_field(WorkersConfig())
    deadly: str | None = execution_field(None)
    """Unit that kills its worker, `deaths` times."""
    deaths: int = execution_field(0)
    notes: str = execution_field()
    """Folder in which each attempt at a unit creates a file."""
    wrong: str | None = execution_field(None)
    """Unit that raises."""
    max_pending: int = execution_field(NUM_UNITS)
    """Units that may have been taken but not finished."""


def produce(run: StageRun[RayToyConfig]) -> None:
    finished: list[str] = []

    def units() -> Iterator[tuple[str, int]]:
        for number, name in enumerate(NAMES):
            assert number - len(finished) < run.config.max_pending, "units are taken faster than they finish"
            yield name, number

    with ray_tasks(run, run.config.workers) as tasks:
        for unit in run_units(run, tasks, units(), make_unit):
            finished.append(unit.name)  # noqa: PERF401 - units() reads it meanwhile


def make_unit(run: StageRun[RayToyConfig], name: str, number: int) -> None:
    config = run.config
    attempts = [path for path in Path(config.notes).iterdir() if path.name.startswith(name)]
    (Path(config.notes) / f"{name}-{len(attempts)}").touch()
    with run.unit(name) as unit:
        unit.write(f"a-{name}.bin", bytes([number]) * 1000, num_rows=3)
        if name == config.deadly and len(attempts) < config.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == config.wrong:
            raise ThroughlineError(f"{run.label}: unit {name} is wrong; fix it")
        unit.write(f"deep/b-{name}.bin", name.encode())
        unit.drop(f"{number:032x}", "odd", "because")
        unit.account(rows_in=4, rows_out=3)


STAGE = plain_stage(name="ray_toy", code_version="1", config_type=RayToyConfig, produce=produce)
