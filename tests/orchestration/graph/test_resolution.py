import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest

from orchestration.graph.execution import Execution
from orchestration.graph.graph import Graph, Group, Input, Node
from orchestration.graph.resolution import Plan, State
from orchestration.lineage.audit import Auditor
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from tests.orchestration.conftest import NUMBERS, Recorder, execution_of, plan_of
from tests.orchestration.small.stages import SMALL_GRAPH, IndexConfig, KeepConfig, SmallProfile

Materialized = Callable[[], Execution]


def test_parts_are_unknown_until_the_index_is_finished(profile: SmallProfile) -> None:
    plan = plan_of(profile)
    assert plan.partitions("kept") == ()
    assert any("unknown until laion_index" in reason for reason in plan.task("total").blocked_by)


def test_finished_outputs_are_found_without_any_history(profile: SmallProfile, materialize_all: Materialized) -> None:
    materialize_all()
    plan = plan_of(profile)
    assert len(plan.all_tasks()) == 1 + 3 + 1 + 2 + 6 + 1
    assert {plan.state(task) for task in plan.all_tasks()} == {State.FINISHED}


def test_ends_are_the_finished_outputs_of_the_leaves(profile: SmallProfile, materialize_all: Materialized) -> None:
    plan = materialize_all().plan
    assert [output.manifest.stage for output in plan.finished_ends()] == ["table"]
    without_table = Graph(tuple(node for node in plan.graph.nodes.values() if node.name != "table"))
    ends = Plan(without_table, profile, profile.output_root).finished_ends()
    assert [output.manifest.stage for output in ends] == ["judged"] * 6


def test_each_partition_reads_its_own_upstream_partitions(profile: SmallProfile, materialize_all: Materialized) -> None:
    plan = materialize_all().plan
    for key, strategy in {"uniform|geneval": "uniform", "time_wise+shift|drawbench": "time_wise"}.items():
        output = plan.task("judged", key).output
        assert output is not None
        assert json.loads(output.path("inputs.json").read_bytes()) == [key, {"fit": [strategy]}]
    fit = plan.task("fit", "uniform").output
    assert fit is not None
    assert json.loads(fit.path("inputs.json").read_bytes())[1] == {"total": [None], "kept": list(NUMBERS)}


