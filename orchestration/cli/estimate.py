"""The command `throughline estimate`: what a profile will cost, stage by stage, before anything runs."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile

OLD_NAME = "plan"
"""The command's name up to 0.1; accepted for one release."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, except the profile's; imports nothing heavy."""
    parser.add_argument(
        "--rows", metavar="N", help="rows of metadata, such as 4e8; default: the profile's metadata files, or 413 M"
    )
    parser.add_argument(
        "--assume", dest="assumptions", action="append", default=[], metavar="NAME=VALUE",
        help="change an assumption, such as gpus=64 or mfu=0.4; overrides measurements too",
    )  # fmt: skip
    parser.add_argument("--reasons", action="store_true", help="list the assumptions with their reasons, and exit")
    parser.add_argument(
        "--stages", metavar="NAMES", help="show only these, separated by commas; checkpoint is the slowest to estimate"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="benchmark this machine first (about 30 s), and save the results"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, every number with its sources")


def warn_of_old_name(command: str) -> None:
    """Tell a user of the old name about the new one, on standard error."""
    if command == OLD_NAME:
        new_name = "`throughline plan` is now `throughline estimate`"
        print(f"{new_name}; the old name will be removed in the next release", file=sys.stderr)


def print_reasons() -> None:
    """Print every assumption with its value and its reason."""
    import textwrap

    from orchestration.cost.assumptions import Assumptions, reasons

    values = Assumptions().model_dump()
    for name, reason in reasons().items():
        value = values[name]
        print(f"{name} = {'none' if value is None else f'{value:,}' if isinstance(value, int) else value}")
        print("\n".join(textwrap.wrap(reason, 110, initial_indent="    ", subsequent_indent="    ")))


def run_estimate(arguments: argparse.Namespace, profile: "Profile") -> int:
    """Print the estimate; raises ThroughlineError for what the user can fix."""
    from orchestration.cost.assumptions import parse_assumptions
    from orchestration.cost.calibration import calibrate, load_calibration, save_calibration
    from orchestration.cost.estimate import estimate, estimate_json, estimated_stages
    from orchestration.cost.inputs import ProfileInputs
    from orchestration.cost.measurements import facts_of, measured_for
    from orchestration.cost.table import estimate_lines
    from orchestration.graph.graph import PartitionKind
    from orchestration.graph.nodes import GRAPH

    known = estimated_stages()
    shown = known if arguments.stages is None else arguments.stages.split(",")
    unknown = [name for name in shown if name not in known]
    if unknown:
        raise ThroughlineError(f"no stage {unknown[0]!r} in an estimate; there are {', '.join(known)}")
    words = [*([f"rows={arguments.rows}"] if arguments.rows is not None else []), *arguments.assumptions]
    assumptions, chosen = parse_assumptions(words)
    if arguments.calibrate:
        print("measuring this machine: filtering, decoding, writing shards", file=sys.stderr, flush=True)
        path = save_calibration(calibrate(profile, assumptions), profile)
        print(f"saved in {path}", file=sys.stderr)
    measured = load_calibration(profile) | measured_for(profile)
    counts = any(GRAPH[name].partition is PartitionKind.STRATEGY for name in shown)
    inputs = ProfileInputs(profile, assumptions, chosen, measured, facts_of(profile, count_parameters=counts))
    result = estimate(inputs, shown)
    if arguments.json:
        print(json.dumps(estimate_json(result, inputs), indent=1, ensure_ascii=False, allow_nan=False))
        return 0
    print("\n".join(estimate_lines(result, inputs)))
    if not any(name.startswith("filter_rows") for name in measured):
        print(
            "\n  No measurements of this machine yet: run `throughline estimate --calibrate`, which takes about 30 s."
        )
    return 0
