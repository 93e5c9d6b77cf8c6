"""Dagster's assets, made from the graph: each is thin, and carries out its tasks of the plan."""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    NULL_EVENT_POINTER,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from dagster._core.storage.tags import EXTERNALLY_MANAGED_ASSETS_TAG

from orchestration.console import progress_text
from orchestration.execution import Execution, Outcome
from orchestration.findings import Check, checks_of, look
from orchestration.graph import (
    PART_PARTITIONS,
    Coverage,
    Input,
    Node,
    PartitionKind,
    coverage,
    split_arm_benchmark,
    strategy_of_arm,
)
from orchestration.plan import INDEX, Plan, Task
from orchestration.previews import describe
from pipelines.digest import digest_json
from pipelines.errors import ThroughlineError

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
    """Tells Dagster's event log about progress, and its captured output about everything else."""

    def __init__(self, log: dg.DagsterLogManager) -> None:
        self._log = log

    def progress(self, record: Mapping[str, Any]) -> None:
        self._log.info(progress_text(record))

    def line(self, text: str) -> None:
        print(text, flush=True)


def build_asset(node: Node, execution: Execution) -> dg.AssetsDefinition:
    """Return the asset of a node."""
    plan = execution.plan
    checks = checks_of(node.name)
    spec = dg.AssetSpec(
        node.name,
        deps=[
            dg.AssetDep(
                item.asset, partition_mapping=partition_mapping(plan, plan.graph[item.asset].partition, node.partition)
            )
            for item in _drawn(node)
        ],
        description=node.description,
        group_name=node.group.value,
        kinds=set(node.kinds),
        code_version=node.stage.code_version,
        partitions_def=partitions_definition(plan, node.partition),
        metadata={"stage": f"python -m {node.module}"},
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
            outcomes = execution.materialize(node.name, keys, LogObserver(context.log))
        except ThroughlineError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from None
        if node.name == INDEX:
            register_parts(context.instance, plan)
        if len(outcomes) == 1:
            yield _result(outcomes[0])
        else:
            _log_materializations(context, plan, outcomes)
            yield dg.MaterializeResult(asset_key=node.name)
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


def _log_materializations(context: dg.AssetExecutionContext, plan: Plan, outcomes: list[Outcome]) -> None:
    """Record each partition of a run of several with its own data version.

    Dagster gives all partitions of a run one data version. The tag keeps it from recording any itself, for this
    process alone: what is stored of the run does not change.
    """
    tags = context.run.tags
    assert isinstance(tags, dict)
    tags[EXTERNALLY_MANAGED_ASSETS_TAG] = "true"
    for outcome in outcomes:
        context.log_event(materialization(context.instance, plan, outcome, pictures=len(outcomes) <= _MAX_PICTURED))


def materialization(
    instance: dg.DagsterInstance, plan: Plan, outcome: Outcome, *, pictures: bool = True
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
            **_provenance_tags(instance, plan, task.node, task.partition),
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


def _provenance_tags(instance: dg.DagsterInstance, plan: Plan, node: Node, partition: str | None) -> dict[str, str]:
    """Return the tags by which Dagster tells later whether an input has changed since."""
    tags = {}
    for item in _drawn(node):
        key = dg.AssetKey(item.asset)
        upstream = plan.upstream_partitions(node, partition, item.asset)
        versions = [task.output.data_version for name in upstream if (task := plan.task(item.asset, name)).output]
        tags[get_input_data_version_tag(key)] = versions[0] if len(versions) == 1 else digest_json(versions)
        records = [instance.get_latest_data_version_record(key, partition_key=name) for name in upstream]
        pointers = [record.storage_id for record in records if record is not None]
        tags[get_input_event_pointer_tag(key)] = str(max(pointers)) if pointers else NULL_EVENT_POINTER
    return tags


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
