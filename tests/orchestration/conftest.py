import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dagster import DagsterInstance

from orchestration.defs.instance import open_instance
from orchestration.graph.execution import Execution
from orchestration.graph.resolution import Plan
from tests.orchestration.small.stages import SMALL_GRAPH, IndexConfig, KeepConfig, SmallProfile

NUMBERS = {"00000": [1, 2, 30], "00001": [5, 7], "00002": [9]}


@pytest.fixture
def profile(tmp_path: Path) -> SmallProfile:
    return SmallProfile(home=tmp_path / "home", index=IndexConfig(numbers=NUMBERS))


@pytest.fixture
def instance(profile: SmallProfile, monkeypatch: pytest.MonkeyPatch) -> Iterator[DagsterInstance]:
    """A persistent Dagster instance as the command line sets it up."""
    monkeypatch.setenv("DAGSTER_HOME", str(profile.home / "dagster"))
    with open_instance(profile.home) as opened:
        yield opened


def plan_of(profile: SmallProfile) -> Plan:
    return Plan(SMALL_GRAPH, profile, profile.output_root)


def execution_of(profile: SmallProfile) -> Execution:
    return Execution(plan_of(profile), profile.log_folder)


class Recorder:
    """Records the events of an observer."""

    def __init__(self) -> None:
        self.records: list[dict] = []
        self.lines: list[str] = []

    def progress(self, record: dict) -> None:
        self.records.append(record)

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="session")
def finished_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of every task of the small graph, computed once by real processes."""
    profile = SmallProfile(
        home=tmp_path_factory.mktemp("finished"), index=IndexConfig(numbers=NUMBERS), keep=KeepConfig(drop_below=3)
    )
    execution = execution_of(profile)
    for name in execution.plan.graph.nodes:
        execution.materialize(name, execution.plan.partitions(name), Recorder())
    return profile.output_root


@pytest.fixture
def materialize_all(profile: SmallProfile, finished_outputs: Path) -> Callable[[], Execution]:
    """Copies all finished outputs into the profile's home, and returns an execution over them."""

    def copy_outputs() -> Execution:
        profile.keep = KeepConfig(drop_below=3)
        shutil.copytree(finished_outputs, profile.output_root)
        return execution_of(profile)

    return copy_outputs
