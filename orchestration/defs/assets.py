"""Dagster's assets, made from the graph: each is thin, and carries out its tasks of the plan."""

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

from orchestration.defs.asset_checks import Check, checks_of, look
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
    PART_PARTITIONS,
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

_OBSERVE_SECONDS = 60.0
_MAX_PICTURED = 64
"""Partitions of one run beyond which its records carry no pictures: they lie in Dagster's database."""


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
    """Return which upstream partitions go into a downstream one; never Dagster's guess, except where nothing is
    divided upstream."""
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
    """Tells Dagster what a stage does while it runs: progress as lines of the event log and, once a minute, as an
    observation of the asset, whose numbers its page plots; waits as lines too, all else as captured output."""

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
    """Return the event that shows a progress record of a stage: done, total, rate, and the stage's own counts."""
    partition = str(record["label"]).removeprefix(asset).strip() or None
    numbers = {"done": record["done"], "total": record.get("total"), "per_second": record.get("rate")}
    shown = {name: value for name, value in {**numbers, **(record.get("details") or {})}.items() if value is not None}
    return dg.AssetObservation(asset, partition=partition, description=progress_text(record), metadata=shown)


def build_asset(node: Node, execution: Execution) -> dg.AssetsDefinition:
    """Return the asset of a node."""
    plan = execution.plan
    checks = checks_of(node.name)
    spec = dg.AssetSpec(
        node.name,
        deps=[
            dg.AssetDep(dagster_name(item), partition_mapping=_mapping(plan, item, node.partition))
            for item in _drawn(node)
        ],
        description=node.description,
        group_name=node.group.value,
        kinds=set(node.kinds),
        code_version=node.stage.code_version,
        partitions_def=partitions_definition(plan, node.partition),
        metadata={"stage": f"python -m pipelines.runner {node.name}"},
    )

    @dg.multi_asset(
        name=node.name,
        specs=[spec],
        check_specs=[dg.AssetCheckSpec(check.name, asset=node.name, description=check.description) for check in checks],
        backfill_policy=(
            None
            if node.partition is PartitionKind.NONE
            else dg.BackfillPolicy.multi_run(plan.profile.partitions_per_run(node.name))
        ),
    )
    def carry_out(context: dg.AssetExecutionContext) -> Iterator[Any]:
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
        for check in checks:
            yield check_result(plan, node.name, check, outcomes)

    return carry_out


def _drawn(node: Node) -> list[Input]:
    return [item for item in node.inputs if item.drawn]


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
    _record_ourselves(context)
    for outcome in outcomes:
        context.log_event(materialization(context.instance, outcome, pictures=len(outcomes) <= _MAX_PICTURED))


def _record_ourselves(context: dg.AssetExecutionContext) -> None:
    """Keep Dagster from recording any partition of a run itself: it would give all of them one data version.

    The tag is for this process alone: what is stored of the run does not change.
    """
    tags = context.run.tags
    assert isinstance(tags, dict)
    tags[EXTERNALLY_MANAGED_ASSETS_TAG] = "true"


def materialization(
    instance: dg.DagsterInstance, outcome: Outcome, *, pictures: bool = True
) -> dg.AssetMaterialization:
    """Return the event that records an outcome: data version and provenance come from its manifest."""
    task = outcome.task
    assert task.output is not None
    return dg.AssetMaterialization(
        asset_key=task.node.name,
        partition=task.partition,
        metadata=describe(task, reused=outcome.reused, pictures=pictures),
        tags={
            DATA_VERSION_TAG: task.output.data_version,
            DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
            CODE_VERSION_TAG: task.output.manifest.code_version,
            **_provenance_tags(instance, task),
        },
    )


def is_recorded(instance: dg.DagsterInstance, task: Task) -> bool:
    """Whether Dagster's latest materialization of a finished task is of this very data version."""
    if task.output is None:
        return False
    record = instance.get_latest_data_version_record(dg.AssetKey(task.node.name), partition_key=task.partition)
    if record is None or record.asset_materialization is None:
        return False
    return (record.asset_materialization.tags or {}).get(DATA_VERSION_TAG) == task.output.data_version


