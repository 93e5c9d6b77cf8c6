from collections.abc import Callable, Sequence

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from orchestration.cli.run import Run
from orchestration.console import Console
from orchestration.definitions import build_definitions
from orchestration.defs.assets import observation
from orchestration.graph.execution import Execution
from orchestration.graph.resolution import State
from orchestration.lineage.audit import Auditor
from tests.orchestration.conftest import NUMBERS, execution_of
from tests.orchestration.small.stages import IndexConfig, KeepConfig, SmallProfile

pytestmark = pytest.mark.slow

Materialized = Callable[[], Execution]
START, END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"


_built: dict[int, tuple[Execution, dg.Definitions]] = {}


def _definitions(execution: Execution) -> dg.Definitions:
    """Build the definitions of an execution once."""
    if id(execution) not in _built:
        _built[id(execution)] = (execution, build_definitions(execution))
    return _built[id(execution)][1]


def _materialize(
    execution: Execution, instance: dg.DagsterInstance, asset: str, keys: Sequence[str | None]
) -> dg.ExecuteInProcessResult:
    """Materialize partitions of an asset in one run, as a backfill from the web interface does."""
    job = _definitions(execution).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(asset)],
        partition_key=keys[0] if len(keys) == 1 else None,
        tags={START: str(keys[0]), END: str(keys[-1])} if len(keys) > 1 else None,
        raise_on_error=False,
    )


def _recorded(instance: dg.DagsterInstance, asset: str, partition: str | None = None) -> dict[str, str]:
    record = instance.get_latest_data_version_record(dg.AssetKey(asset), partition_key=partition)
    assert record is not None and record.asset_materialization is not None
    return dict(record.asset_materialization.tags or {})


def _num_materializations(instance: dg.DagsterInstance, asset: str) -> int:
    return len(instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records)


def _record_all(execution: Execution, instance: dg.DagsterInstance) -> Execution:
    """Materialize every asset of a plan whose outputs are all finished, asset by asset."""
    for asset in execution.plan.graph.nodes:
        assert _materialize(execution, instance, asset, execution.plan.partitions(asset)).success
    return execution


def test_the_index_registers_parts_in_order_and_removes_deleted_ones(
    profile: SmallProfile, instance: dg.DagsterInstance
) -> None:
    assert _materialize(execution_of(profile), instance, "laion_index", [None]).success
    assert instance.get_dynamic_partitions("part") == list(NUMBERS)
    profile.index = IndexConfig(numbers={"00000": [1], "00002": [2], "00003": [3]})
    assert _materialize(execution_of(profile), instance, "laion_index", [None]).success
    assert instance.get_dynamic_partitions("part") == ["00000", "00002", "00003"]


def test_one_run_of_several_partitions_records_each_with_its_own_data_version(
    profile: SmallProfile, instance: dg.DagsterInstance
) -> None:
    execution = execution_of(profile)
    _materialize(execution, instance, "laion_index", [None])
    assert _materialize(execution, instance, "kept", list(NUMBERS)).success
    assert _num_materializations(instance, "kept") == len(NUMBERS)
    versions = {key: _recorded(instance, "kept", key)["dagster/data_version"] for key in NUMBERS}
    assert len(set(versions.values())) == len(NUMBERS)
    for key, version in versions.items():
        output = execution.plan.task("kept", key).output
        assert output is not None and output.data_version == version


def test_provenance_is_the_same_for_one_partition_and_for_several(
    materialize_all: Materialized, instance: dg.DagsterInstance
) -> None:
    execution = materialize_all()
    _materialize(execution, instance, "laion_index", [None])
    _materialize(execution, instance, "kept", ["00000", "00001"])
    together = _recorded(instance, "kept", "00000")
    _materialize(execution, instance, "kept", ["00000"])
    assert _recorded(instance, "kept", "00000") == together


def _statuses(execution: Execution, instance: dg.DagsterInstance) -> dict[str, StaleStatus]:
    graph = _definitions(execution).resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    keys: dict[str, Sequence[str | None]] = {}
    for key in graph.get_all_asset_keys():
        partitions = graph.get(key).partitions_def
        keys[key.to_user_string()] = (
            [None] if partitions is None else partitions.get_partition_keys(dynamic_partitions_store=instance)
        )
    return {
        f"{asset} {partition or ''}".strip(): resolver.get_status(dg.AssetKey(asset), partition)
        for asset, partitions in keys.items()
        for partition in partitions
    }


def test_everything_is_fresh_after_materialization(materialize_all: Materialized, instance: dg.DagsterInstance) -> None:
    execution = _record_all(materialize_all(), instance)
    statuses = _statuses(execution, instance)
    assert {name for name, status in statuses.items() if status is not StaleStatus.FRESH} == set()
    assert len(statuses) == 14 + len(NUMBERS)


def _not_fresh(execution: Execution, instance: dg.DagsterInstance) -> set[str]:
    """Return the data assets that Dagster calls stale or missing."""
    names = ("laion_index", "kept", "total")
    statuses = {name: status for name, status in _statuses(execution, instance).items() if name.startswith(names)}
    return {name for name, status in statuses.items() if status is not StaleStatus.FRESH}


