"""Jobs over assets of different partition sets: one run with one step per asset, upstream first.

Dagster's own asset jobs take one partition set only. These carry out the same tasks of the plan and record the same
materializations and checks; `throughline run` executes one of them in its own process.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import dagster as dg

from orchestration.defs.asset_checks import checks_of
from orchestration.defs.assets import LogObserver, check_result, is_recorded, materialization, register_parts
from orchestration.defs.file_events import unrecorded_files
from orchestration.graph.execution import Execution, Outcome
from orchestration.graph.graph import Node
from orchestration.graph.resolution import INDEX, Task
from pipelines.core.errors import ThroughlineError

EVALUATION_JOB = "evaluation_only"
EVERYTHING_JOB = "everything"
_BEFORE = "before"


class Reporter(Protocol):
    """Who is told about each asset of a job."""

    def started(self, node: Node, tasks: Sequence[Task]) -> None:
        """Take an asset whose turn it is, with its tasks as they were before."""

    def finished(self, node: Node, tasks: Sequence[Task]) -> None:
        """Take an asset whose tasks are all finished."""


class _Silent:
    def started(self, node: Node, tasks: Sequence[Task]) -> None:
        pass

    def finished(self, node: Node, tasks: Sequence[Task]) -> None:
        pass


def build_job(
    name: str, nodes: Sequence[Node], execution: Execution, description: str, reporter: Reporter | None = None
) -> dg.JobDefinition:
    """Return a job that brings every partition of the nodes up to date."""
    # One chain: a failure stops everything after it, and nothing else takes the machine meanwhile.
    ops, dependencies = [], {}
    for before, node in zip((None, *nodes), nodes, strict=False):
        ops.append(_build_op(name, node, before, execution, reporter or _Silent()))
        if before is not None:
            dependencies[_op_name(name, node.name)] = {_BEFORE: dg.DependencyDefinition(_op_name(name, before.name))}
    graph = dg.GraphDefinition(name, node_defs=ops, dependencies=dependencies, description=description)
    return graph.to_job(executor_def=dg.in_process_executor)


def _op_name(job: str, asset: str) -> str:
    return f"{job}__{asset}"


def _build_op(job: str, node: Node, before: Node | None, execution: Execution, reporter: Reporter) -> dg.OpDefinition:
    @dg.op(
        name=_op_name(job, node.name),
        ins={} if before is None else {_BEFORE: dg.In(dg.Nothing)},
        out=dg.Out(dg.Nothing),
        description=node.description,
    )
    def carry_out(context: dg.OpExecutionContext) -> None:
        try:
            _carry_out(context, node, execution, reporter)
        except ThroughlineError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from None

    return carry_out


def _carry_out(context: dg.OpExecutionContext, node: Node, execution: Execution, reporter: Reporter) -> None:
    plan = execution.plan
    execution.prepare(lambda text: context.log.info(text))
    tasks = plan.tasks(node.name)
    if not tasks:
        raise ThroughlineError(f"{node.name}: its parts are unknown; run {INDEX} first")
    reporter.started(node, tasks)
    wanted = [task for task in tasks if not is_recorded(context.instance, task)]
    for group in _groups(wanted, plan.profile.partitions_per_run(node.name)):
        try:
            outcomes = execution.materialize(
                node.name, [task.partition for task in group], LogObserver(context, node.name)
            )
        except ThroughlineError:
            _record(context, execution, [Outcome(task, False) for task in _finished_since(execution, group)])
            raise
        _record(context, execution, outcomes)
    if node.name == INDEX:
        register_parts(context.instance, plan)
    for event in unrecorded_files(context.instance, plan, node.name):
        context.log_event(event)
    reporter.finished(node, plan.tasks(node.name))


def _groups(tasks: Sequence[Task], most: int) -> Iterator[Sequence[Task]]:
    for start in range(0, len(tasks), most):
        yield tasks[start : start + most]


def _finished_since(execution: Execution, group: Sequence[Task]) -> list[Task]:
    """Return the tasks that a stage finished before it failed at another."""
    now = [execution.plan.task(task.node.name, task.partition) for task in group if task.output is None]
    return [task for task in now if task.output is not None]


def _record(context: dg.OpExecutionContext, execution: Execution, outcomes: Sequence[Outcome]) -> None:
    if not outcomes:
        return
    plan, asset = execution.plan, outcomes[0].task.node.name
    for outcome in outcomes:
        context.log_event(materialization(context.instance, outcome))
    for check in checks_of(asset):
        result = check_result(plan, asset, check, list(outcomes))
        evaluation: Any = dg.AssetCheckEvaluation(  # taken by log_event, though its signature does not say so
            asset_key=dg.AssetKey(asset),
            check_name=check.name,
            passed=result.passed,
            metadata=result.metadata or {},
            severity=result.severity,
            description=result.description,
        )
        context.log_event(evaluation)
