"""Dagster's asset checks, made from the checks that a stage states."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from orchestration.graph.execution import Outcome
from orchestration.graph.graph import Node
from orchestration.graph.resolution import Plan, Task
from pipelines.runner.checks import AnyCheck, CheckResult, Severity, run_check, universal_checks
from pipelines.runner.outputs import StageOutput

_SEVERITIES = {Severity.ERROR: dg.AssetCheckSeverity.ERROR, Severity.WARNING: dg.AssetCheckSeverity.WARN}


def checks_of(node: Node, plan: Plan) -> tuple[AnyCheck, ...]:
    """Return all checks of an asset."""
    return (*universal_checks(read_bytes=plan.profile.check_bytes), *node.stage.checks)


def check_specs(node: Node, plan: Plan) -> list[dg.AssetCheckSpec]:
    """Return the declarations of an asset's checks."""
    return [
        dg.AssetCheckSpec(check.name, asset=node.name, description=check.description) for check in checks_of(node, plan)
    ]


def check_results(
    node: Node, plan: Plan, outcomes: Sequence[Outcome]
) -> Iterator[tuple[AnyCheck, dg.AssetCheckResult]]:
    """Run all checks of an asset on some of its partitions; yield each with its result."""
    for check in checks_of(node, plan):
        yield check, _check_result(node.name, plan, check, outcomes)


def _check_result(asset: str, plan: Plan, check: AnyCheck, outcomes: Sequence[Outcome]) -> dg.AssetCheckResult:
    results = {outcome.task.partition or asset: _run(check, plan, outcome.task) for outcome in outcomes}
    failed = {name: result for name, result in results.items() if not result.passed}
    message = next(iter((failed or results).values())).message
    metadata: dict[str, Any] = {}
    if len(results) == 1:
        metadata |= next(iter(results.values())).numbers
    else:
        rows = [
            f"| {name.replace('|', ' on ')} | {'yes' if result.passed else 'no'} | {result.message} |"
            for name, result in results.items()
        ]
        metadata["by_partition"] = dg.MetadataValue.md(
            "| partition | passed | result |\n|---|---|---|\n" + "\n".join(rows)
        )
        if failed:
            message = f"{len(failed)} of {len(results)} partitions, such as {next(iter(failed))}: {message}"
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=check.name,
        passed=not failed,
        severity=_SEVERITIES[check.severity],
        description=message,
        metadata=metadata,
    )


def _run(check: AnyCheck, plan: Plan, task: Task) -> CheckResult:
    def siblings() -> list[StageOutput]:
        return [other.output for other in plan.tasks(task.node.name) if other.output is not None]

    assert task.output is not None
    return run_check(check, task.output, siblings)
