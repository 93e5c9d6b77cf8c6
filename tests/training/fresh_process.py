"""Code in a process of its own, which knows the project and an empty cache of hubs, and reaches none."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def printed_by(code: str, home: Path, *arguments: str) -> list[str]:
    """Run code in the folder `home`, which holds the hubs' cache too, and return the lines that it prints."""
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