def test_added_changed_and_removed_files_make_their_own_parts_and_the_roll_ups_stale(
    profile: SmallProfile, materialize_all: Materialized, instance: dg.DagsterInstance
) -> None:
    """Dagster and the plan agree before and after, and the audit passes."""
    materialize_all()
    nodes = execution_of(profile).plan.graph.select("+total")
    Run(execution_of(profile), instance, Console()).execute("selected", nodes)
    assert _not_fresh(execution_of(profile), instance) == set()
    changes: list[tuple[dict[str, list[int]], set[str]]] = [
        ({**NUMBERS, "0": [40]}, {"kept 0"}),
        ({**NUMBERS, "0": [40], "00001": [50]}, {"kept 00001"}),
        ({"0": [40], "00001": [50]}, set()),
    ]
    for now, parts in changes:
        profile.index = IndexConfig(numbers=now)
        execution = execution_of(profile)
        assert _materialize(execution, instance, "laion_index", [None]).success
        assert _not_fresh(execution, instance) == parts | {"total"}
        plan = execution.plan
        assert {task.label for task in plan.tasks("kept") if plan.state(task) is not State.FINISHED} == parts
        assert plan.state(plan.task("total")) is State.STALE
        Run(execution, instance, Console()).execute("selected", nodes)
        assert _not_fresh(execution_of(profile), instance) == set()
        total = plan.task("total").output
        assert total is not None and Auditor(plan.output_root).audit([total.ref]).passed


def test_a_part_can_be_recorded_alone(materialize_all: Materialized, instance: dg.DagsterInstance) -> None:
    execution = materialize_all()
    _materialize(execution, instance, "laion_index", [None])
    before = _recorded(instance, "laion_index_parts", "00001")
    for keys in (["00000", "00001"], ["00001"]):
        assert _materialize(execution, instance, "laion_index_parts", keys).success
        assert _recorded(instance, "laion_index_parts", "00001") == before
    assert _num_materializations(instance, "laion_index_parts") == len(NUMBERS) + 3


def test_a_new_checkpoint_makes_its_own_arms_stale_and_no_others(
    materialize_all: Materialized, instance: dg.DagsterInstance
) -> None:
    execution = _record_all(materialize_all(), instance)
    tags = {**_recorded(instance, "fit", "time_wise"), "dagster/data_version": "another"}
    instance.report_runless_asset_event(dg.AssetMaterialization("fit", partition="time_wise", tags=tags))
    stale = {name for name, status in _statuses(execution, instance).items() if status is StaleStatus.STALE}
    assert stale == {
        "judged time_wise|geneval",
        "judged time_wise|drawbench",
        "judged time_wise+shift|geneval",
        "judged time_wise+shift|drawbench",
    }


def test_checks_pass_on_sound_outputs(materialize_all: Materialized, instance: dg.DagsterInstance) -> None:
    execution = materialize_all()
    _materialize(execution, instance, "laion_index", [None])
    result = _materialize(execution, instance, "kept", list(NUMBERS))
    evaluations = {item.check_name: item for item in result.get_asset_check_evaluations()}
    assert set(evaluations) == {"conservation", "digest"}
    assert all(item.passed for item in evaluations.values())
    table = execution.plan.task("kept", "00000").output
    assert table is not None and table.manifest.conservation is not None
    assert table.manifest.conservation.dropped == {"too_small": 2}


def test_progress_is_observed_with_its_numbers_while_the_stage_runs(
    profile: SmallProfile, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.defs.assets._OBSERVE_SECONDS", 0.0)
    execution = execution_of(profile)
    _materialize(execution, instance, "laion_index", [None])
    assert _materialize(execution, instance, "kept", ["00000"]).success
    records = instance.fetch_observations(dg.AssetKey("kept"), limit=100).records
    newest = records[0].asset_observation
    assert newest is not None and newest.partition == "00000"
    numbers = {name: value.value for name, value in newest.metadata.items()}
    assert (numbers["done"], numbers["total"]) == (3, 3) and numbers["per_second"] > 0
    (made,) = instance.fetch_materializations(dg.AssetKey("kept"), limit=100).records
    assert records[-1].storage_id < records[0].storage_id < made.storage_id, "before the output was finished"


def test_an_observation_includes_the_counts_and_reasons_of_a_stage() -> None:
    details = {"ok": 4, "failed": "2 (timeout 2)"}
    record = {"label": "images part-00001", "done": 6, "total": None, "noun": "images", "rate": 2.0, "details": details}
    event = observation("images", record)
    assert event.partition == "part-00001" and observation("images", {**record, "label": "images"}).partition is None
    shown = {name: value.value for name, value in event.metadata.items()}
    assert shown == {"done": 6, "per_second": 2.0, **details}


def test_a_failed_stage_fails_the_run_with_its_own_message(profile: SmallProfile, instance: dg.DagsterInstance) -> None:
    profile.keep = KeepConfig(fail_at="00001")
    execution = execution_of(profile)
    _materialize(execution, instance, "laion_index", [None])
    result = _materialize(execution, instance, "kept", ["00001"])
    failure = next(event for event in result.all_events if event.is_step_failure)
    data = failure.step_failure_data.user_failure_data
    assert data is not None and str(data.description).startswith("part 00001: expected even numbers, found 3")


@pytest.mark.parametrize(
    ("asset", "mapping"),
    [
        ("total", dg.AllPartitionMapping),
        ("judged", dg.StaticPartitionMapping),
        ("table", dg.AllPartitionMapping),
    ],
)
def test_every_edge_between_partition_sets_has_an_explicit_mapping(
    profile: SmallProfile, asset: str, mapping: type
) -> None:
    graph = build_definitions(execution_of(profile)).resolve_asset_graph()
    node = graph.get(dg.AssetKey(asset))
    assert [type(item) for item in node.partition_mappings.values()] == [mapping]


def test_backfill_runs_take_as_many_partitions_as_the_profile_allows(profile: SmallProfile) -> None:
    graph: Callable = build_definitions(execution_of(profile)).resolve_asset_graph().get
    assert graph(dg.AssetKey("kept")).backfill_policy.max_partitions_per_run == profile.batch
