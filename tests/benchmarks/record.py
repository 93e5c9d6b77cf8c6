"""Writes what a benchmark measured, with the machine, the versions and the command that measured it."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.core.environment import accelerator, git_commit, package_versions

RESULTS = Path(__file__).parent / "results"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def write_results(name: str, measured: dict[str, Any]) -> Path:
    """Write ``results/<date>-<name>.json`` and print the figures; a second run on the same day replaces the first."""
    now = datetime.now(UTC)
    record = {
        "benchmark": name,
        "command": "python -m " + " ".join([f"tests.benchmarks.{name}", *sys.argv[1:]]),
        "measured_at": now.isoformat(timespec="minutes"),
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "accelerator": accelerator()},
        "python": platform.python_version(),
        "versions": package_versions(),
        "git_commit": git_commit(),
        "measured": measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    for key, value in measured.items():
        print(f"{key:<40} {value}")
    print(f"-> {path}")
    return path
