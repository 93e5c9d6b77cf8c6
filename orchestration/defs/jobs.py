"""Jobs over assets of different partition sets: one run with one step per asset, upstream first.

Dagster's own asset jobs take one partition set only. These run the same tasks of the plan and record the same
materializations and checks; `throughline run` executes one of them in its own process.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, Protocol

import dagster as dg

from orchestration.defs.asset_checks import check_results
from orchestration.defs.assets import LogObserver, is_recorded, materialization, register_parts
from orchestration.defs.file_events import unrecorded_files
from orchestration.defs.instance import process_tags
from orchestration.graph.execution import Execution, Outcome
from orchestration.graph.graph import Node
from orchestration.graph.resolution import INDEX, Task
from pipelines.core.errors import ThroughlineError

EVALUATION_JOB = "evaluation_only"
EVERYTHING_JOB = "everything"
_PREVIOUS = "previous"
_INTERRUPTIONS = ("DagsterExecutionInterruptedError", "KeyboardInterrupt")
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class Reporter(Protocol):
    """Receives an event before and after each asset of a job."""

    def started(self, node: Node, tasks: Sequence[Task]) -> None:
        """Receive the next asset, with the state of its tasks before the run."""

    def finished(self, node: Node, tasks: Sequence[Task]) -> None:
        """Receive an asset whose tasks are all finished."""


class _Silent:
    def started(self, node: Node, tasks: Sequence[Task]) -> None:
        pass

    def finished(self, node: Node, tasks: Sequence[Task]) -> None:
        pass


def build_job(
    name: str, nodes: Sequence[Node], execution: Execution, description: str, reporter: Reporter | None = None
) -> dg.JobDefinition:
    """Return a job that brings every partition of the nodes up to date."""
    # A chain: a failure stops everything after it, and no two stages compete for the machine.
    ops, dependencies = [], {}
    for previous, node in zip((None, *nodes), nodes, strict=False):
        ops.append(_build_op(name, node, previous, execution, reporter or _Silent()))
        if previous is not None:
            dependencies[_op_name(name, node.name)] = {
                _PREVIOUS: dg.DependencyDefinition(_op_name(name, previous.name))
            }
    graph = dg.GraphDefinition(name, node_defs=ops, dependencies=dependencies, description=description)
    return graph.to_job(executor_def=dg.in_process_executor)


def _op_name(job: str, asset: str) -> str:
    return f"{job}__{asset}"


def _build_op(job: str, node: Node, previous: Node | None, execution: Execution, reporter: Reporter) -> dg.OpDefinition:
    @dg.op(
        name=_op_name(job, node.name),
        ins={} if previous is None else {_PREVIOUS: dg.In(dg.Nothing)},
        out=dg.Out(dg.Nothing),
        description=node.stage.description,
    )
    def materialize_asset(context: dg.OpExecutionContext) -> None:
        try:
            _materialize(context, node, execution, reporter)
        except ThroughlineError as error:
            raise dg.Failure(description=str(error), allow_retries=False) from None

    return materialize_asset


def _materialize(context: dg.OpExecutionContext, node: Node, execution: Execution, reporter: Reporter) -> None:
    plan = execution.plan
    execution.prepare(lambda text: context.log.info(text))
    tasks = plan.tasks(node.name)
    if not tasks:
        raise ThroughlineError(f"{node.name}: its parts are unknown; run {INDEX} first")
    reporter.started(node, tasks)
    pending = [task for task in tasks if not is_recorded(context.instance, task)]
    for group in _batches(pending, plan.profile.partitions_per_run(node.name)):
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


def _batches(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]


def _finished_since(execution: Execution, group: Sequence[Task]) -> list[Task]:
    """Return the tasks that a stage finished before it failed."""
    now = [execution.plan.task(task.node.name, task.partition) for task in group if task.output is None]
    return [task for task in now if task.output is not None]


def _record(context: dg.OpExecutionContext, execution: Execution, outcomes: Sequence[Outcome]) -> None:
    if not outcomes:
        return
    for outcome in outcomes:
        context.log_event(materialization(context.instance, outcome))
    node = outcomes[0].task.node
    for check, result in check_results(node, execution.plan, outcomes):
        evaluation: Any = dg.AssetCheckEvaluation(  # log_event takes it, though its signature omits it
            asset_key=dg.AssetKey(node.name),
            check_name=check.name,
            passed=result.passed,
            metadata=result.metadata or {},
            severity=result.severity,
            description=result.description,
        )
        context.log_event(evaluation)


def run_job(
    name: str, nodes: Sequence[Node], execution: Execution, instance: dg.DagsterInstance, reporter: Reporter
) -> None:
    """Bring every partition of the nodes up to date in this process, as one Dagster run.

    Raises ThroughlineError with the message of the first failure, and KeyboardInterrupt if a person or a signal stopped
    the run.
    """
    job = build_job(name, nodes, execution, "A run of the command line.", reporter=reporter)
    result = job.execute_in_process(
        run_config=_QUIET,
        instance=instance,
        tags={"throughline/profile": execution.plan.profile.name, **process_tags()},
        raise_on_error=False,
    )
    if not result.success:
        _raise_failure(result)


def _raise_failure(result: dg.ExecuteInProcessResult) -> NoReturn:
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data
            if data.user_failure_data and data.user_failure_data.description:
                raise ThroughlineError(str(data.user_failure_data.description))
            if data.error:
                if data.error.cls_name in _INTERRUPTIONS:
                    raise KeyboardInterrupt
                cause = data.error
                while cause.cause is not None:
                    cause = cause.cause
                raise ThroughlineError(f"{event.step_key}: {cause.message.strip()}")
    for event in result.all_events:
        if event.is_failure and event.message:
            raise ThroughlineError(str(event.message))
    raise ThroughlineError("the run failed without an error message; see it in `throughline ui`")
