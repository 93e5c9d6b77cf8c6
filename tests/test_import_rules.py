"""The house's import rules hold: layers by the linter, light imports by a fresh process."""

import os
import re
import subprocess
import sys
import tomllib
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


DRIVER = """
import sys
import tomllib


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
from orchestration.definitions import definitions
print(len(list(definitions().resolve_all_asset_specs())))
"""


def test_definitions_load_where_only_the_driver_extra_is_installed(tmp_path: Path) -> None:
    """Nothing that the extra leaves out can be imported, heavy or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    present = {_name(line) for line in project["dependencies"] + extras["driver"]}
    left_out = {_name(line) for extra in ("models", "cpu", "gpu") for line in extras[extra]} - present - {"throughline"}
    assert {"torch", "vllm", "ray", "transformers"} <= left_out
    code = DRIVER.format(absent=left_out)
    environment = os.environ | {"THROUGHLINE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 15


def _name(requirement: str) -> str:
    """Return the import name of a requirement; all that differ from their package's are not needed here."""
    return re.split(r"[^\w.-]", requirement)[0].replace("-", "_")
