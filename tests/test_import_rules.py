"""The house's import rules hold: layers by the linter, light imports by a fresh process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

HEAVY = ("torch", "vllm", "ray", "transformers", "diffusers", "accelerate")

# Modules whose import the graph and the command line need: stages, their configuration, and what they share.
LIGHT = """
import importlib, pkgutil, sys
import orchestration.definitions
heavy = [name for name in {heavy!r} if name in sys.modules]
print(",".join(heavy))
"""


def test_layers_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_definitions_load_no_heavy_library() -> None:
    code = LIGHT.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