def test_a_changed_configuration_makes_its_descendants_stale_and_nothing_else(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    materialize_all()
    profile.keep = KeepConfig(drop_below=6)
    plan = plan_of(profile)
    assert plan.state(plan.task("laion_index")) is State.FINISHED
    assert plan.state(plan.task("kept", "00000")) is State.STALE
    assert plan.state(plan.task("table")) is State.STALE


def test_a_configuration_that_extends_an_earlier_output_gets_it_as_an_input(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    materialize_all()  # drop_below 3

    def earlier(config: FrozenConfig) -> FrozenConfig | None:
        assert isinstance(config, KeepConfig)
        return KeepConfig(drop_below=config.drop_below - 1) if config.drop_below > 3 else None

    nodes = (
        replace(node, incremental_from=earlier) if node.name == "kept" else node for node in SMALL_GRAPH.nodes.values()
    )
    graph = Graph(tuple(nodes))
    first = Plan(graph, profile, profile.output_root).task("kept", "00000")
    assert first.output is not None
    profile.keep = KeepConfig(drop_below=4)
    plan = Plan(graph, profile, profile.output_root)
    task = plan.task("kept", "00000")
    assert task.inputs is not None
    assert [item.ref for item in task.inputs["earlier"]] == [first.output.ref]
    execution = Execution(plan, profile.log_folder)
    (outcome,) = execution.materialize("kept", ["00000"], Recorder())
    assert outcome.task.output is not None
    assert outcome.task.output.manifest.inputs["earlier"] == (first.output.ref,)
    assert Auditor(profile.output_root).audit([outcome.task.output.ref]).passed
    profile.keep = KeepConfig(drop_below=6)
    blocked = Plan(graph, profile, profile.output_root).task("kept", "00000")
    assert blocked.output is None
    assert "the output of kept 00000 that it extends is not finished" in blocked.blocked_by[0]


def test_a_new_part_is_known_once_the_index_is_recomputed(profile: SmallProfile, materialize_all: Materialized) -> None:
    materialize_all()
    profile.index = IndexConfig(numbers={**NUMBERS, "00003": [40]})
    execution = execution_of(profile)
    assert execution.plan.parts() == ()
    execution.materialize("laion_index", [None], Recorder())
    assert execution.plan.parts() == ("00000", "00001", "00002", "00003")


@pytest.mark.parametrize(
    ("change", "states"),
    [
        ({"00000": [1, 2, 30], "0": [8]}, {"0": State.MISSING, "00000": State.FINISHED}),
        ({"00000": [1, 2, 30], "00001": [5, 8]}, {"00000": State.FINISHED, "00001": State.STALE}),
        ({"00002": [9]}, {"00002": State.FINISHED}),
    ],
    ids=["added", "changed", "removed"],
)
def test_a_part_is_stale_exactly_if_its_own_entry_changed(
    profile: SmallProfile, materialize_all: Materialized, change: dict[str, list[int]], states: dict[str, State]
) -> None:
    materialize_all()
    profile.index = IndexConfig(numbers=change)
    execution = execution_of(profile)
    execution.materialize("laion_index", [None], Recorder())
    plan = execution.plan
    assert {task.partition: plan.state(task) for task in plan.tasks("kept")} == states
    assert plan.state(plan.task("total")) is State.STALE


def test_a_damaged_output_counts_as_unfinished(profile: SmallProfile, materialize_all: Materialized) -> None:
    output = materialize_all().plan.task("total").output
    assert output is not None
    output.path("total.json").write_bytes(b"")
    plan = plan_of(profile)
    assert plan.task("total").output is None
    assert plan.task("table").blocked_by


def test_an_output_with_a_flipped_byte_is_recomputed_if_the_profile_compares_bytes(
    profile: SmallProfile, materialize_all: Materialized
) -> None:
    output = materialize_all().plan.task("total").output
    assert output is not None
    path = output.path("total.json")
    intact = path.read_bytes()
    path.write_bytes(bytes([intact[0] ^ 1]) + intact[1:])
    assert plan_of(profile).task("total").output is not None, "sizes alone do not reveal it"
    profile.verify = "digest"
    execution = execution_of(profile)
    assert execution.plan.task("total").output is None
    execution.materialize("total", [None], Recorder())
    assert path.read_bytes() == intact


def test_deleting_dagsters_storage_loses_nothing(profile: SmallProfile, materialize_all: Materialized) -> None:
    materialize_all()
    shutil.rmtree(profile.home / "dagster", ignore_errors=True)
    assert plan_of(profile).task("table").output is not None


def test_graph_rejects_an_input_that_comes_later() -> None:
    node = Node(
        name="a",
        module="m",
        group=Group.DATA,
        configure=lambda profile, _: KeepConfig(),
        inputs=(Input(name="b", asset="b"),),
    )
    with pytest.raises(ValueError, match="a reads b"):
        Graph((node, replace(node, name="b", inputs=())))


def test_graph_rejects_a_single_file_of_a_partitioned_asset(profile: SmallProfile) -> None:
    nodes = plan_of(profile).graph.nodes
    reader = replace(nodes["fit"], inputs=(Input(name="kept", asset="kept", file="{partition}.json"),))
    with pytest.raises(ValueError, match="fit reads one file of kept, which is partitioned"):
        Graph((nodes["laion_index"], nodes["kept"], reader))


def test_selection_follows_the_edges(profile: SmallProfile) -> None:
    graph = plan_of(profile).graph
    assert [node.name for node in graph.select("fit")] == ["fit"]
    assert [node.name for node in graph.select("+total")] == ["laion_index", "kept", "total"]
    assert [node.name for node in graph.select("judged+")] == ["judged", "table"]
    assert [node.name for node in graph.select("group:evaluation")] == ["judged", "table"]
    with pytest.raises(ThroughlineError, match=r"no asset 'fitt'.*it has: laion_index, kept"):
        graph.select("fitt")
