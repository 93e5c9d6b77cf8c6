"""Dagster's assets, made from the graph: each only runs its tasks of the plan and records the outcomes."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
)
from dagster._core.storage.tags import EXTERNALLY_MANAGED_ASSETS_TAG

from orchestration.defs.asset_checks import check_results, check_specs
from orchestration.defs.file_events import (
    dagster_name,
    file_materialization,
    file_result,
    files_asset_name,
    input_tags,
    unrecorded_files,
)
from orchestration.defs.metadata import describe
from orchestration.graph.execution import Execution, Outcome
from orchestration.graph.graph import (
    Coverage,
    Input,
    Node,
    PartitionKind,
    coverage,
    split_arm_benchmark,
    strategy_of_arm,
)
from orchestration.graph.resolution import INDEX, Plan, Task
from pipelines.core.errors import ThroughlineError
from pipelines.core.progress import progress_text
from pipelines.runner.locks import WAITING

PART_PARTITIONS = "part"
"""Name of Dagster's dynamic partitions, one per LAION metadata file; the index registers them."""
_OBSERVE_SECONDS = 60.0
_MAX_PREVIEWS = 64
"""A run of more partitions records no previews, to keep Dagster's database small."""


def partitions_definition(plan: Plan, kind: PartitionKind) -> "dg.PartitionsDefinition | None":
    """Return Dagster's partitions for a kind; parts are dynamic and registered by the index."""
    if kind is PartitionKind.NONE:
        return None
    if kind is PartitionKind.PART:
        return dg.DynamicPartitionsDefinition(name=PART_PARTITIONS)
    # Arm and benchmark are one flat set: Dagster has no mapping from one dimension of a multi-partition to strategies,
    # and without an exact one every arm would turn stale with every checkpoint.
    return dg.StaticPartitionsDefinition(_static_keys(plan, kind))


def _static_keys(plan: Plan, kind: PartitionKind) -> list[str]:
    node = next(node for node in plan.graph.nodes.values() if node.partition is kind)
    return [key for key in plan.partitions(node.name) if key is not None]


def partition_mapping(plan: Plan, upstream: PartitionKind, downstream: PartitionKind) -> "dg.PartitionMapping | None":
    """Return the explicit mapping between two partition sets; None, Dagster's default, only if the upstream asset is
    unpartitioned."""
    rule = coverage(upstream, downstream)
    if rule is Coverage.SAME:
        return dg.IdentityPartitionMapping()
    if rule is Coverage.ALL:
        return dg.AllPartitionMapping()
    if rule is Coverage.STRATEGY_OF_ARM:
        keys: dict[str, set[str]] = {}
        for key in _static_keys(plan, downstream):
            keys.setdefault(strategy_of_arm(split_arm_benchmark(key)[0]), set()).add(key)
        return dg.StaticPartitionMapping({strategy: sorted(group) for strategy, group in keys.items()})
    return None


class LogObserver:
    """Reports a running stage to Dagster: progress and waits in the event log, other lines as captured output.

    Once a minute progress is also recorded as an observation, whose numbers the asset's page plots.
    """

    def __init__(self, context: "dg.AssetExecutionContext | dg.OpExecutionContext", asset: str) -> None:
        self._context, self._asset = context, asset
        self._observed = time.monotonic()

    def progress(self, record: Mapping[str, Any]) -> None:
        self._context.log.info(progress_text(record))
        if time.monotonic() - self._observed >= _OBSERVE_SECONDS:
            self._observed = time.monotonic()
            self._context.log_event(observation(self._asset, record))

    def line(self, text: str) -> None:
        if text.startswith(WAITING):
            self._context.log.info(text)
        print(text, flush=True)


def observation(asset: str, record: Mapping[str, Any]) -> dg.AssetObservation:
    """Return the observation of a progress record: done, total, rate, and the stage's own counts."""
    partition = str(record["label"]).removeprefix(asset).strip() or None
    numbers = {"done": record["done"], "total": record.get("total"), "per_second": record.get("rate")}
    shown = {name: value for name, value in {**numbers, **(record.get("details") or {})}.items() if value is not None}
    return dg.AssetObservation(asset, partition=partition, description=progress_text(record), metadata=shown)


def build_asset(node: Node, execution: Execution) -> dg.AssetsDefinition:
    """Return the asset of a node."""
    plan = execution.plan
    spec = dg.AssetSpec(
        node.name,
        deps=[
            dg.AssetDep(dagster_name(item), partition_mapping=_mapping(plan, item, node.partition))
            for item in _dagster_deps(node)
        ],
        description=node.stage.description,
        group_name=node.group.value,
        kinds=set(node.kinds),
        code_version=node.stage.code_version,
        partitions_def=partitions_definition(plan, node.partition),
        metadata={"stage": f"python -m pipelines.runner {node.name}"},
    )

    @dg.multi_asset(
        name=node.name,
        specs=[spec],
        check_specs=check_specs(node, plan),
        backfill_policy=(
            None
            if node.partition is PartitionKind.NONE
            else dg.BackfillPolicy.multi_run(plan.profile.partitions_per_run(node.name))
        ),
    )
    def materialize_asset(context: dg.AssetExecutionContext) -> Iterator[Any]:
        keys = context.partition_keys if context.has_partition_key or context.has_partition_key_range else [None]
        try:
            outcomes = execution.materialize(node.name, keys, LogObserver(context, node.name))
        except ThroughlineError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from None
        if node.name == INDEX:
            register_parts(context.instance, plan)
        if len(outcomes) == 1:
            yield _result(outcomes[0])
        else:
            _log_materializations(context, outcomes)
            yield dg.MaterializeResult(asset_key=node.name)
        for event in unrecorded_files(context.instance, plan, node.name):
            context.log_event(event)
        for _, result in check_results(node, plan, outcomes):
            yield result

    return materialize_asset


