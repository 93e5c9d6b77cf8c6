"""Runs code in a fresh process with the project, an empty hub cache and no network."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def printed_by(code: str, home: Path, *arguments: str) -> list[str]:
    """Run code in the folder `home`, which also holds the hub cache, and return the lines that it prints."""
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
