"""Runs one stage: ``python -m pipelines.runner images --config resolved.json [--config ...]``."""

import argparse
import sys
from pathlib import Path

from pipelines.core.errors import ThroughlineError
from pipelines.runner.registry import load_stage

parser = argparse.ArgumentParser(prog="python -m pipelines.runner", description="Run one stage of the graph.")
parser.add_argument("stage", help="a stage's name, such as images, or the module that defines one")
parser.add_argument("--config", type=Path, action="append", required=True, help="resolved request (JSON)")
arguments = parser.parse_args()
try:
    stage = load_stage(arguments.stage)
except ThroughlineError as error:
    sys.exit(f"error: {error}")
stage.run_requests(arguments.config)
