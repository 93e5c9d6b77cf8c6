"""The command `throughline plan`: what a profile will take, stage by stage, before anything is run."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments, the profile's apart; imports nothing heavy."""
    parser.add_argument("--rows", metavar="N", help="rows of metadata, such as 4e8; default: those there are, or 413 M")
    parser.add_argument(
        "--assume", dest="assumptions", action="append", default=[], metavar="NAME=VALUE",
        help="change an assumption, such as gpus=64 or mfu=0.4; it stands before what was measured too",
    )  # fmt: skip
    parser.add_argument("--reasons", action="store_true", help="list the assumptions, each with its reason, and stop")
    parser.add_argument("--stages", metavar="NAMES", help="show these alone, with commas; checkpoint takes the longest")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure this machine first (about 30 s), and keep what was measured"
    )
    parser.add_argument("--json", action="store_true", help="as JSON, every figure with what it rests on")


def print_reasons() -> None:
    """Print every assumption with its value and its reason."""
    import textwrap

    from orchestration.cost.assumptions import Assumptions, reasons

    values = Assumptions().model_dump()
    for name, reason in reasons().items():
        value = values[name]
        print(f"{name} = {'none' if value is None else f'{value:,}' if isinstance(value, int) else value}")
        print("\n".join(textwrap.wrap(reason, 110, initial_indent="    ", subsequent_indent="    ")))


def run_plan(arguments: argparse.Namespace, profile: "Profile") -> int:
    """Print the estimate; raises ThroughlineError for what the user can mend."""
    from orchestration.cost.assumptions import parse_assumptions
    from orchestration.cost.calibration import calibrate, keep, kept_calibration
    from orchestration.cost.inputs import Inputs
    from orchestration.cost.measurements import facts_of, measured_for
    from orchestration.cost.stages import STAGES, estimate, estimate_json
    from orchestration.cost.table import estimate_lines

    wanted = STAGES if arguments.stages is None else tuple(arguments.stages.split(","))
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        raise ThroughlineError(f"no stage {unknown[0]!r} in an estimate; there are {', '.join(STAGES)}")
    words = [*([f"rows={arguments.rows}"] if arguments.rows is not None else []), *arguments.assumptions]
    assumptions, chosen = parse_assumptions(words)
    if arguments.calibrate:
        print("measuring this machine: filtering, decoding, writing shards", file=sys.stderr, flush=True)
        found = calibrate(profile, assumptions)
        print(f"kept in {keep(found, profile)}", file=sys.stderr)
    measured = kept_calibration(profile) | measured_for(profile)
    facts = facts_of(profile, count_parameters="checkpoint" in wanted)
    inputs = Inputs(profile, assumptions, chosen, measured, facts)
    result = estimate(inputs, wanted)
    if arguments.json:
        print(json.dumps(estimate_json(result, inputs), indent=1, ensure_ascii=False, allow_nan=False))
        return 0
    print("\n".join(estimate_lines(result, inputs)))
    if not any(name.startswith("filter_rows") for name in measured):
        print("\n  Nothing of this machine is measured yet: throughline plan --calibrate does it in about 30 s.")
    return 0
