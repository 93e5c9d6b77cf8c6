"""`throughline run`: carries out the plan through Dagster, in this process, so that its history shows every run."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestration.console import Console, duration, table
from orchestration.defs.assets import is_recorded
from orchestration.defs.file_events import unrecorded_files
from orchestration.defs.jobs import run_job
from orchestration.graph.execution import Execution
from orchestration.graph.graph import Node, PartitionKind
from orchestration.graph.resolution import Task
from orchestration.launch.launcher import ON_OTHER_MACHINE
from pipelines.runner.locks import WAITING
from pipelines.runner.outputs import StageOutput

if TYPE_CHECKING:
    from orchestration.defs.instance import DagsterInstance

_TABLE_1 = {"geneval": "GenEval", "genai": "GenAI-Bench", "unified_style": "UnifiedReward style"}
"""Columns of table 1 that the paper prints too, and how they are headed."""


class ConsoleObserver:
    """Shows progress on the console, and whom a stage waits for; everything else it says is in its log."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def progress(self, record: Mapping[str, Any]) -> None:
        self._console.progress(record)

    def line(self, text: str) -> None:
        """Lines of a stage stand in its log, which an error names; one that says why nothing moves is shown too, and
        one without which nothing would."""
        if text.startswith((WAITING, ON_OTHER_MACHINE)):
            self._console.line(f"  {text}")


@dataclass
class Tally:
    """What a run did to one asset."""

    computed: int = 0
    reused: int = 0
    seconds: float = 0.0


class Run:
    """One call of `throughline run`: one Dagster run over the nodes, told to the console."""

    def __init__(self, execution: Execution, instance: "DagsterInstance", console: Console) -> None:
        self._execution = execution
        self._plan = execution.plan
        self._instance = instance
        self._console = console
        self._width = 0
        self._started = 0.0
        self.tallies: dict[str, Tally] = {}
        execution.observer = ConsoleObserver(console)

    def execute(self, name: str, nodes: Sequence[Node]) -> None:
        """Bring every partition of the nodes up to date, upstream first.

        Raises ThroughlineError at the first failure; what was finished stays.
        """
        self._width = max(len(node.name) for node in nodes)
        self._execution.prepare(lambda text: self._console.line(f"  {text}"))
        if all(self._is_up_to_date(node) for node in nodes):
            return
        self.tallies.clear()
        run_job(name, nodes, self._execution, self._instance, reporter=self)

    def _is_up_to_date(self, node: Node) -> bool:
        """Whether all is finished and recorded; says so where it is."""
        tasks = self._plan.tasks(node.name)
        if not tasks or not all(is_recorded(self._instance, task) for task in tasks):
            return False
        if next(unrecorded_files(self._instance, self._plan, node.name), None) is not None:
            return False
        self.tallies[node.name] = Tally(reused=len(tasks))
        return True

    def started(self, node: Node, tasks: Sequence[Task]) -> None:
        pending = [task for task in tasks if task.output is None]
        self.tallies[node.name] = Tally(computed=len(pending), reused=len(tasks) - len(pending))
        self._started = time.monotonic()
        of_all = "" if node.partition is PartitionKind.NONE else f" {len(pending)} of {len(tasks)} partitions"
        if pending:
            self._console.line(f"  {node.name:<{self._width}}  computing{of_all}")

    def finished(self, node: Node, tasks: Sequence[Task]) -> None:
        tally = self.tallies[node.name]
        tally.seconds = time.monotonic() - self._started
        said = f"done in {duration(tally.seconds)}" if tally.computed else "reused"
        self._console.line(f"  {node.name:<{self._width}}  {said}{_rows(tasks)}")


def _rows(tasks: Sequence[Task]) -> str:
    tables = [task.output.manifest.conservation for task in tasks if task.output]
    counted = [table for table in tables if table is not None]
    if not counted:
        return ""
    return f": {sum(item.rows_in for item in counted):,} rows in, {sum(item.rows_out for item in counted):,} out"


def print_results(console: Console, results: StageOutput, report: StageOutput | None) -> None:
    """Write table 1 as this run measured it, with its intervals, and where the report lies."""
    with results.path("table1.csv").open(newline="") as stream:
        records = list(csv.DictReader(stream))
    rows = [("arm", *_TABLE_1.values())]
    rows += [(record["arm"], *(_with_interval(record, name) for name in _TABLE_1)) for record in records]
    console.line()
    console.line(table(rows, indent="  "))
    if report is not None:
        console.line()
        console.line(f"Report: {report.path('report.html')}")


def _with_interval(record: Mapping[str, str], name: str) -> str:
    if not record.get(name):
        return "-"
    value, low, high = (float(record[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def summarise(tallies: Mapping[str, Tally], seconds: float) -> str:
    """Return one line about a whole run."""
    computed = sum(tally.computed for tally in tallies.values())
    reused = sum(tally.reused for tally in tallies.values())
    return f"{computed} computed, {reused} reused, in {duration(seconds)}"


def as_json(tallies: Mapping[str, Tally]) -> str:
    """Return the tallies as JSON."""
    return json.dumps({name: vars(tally) for name, tally in tallies.items()}, indent=1)