def _provenance_tags(instance: dg.DagsterInstance, task: Task) -> dict[str, str]:
    """Return the tags by which Dagster tells later whether an input has changed since."""
    tags: dict[str, str] = {}
    for item in _drawn(task.node):
        inputs = (task.inputs or {})[item.name]
        versions = {task.partition if item.file else each.manifest.partition: each.data_version for each in inputs}
        tags |= input_tags(instance, dagster_name(item), versions)
    return tags


def _mapping(plan: Plan, item: Input, downstream: PartitionKind) -> "dg.PartitionMapping | None":
    upstream = plan.graph[item.asset].partition if item.file is None else downstream
    return partition_mapping(plan, upstream, downstream)


def build_files_asset(node: Node, execution: Execution) -> "dg.AssetsDefinition | None":
    """Return the asset that stands between a node and the partitions that read single files of its output.

    Dagster knows no edge to a file: with an edge to the whole, every part would turn stale with any of them. Its events
    are recorded with the node's own; materialising it alone only records them. None where nothing reads it so.
    """
    plan = execution.plan
    reader = plan.graph.file_reader(node.name)
    if reader is None:
        return None
    name = files_asset_name(node.name)
    spec = dg.AssetSpec(
        name,
        deps=[node.name],
        description=f"Each part's own file of {node.name}: what depends on that part alone reads it and nothing else.",
        group_name=node.group.value,
        kinds=set(node.kinds),
        code_version=node.stage.code_version,
        partitions_def=partitions_definition(plan, reader.partition),
    )

    @dg.multi_asset(name=name, specs=[spec], backfill_policy=dg.BackfillPolicy.single_run())
    def carry_out(context: dg.AssetExecutionContext) -> Iterator[Any]:
        keys = context.partition_keys
        try:
            events = [file_materialization(context.instance, plan, node.name, key) for key in keys]
        except ThroughlineError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from None
        if len(events) == 1:
            yield file_result(events[0])
            return
        _record_ourselves(context)
        for event in events:
            context.log_event(event)
        yield dg.MaterializeResult(asset_key=name)

    return carry_out


def check_result(plan: Plan, asset: str, check: Check, outcomes: list[Outcome]) -> dg.AssetCheckResult:
    """Return what a check found in some partitions of an asset."""
    findings = {outcome.task.partition or asset: look(check, plan, outcome.task) for outcome in outcomes}
    failed = {name: finding for name, finding in findings.items() if not finding.passed}
    said = next(iter((failed or findings).values())).sentence
    metadata: dict[str, Any] = {}
    if len(findings) == 1:
        metadata |= next(iter(findings.values())).numbers
    else:
        rows = [
            f"| {name.replace('|', ' on ')} | {'yes' if finding.passed else 'no'} | {finding.sentence} |"
            for name, finding in findings.items()
        ]
        metadata["by_partition"] = dg.MetadataValue.md(
            "| partition | passed | finding |\n|---|---|---|\n" + "\n".join(rows)
        )
        if failed:
            said = f"{len(failed)} of {len(findings)} partitions, such as {next(iter(failed))}: {said}"
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=check.name,
        passed=not failed,
        severity=dg.AssetCheckSeverity.ERROR if check.severe else dg.AssetCheckSeverity.WARN,
        description=said,
        metadata=metadata,
    )


def register_parts(instance: dg.DagsterInstance, plan: Plan) -> None:
    """Make Dagster's parts those of the finished index: add new ones, in order, and take away those that are gone."""
    wanted = plan.parts()
    known = instance.get_dynamic_partitions(PART_PARTITIONS)
    for gone in sorted(set(known) - set(wanted)):
        instance.delete_dynamic_partition(PART_PARTITIONS, gone)
    new = [part for part in wanted if part not in set(known)]
    if new:
        instance.add_dynamic_partitions(PART_PARTITIONS, new)
