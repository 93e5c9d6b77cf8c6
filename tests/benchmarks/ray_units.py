"""What Ray costs the data stages: one stage of small units in this process against a Ray on this machine.

python -m tests.benchmarks.ray_units [--units 100] [--milliseconds 100]
"""

import argparse
import tempfile
import time
from pathlib import Path

from pipelines.cluster.config import WorkersConfig
from pipelines.cluster.units import ray_tasks, run_units
from pipelines.core.config import FrozenConfig, execution_field
from pipelines.runner.units import StageRun
from tests.benchmarks.record import write_results
from tests.plain_stage import plain_stage


class BenchmarkConfig(FrozenConfig):
    units: int
    seconds: float
    """Processor time of a unit."""
    workers: WorkersConfig = execution_field(WorkersConfig())


def produce(run: StageRun[BenchmarkConfig]) -> None:
    with ray_tasks(run, run.config.workers) as tasks:
        units = ((f"{number:05d}", number) for number in range(run.config.units))
        for _ in run_units(run, tasks, units, make_unit):
            pass


def make_unit(run: StageRun[BenchmarkConfig], name: str, number: int) -> None:
    end = time.process_time() + run.config.seconds
    while time.process_time() < end:
        number += 1
    with run.unit(name) as unit:
        unit.write(f"{name}.bin", bytes(100_000))


STAGE = plain_stage(name="ray_units", code_version="1", config_type=BenchmarkConfig, produce=produce)


def main() -> None:
    """Measure empty units and units of work, here and on Ray, after Ray's start; print seconds."""
    from tests.benchmarks.ray_units import STAGE as stage  # not this module as __main__: workers import it

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--milliseconds", type=int, default=100)
    args = parser.parse_args()
    on_ray = WorkersConfig(ray_address="local")

    def seconds(units: int, milliseconds: float, workers: WorkersConfig) -> float:
        config = stage.config_type(units=units, seconds=milliseconds / 1000, workers=workers)
        with tempfile.TemporaryDirectory() as root:
            started = time.monotonic()
            stage.run(config, {}, Path(root))
            return time.monotonic() - started

    start = seconds(1, 0, on_ray)
    again = seconds(1, 0, on_ray)
    seconds(2 * args.units // 10, 10, on_ray)  # all workers are up
    empty_here, empty_on_ray = (seconds(args.units, 0, workers) for workers in (WorkersConfig(), on_ray))
    here, there = (seconds(args.units, args.milliseconds, workers) for workers in (WorkersConfig(), on_ray))
    write_results(
        "ray_units",
        {
            "units": args.units,
            "first stage of one unit, Ray's start in it, s": round(start, 2),
            "next stage of one unit, s": round(again, 2),
            "empty units here, ms each": round(1000 * empty_here / args.units, 2),
            "empty units on Ray, ms each": round(1000 * empty_on_ray / args.units, 2),
            f"units of {args.milliseconds} ms here, s": round(here, 2),
            f"units of {args.milliseconds} ms on Ray, s": round(there, 2),
        },
    )


if __name__ == "__main__":
    main()
