"""`throughline run`: executes the plan as a Dagster run in this process, so that Dagster's history records it."""

import argparse
import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestration.cli.options import add_profile_arguments, load_execution
from orchestration.console import Console
from orchestration.defs.assets import is_recorded
from orchestration.defs.file_events import unrecorded_files
from orchestration.defs.instance import open_instance
from orchestration.defs.jobs import EVERYTHING_JOB, run_job
from orchestration.graph.execution import Execution
from orchestration.graph.graph import Node, PartitionKind
from orchestration.graph.resolution import Task
from orchestration.launch.launcher import ON_OTHER_MACHINE
from pipelines.core.environment import home_folder
from pipelines.core.progress import duration
from pipelines.runner.locks import WAITING
from pipelines.runner.outputs import StageOutput
from pipelines.storage.mirror import location_of

if TYPE_CHECKING:
    from orchestration.defs.instance import DagsterInstance

_TABLE_1 = {"geneval": "GenEval", "genai": "GenAI-Bench", "unified_style": "UnifiedReward style"}
"""Columns of table 1 that the paper prints too, and how they are headed."""


class ConsoleObserver:
    """Shows progress on the console, and the few lines of a stage that the user must see; its log has the rest."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def progress(self, record: Mapping[str, Any]) -> None:
        self._console.progress(record)

    def line(self, text: str) -> None:
        """Show a line that explains a wait for a lock, or that gives the command to start on another machine."""
        if text.startswith((WAITING, ON_OTHER_MACHINE)):
            self._console.line(f"  {text}")


@dataclass
class AssetTally:
    """Partitions of one asset that a run computed or reused."""

    computed: int = 0
    reused: int = 0
    seconds: float = 0.0


class Run:
    """One call of `throughline run`: one Dagster run over the nodes, reported on the console."""

    def __init__(self, execution: Execution, instance: "DagsterInstance", console: Console) -> None:
        self._execution = execution
        self._plan = execution.plan
        self._instance = instance
        self._console = console
        self._width = 0
        self._started = 0.0
        self.tallies: dict[str, AssetTally] = {}
        execution.observer = ConsoleObserver(console)

    def execute(self, name: str, nodes: Sequence[Node]) -> None:
        """Bring every partition of the nodes up to date, upstream first.

        Raises ThroughlineError at the first failure; finished outputs are kept.
        """
        self._width = max(len(node.name) for node in nodes)
        self._execution.prepare(lambda text: self._console.line(f"  {text}"))
        if all(self._is_up_to_date(node) for node in nodes):
            return
        self.tallies.clear()
        run_job(name, nodes, self._execution, self._instance, reporter=self)

    def _is_up_to_date(self, node: Node) -> bool:
        """Return whether every partition is finished and recorded in Dagster; if so, tally them as reused."""
        tasks = self._plan.tasks(node.name)
        if not tasks or not all(is_recorded(self._instance, task) for task in tasks):
            return False
        if next(unrecorded_files(self._instance, self._plan, node.name), None) is not None:
            return False
        self.tallies[node.name] = AssetTally(reused=len(tasks))
        return True

    def started(self, node: Node, tasks: Sequence[Task]) -> None:
        pending = [task for task in tasks if task.output is None]
        self.tallies[node.name] = AssetTally(computed=len(pending), reused=len(tasks) - len(pending))
        self._started = time.monotonic()
        of_all = "" if node.partition is PartitionKind.NONE else f" {len(pending)} of {len(tasks)} partitions"
        if pending:
            self._console.line(f"  {node.name:<{self._width}}  computing{of_all}")

    def finished(self, node: Node, tasks: Sequence[Task]) -> None:
        tally = self.tallies[node.name]
        tally.seconds = time.monotonic() - self._started
        outcome = f"done in {duration(tally.seconds)}" if tally.computed else "reused"
        self._console.line(f"  {node.name:<{self._width}}  {outcome}{_rows(tasks)}")


def _rows(tasks: Sequence[Task]) -> str:
    tables = [task.output.manifest.conservation for task in tasks if task.output]
    counted = [table for table in tables if table is not None]
    if not counted:
        return ""
    return f": {sum(item.rows_in for item in counted):,} rows in, {sum(item.rows_out for item in counted):,} out"


def print_results(console: Console, results: StageOutput, report: StageOutput | None) -> None:
    """Print table 1 with the intervals of this run, and the path of the report."""
    with results.path("table1.csv").open(newline="") as stream:
        records = list(csv.DictReader(stream))
    rows = [("arm", *_TABLE_1.values())]
    rows += [(record["arm"], *(_with_interval(record, name) for name in _TABLE_1)) for record in records]
    console.line()
    console.table(rows, indent="  ")
    if report is not None:
        console.line()
        console.line(f"Report: {report.path('report.html')}")


def _with_interval(record: Mapping[str, str], name: str) -> str:
    if not record.get(name):
        return "-"
    value, low, high = (float(record[key]) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def summarise(tallies: Mapping[str, AssetTally], seconds: float) -> str:
    """Return a one-line summary of a whole run."""
    computed = sum(tally.computed for tally in tallies.values())
    reused = sum(tally.reused for tally in tallies.values())
    return f"{computed} computed, {reused} reused, in {duration(seconds)}"


def as_json(tallies: Mapping[str, AssetTally]) -> str:
    """Return the tallies as JSON."""
    return json.dumps({name: vars(tally) for name, tally in tallies.items()}, indent=1)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `run`."""
    add_profile_arguments(parser)
    parser.add_argument(
        "--select",
        metavar="ASSETS",
        help="assets to bring up to date: name, +name (with everything upstream), name+ (with everything downstream), "
        "group:training; separate several with commas. The inputs of the selection must be finished",
    )
    parser.add_argument("--only", choices=("data", "training", "evaluation"), help="one group of assets")


def run_assets(arguments: argparse.Namespace) -> int:
    """Bring the selected assets up to date and print the results; return 0."""
    execution = load_execution(arguments)
    plan, profile = execution.plan, execution.plan.profile
    only = f"group:{arguments.only}" if arguments.only else None
    selection = arguments.select if arguments.select is not None else only
    nodes = list(plan.graph.nodes.values()) if selection is None else plan.graph.select(selection)
    console = Console()
    console.line(f"profile {profile.name}: {len(nodes)} assets, outputs in {location_of(plan.output_root)}")
    for warning in profile.warnings():
        console.line(f"  note: {warning}")
    started = time.monotonic()
    with open_instance(home_folder()) as instance:
        run = Run(execution, instance, console)
        run.execute("selected" if selection else EVERYTHING_JOB, nodes)
    console.line(f"  {summarise(run.tallies, time.monotonic() - started)}")
    profile.log_folder.mkdir(parents=True, exist_ok=True)
    (profile.log_folder / "last-run.json").write_text(as_json(run.tallies))
    results = plan.task("results").output if "results" in plan.graph.nodes else None
    if results is not None:
        print_results(console, results, plan.task("report").output)
    return 0
