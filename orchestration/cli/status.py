"""The commands `throughline status`, which lists finished, stale and missing outputs, and `throughline audit`, which
recomputes their digests."""

import argparse
import sys
from typing import TYPE_CHECKING

from orchestration.cli.options import add_json_argument, add_profile_arguments, load_execution, print_json
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.graph.resolution import Plan
    from orchestration.lineage.audit import Audit
    from pipelines.core.manifest import InputRef


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `status`."""
    add_profile_arguments(parser)
    parser.add_argument("--all", action="store_true", help="print one line per partition")
    add_json_argument(parser)


def run_status(arguments: argparse.Namespace) -> int:
    """Print the state of every asset; return 0."""
    from orchestration.lineage.status import status_json, status_lines

    plan = load_execution(arguments).plan
    for warning in plan.profile.warnings():
        print(f"note: {warning}", file=sys.stderr)
    if arguments.json:
        print_json(status_json(plan))
    else:
        for line in status_lines(plan, each_partition=arguments.all):
            print(line)
    return 0


def add_audit_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `audit`."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN_ID",
        help="a Dagster run ID or a data version, or a prefix of either; default: the report and every other final "
        "output",
    )  # fmt: skip
    add_profile_arguments(parser)
    add_json_argument(parser)


def run_audit(arguments: argparse.Namespace) -> int:
    """Recompute every digest upstream of a run or an output; return 1 if one differs."""
    from orchestration.lineage.audit import Auditor

    plan = load_execution(arguments).plan
    audit = Auditor(plan.output_root).audit(_audited_refs(plan, arguments.run))
    if arguments.json:
        print_json(audit.as_json())
    else:
        _print_audit(audit)
    return 0 if audit.passed else 1


def _audited_refs(plan: "Plan", run: str | None) -> "list[InputRef]":
    """Return the outputs that a run ID or a data version names; None names all final outputs."""
    from orchestration.defs.run_history import refs_of_run
    from orchestration.lineage.audit import find_output
    from pipelines.core.environment import home_folder

    if run is None:
        report = plan.task("report").output
        if report is None:
            raise ThroughlineError(
                f"the report of profile {plan.profile.name} is not finished; run `throughline run` first, or name a "
                "run or a data version"
            )
        return [report.ref, *(output.ref for output in plan.finished_ends() if output.ref != report.ref)]
    if "-" in run:
        return refs_of_run(home_folder(), run)
    try:
        return find_output(plan.output_root, run)
    except ThroughlineError:
        return refs_of_run(home_folder(), run)


def _print_audit(audit: "Audit") -> None:
    for line in audit.lines():
        print(line)
    print()
    broken = [node for node in audit.nodes.values() if node.problems]
    if not broken:
        num_files = sum(node.num_files for node in audit.nodes.values())
        print(f"All {len(audit.nodes)} outputs and {num_files} files match their manifests.")
        return
    print(f"{len(broken)} of {len(audit.nodes)} outputs do not match their manifests:")
    for node in broken:
        for problem in node.problems:
            print(f"  {node.label}: {problem}")
    print("fix: throughline run --set verify=digest  (compares every byte and recomputes these outputs)")
