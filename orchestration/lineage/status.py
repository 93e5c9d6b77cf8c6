"""`throughline status`: which tasks of the plan are finished, stale or missing."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from orchestration.console import CROSS, TICK, table
from orchestration.graph.resolution import Plan, State, Task
from pipelines.storage.mirror import location_of

_MARKS = {State.FINISHED: TICK, State.STALE: "~", State.MISSING: CROSS}


def status_json(plan: Plan) -> list[dict[str, Any]]:
    """Return one record per task."""
    return [
        {
            "asset": task.node.name,
            "partition": task.partition,
            "state": plan.state(task).value,
            "data_version": task.output.data_version if task.output else None,
            "manifest": str(task.output.manifest_path) if task.output else None,
            "blocked_by": list(task.blocked_by),
        }
        for task in plan.all_tasks()
    ]


def status_lines(plan: Plan, *, each_partition: bool) -> Iterator[str]:
    """Yield a table: one row per asset, or per partition."""
    rows = [("", "asset", "state", "rows", "data version")]
    for name in plan.graph.nodes:
        tasks = plan.tasks(name)
        if each_partition:
            rows += [_task_row(plan, task) for task in tasks]
            continue
        states = Counter(plan.state(task) for task in tasks)
        worst = next((state for state in (State.MISSING, State.STALE) if states[state]), State.FINISHED)
        if not tasks:
            rows.append((CROSS, name, "missing (parts not known yet)", "", ""))
        elif len(tasks) == 1:
            rows.append(_task_row(plan, tasks[0]))
        else:
            counts = ", ".join(f"{states[state]} {state.value}" for state in State if states[state])
            rows.append((_MARKS[worst], name, counts, _rows_out(tasks), ""))
    yield f"profile {plan.profile.name}, outputs in {location_of(plan.output_root)}"
    yield table(rows)


def _task_row(plan: Plan, task: Task) -> tuple[str, str, str, str, str]:
    state = plan.state(task)
    text = state.value
    if task.blocked_by and not task.blocked_by[0].endswith("is not finished"):
        text += f" ({task.blocked_by[0]})"
    return _MARKS[state], task.label, text, _rows_out([task]), task.output.data_version[:12] if task.output else ""


def _rows_out(tasks: list[Task]) -> str:
    tables = [task.output.manifest.conservation for task in tasks if task.output is not None]
    counted = [table.rows_out for table in tables if table is not None]
    return f"{sum(counted):,}" if counted else ""