def _dagster_deps(node: Node) -> list[Input]:
    return [item for item in node.inputs if item.is_dagster_dep]


def _result(outcome: Outcome) -> dg.MaterializeResult:
    task = outcome.task
    assert task.output is not None
    return dg.MaterializeResult(
        asset_key=task.node.name,
        metadata=describe(task, reused=outcome.reused),
        data_version=dg.DataVersion(task.output.data_version),
    )


def _log_materializations(context: dg.AssetExecutionContext, outcomes: list[Outcome]) -> None:
    """Record each partition of a run of several with its own data version."""
    _disable_automatic_events(context)
    for outcome in outcomes:
        context.log_event(materialization(context.instance, outcome, with_preview=len(outcomes) <= _MAX_PREVIEWS))


def _disable_automatic_events(context: dg.AssetExecutionContext) -> None:
    """Keep Dagster from recording the partitions of a run itself: it would give all of them one data version.

    Sets a tag in this process only; the stored run does not change.
    """
    tags = context.run.tags
    assert isinstance(tags, dict)
    tags[EXTERNALLY_MANAGED_ASSETS_TAG] = "true"


def materialization(
    instance: dg.DagsterInstance, outcome: Outcome, *, with_preview: bool = True
) -> dg.AssetMaterialization:
    """Return the event that records an outcome, with data version and provenance from its manifest."""
    task = outcome.task
    assert task.output is not None
    return dg.AssetMaterialization(
        asset_key=task.node.name,
        partition=task.partition,
        metadata=describe(task, reused=outcome.reused, with_preview=with_preview),
        tags={
            DATA_VERSION_TAG: task.output.data_version,
            DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
            CODE_VERSION_TAG: task.output.manifest.code_version,
            **_provenance_tags(instance, task),
        },
    )


def is_recorded(instance: dg.DagsterInstance, task: Task) -> bool:
    """Return whether Dagster's latest materialization of a task has the data version of its finished output."""
    if task.output is None:
        return False
    record = instance.get_latest_data_version_record(dg.AssetKey(task.node.name), partition_key=task.partition)
    if record is None or record.asset_materialization is None:
        return False
    return (record.asset_materialization.tags or {}).get(DATA_VERSION_TAG) == task.output.data_version


def _provenance_tags(instance: dg.DagsterInstance, task: Task) -> dict[str, str]:
    """Return the tags by which Dagster later detects that an input has changed."""
    tags: dict[str, str] = {}
    for item in _dagster_deps(task.node):
        inputs = (task.inputs or {})[item.name]
        versions = {task.partition if item.file else each.manifest.partition: each.data_version for each in inputs}
        tags |= input_tags(instance, dagster_name(item), versions)
    return tags


def _mapping(plan: Plan, item: Input, downstream: PartitionKind) -> "dg.PartitionMapping | None":
    upstream = plan.graph[item.asset].partition if item.file is None else downstream
    return partition_mapping(plan, upstream, downstream)


def build_files_asset(node: Node, execution: Execution) -> "dg.AssetsDefinition | None":
    """Return the asset between a node and the partitions that read single files of its output; None if there are none.

    Dagster has no edge to a file, and with an edge to the whole output a change of one part would make every part
    stale. The events of this asset are recorded together with the node's; materializing it alone only records them.
    """
    plan = execution.plan
    reader = plan.graph.file_reader(node.name)
    if reader is None:
        return None
    name = files_asset_name(node.name)
    spec = dg.AssetSpec(
        name,
        deps=[node.name],
        description=f"Each part's own file of {node.name}, for assets that depend on that part alone.",
        group_name=node.group.value,
        kinds=set(node.kinds),
        code_version=node.stage.code_version,
        partitions_def=partitions_definition(plan, reader.partition),
    )

    @dg.multi_asset(name=name, specs=[spec], backfill_policy=dg.BackfillPolicy.single_run())
    def record_files(context: dg.AssetExecutionContext) -> Iterator[Any]:
        keys = context.partition_keys
        try:
            events = [file_materialization(context.instance, plan, node.name, key) for key in keys]
        except ThroughlineError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from None
        if len(events) == 1:
            yield file_result(events[0])
            return
        _disable_automatic_events(context)
        for event in events:
            context.log_event(event)
        yield dg.MaterializeResult(asset_key=name)

    return record_files


def register_parts(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Sync Dagster's part partitions with the index: add new parts in order, delete removed ones."""
    wanted = plan.parts()
    known = instance.get_dynamic_partitions(PART_PARTITIONS)
    for gone in sorted(set(known) - set(wanted)):
        instance.delete_dynamic_partition(PART_PARTITIONS, gone)
    new = [part for part in wanted if part not in set(known)]
    if new:
        instance.add_dynamic_partitions(PART_PARTITIONS, new)
