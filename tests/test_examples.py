"""The scripts in examples/ run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = {
    "filter_laion.py": ("21 rows in, 13 kept", "4 dropped: aspect_extreme", "1 dropped: duplicate_pair"),
    "fuse_layers.py": ("depth_wise   4 set(s)", "time_wise    1 set(s) of 8 layer weights, changing"),
    "own_stage.py": ("rows_in=2 rows_out=1", "'too_long': 1"),
}


def test_every_example_is_run_here() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == EXPECTED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs_and_prints_what_it_promises(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / name), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for line in EXPECTED[name]:
        assert line in done.stdout, done.stdout
