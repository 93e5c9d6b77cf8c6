"""The functions of the small stages, and their graph."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

from orchestration.graph.graph import Graph, Group, Input, Node, PartitionKind
from orchestration.launch.launcher import LaunchForm, LocalLaunch
from pipelines.core.config import FrozenConfig, execution_field
from pipelines.core.errors import ThroughlineError
from pipelines.laion.index import ENTRY_FILE
from pipelines.runner.units import StageResult, StageRun


class IndexConfig(FrozenConfig):
    numbers: dict[str, list[int]]


class KeepConfig(FrozenConfig):
    drop_below: int = 0
    fail_at: str | None = execution_field(None)
    crash_at: str | None = execution_field(None)
    kill_at: str | None = execution_field(None)
    starts: str | None = execution_field(None)


class PlainConfig(FrozenConfig):
    factor: int = 1


def make_index(run: StageRun[IndexConfig]) -> StageResult:
    with run.unit("parts") as unit:
        for part, numbers in run.config.numbers.items():
            unit.write(ENTRY_FILE.format(partition=part), json.dumps(numbers).encode())
        total = sum(len(numbers) for numbers in run.config.numbers.values())
        unit.account(rows_in=total, rows_out=total)
    return StageResult(summary={"num_parts": len(run.config.numbers)})


def keep(run: StageRun[KeepConfig]) -> None:
    """Keep the numbers of a part that are large enough; append one line per call to the file `starts`."""
    config = run.config
    if config.starts:
        with Path(config.starts).open("a") as stream:
            stream.write(f"{os.getpid()} {run.partition}\n")
    if config.fail_at == run.partition:
        raise ThroughlineError(f"part {run.partition}: expected even numbers, found 3; fix the part and run again")
    if config.kill_at == run.partition:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.crash_at == run.partition:
        raise RuntimeError("a bug of the stage")
    numbers = json.loads(run.input("index").address.read_bytes())
    kept = [number for number in numbers if number >= config.drop_below]
    with run.progress(len(numbers), "numbers") as progress, run.unit("00000") as unit:
        for number in numbers:
            if number not in kept:
                unit.drop(f"{number:032x}", "too_small")
            progress.advance()
        unit.write("kept.json", json.dumps(kept).encode(), num_rows=len(kept))
        unit.account(rows_in=len(numbers), rows_out=len(kept))


def add_up(run: StageRun[PlainConfig]) -> StageResult:
    total = sum(sum(json.loads(item.path("kept.json").read_bytes())) for item in run.inputs["kept"])
    with run.unit("total") as unit:
        unit.write("total.json", json.dumps(total * run.config.factor).encode())
    return StageResult(summary={"total": total})


def note_inputs(run: StageRun[PlainConfig]) -> None:
    """Write the partitions of the inputs."""
    names = {name: [item.manifest.partition for item in items] for name, items in run.inputs.items()}
    with run.unit("inputs") as unit:
        unit.write("inputs.json", json.dumps([run.partition, names]).encode())


@dataclass
class SmallProfile:
    """The attributes of a profile that the plan and the launcher use."""

    home: Path
    index: IndexConfig
    keep: KeepConfig = field(default_factory=KeepConfig)
    plain: PlainConfig = field(default_factory=PlainConfig)
    strategy_names: tuple[str, ...] = ("uniform", "time_wise")
    arm_names: tuple[str, ...] = ("uniform", "time_wise", "time_wise+shift")
    benchmarks: tuple[str, ...] = ("geneval", "drawbench")
    batch: int = 3
    name: str = "small"
    verify: str = "size"
    lock_wait_seconds: float | None = None
    check_bytes: bool = True

    @property
    def output_root(self) -> Path:
        return self.home / "outputs"

    @property
    def log_folder(self) -> Path:
        return self.home / "logs"

    def launch(self, stage: str) -> LaunchForm:
        return LocalLaunch()

    def partitions_per_run(self, stage: str) -> int:
        return self.batch

    def resolved(self, config: FrozenConfig) -> FrozenConfig:
        return config


SMALL_GRAPH = Graph(
    (
        Node(
            name="laion_index",
            module="tests.orchestration.small.index",
            group=Group.DATA,
            configure=lambda profile, _: profile.index,
        ),
        Node(
            name="kept",
            module="tests.orchestration.small.kept",
            group=Group.DATA,
            configure=lambda profile, _: profile.keep,
            partition=PartitionKind.PART,
            inputs=(Input(name="index", asset="laion_index", file=ENTRY_FILE),),
        ),
        Node(
            name="total",
            module="tests.orchestration.small.total",
            group=Group.DATA,
            configure=lambda profile, _: profile.plain,
            inputs=(Input(name="index", asset="laion_index"), Input(name="kept", asset="kept")),
        ),
        Node(
            name="fit",
            module="tests.orchestration.small.fit",
            group=Group.TRAINING,
            configure=lambda profile, _: PlainConfig(),
            partition=PartitionKind.STRATEGY,
            inputs=(Input(name="total", asset="total"), Input(name="kept", asset="kept", is_dagster_dep=False)),
        ),
        Node(
            name="judged",
            module="tests.orchestration.small.judged",
            group=Group.EVALUATION,
            configure=lambda profile, _: PlainConfig(),
            partition=PartitionKind.ARM_BENCHMARK,
            inputs=(Input(name="fit", asset="fit"),),
        ),
        Node(
            name="table",
            module="tests.orchestration.small.table",
            group=Group.EVALUATION,
            configure=lambda profile, _: PlainConfig(),
            inputs=(Input(name="judged", asset="judged"),),
        ),
    )
)
