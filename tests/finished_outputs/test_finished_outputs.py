"""Outputs of earlier releases stay valid: nothing that a team has computed is computed again after an upgrade.

`manifests.json` holds a manifest of each stage of a demo run by version 0.1, without environment and measurements,
which are in no digest; `root` holds a small finished output, bytes and all. If a stage's results change on purpose, its
`code_version` is raised and its manifest here is replaced in the same commit.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestration.graph.nodes import GRAPH
from pipelines.core.manifest import MANIFEST_NAME, Manifest, parse_manifest
from pipelines.runner.outputs import Inputs
from pipelines.runner.registry import load_stage
from pipelines.runner.stage import Stage

HERE = Path(__file__).parent
MANIFESTS: dict[str, Any] = json.loads((HERE / "manifests.json").read_text())
OPTIONAL = {"laion_selection", "trajectory_analysis"}
"""Stages that the demo's profile leaves out."""


@dataclass(frozen=True)
class _Version:
    data_version: str


def _manifest(name: str) -> Manifest:
    """Return a stored manifest; raises if its content digest is not its data version."""
    return parse_manifest(json.dumps(MANIFESTS[name]).encode(), name)


def _inputs(manifest: Manifest) -> Any:
    return {name: [_Version(ref.data_version) for ref in refs] for name, refs in manifest.inputs.items()}


def test_every_stage_of_the_demo_has_its_manifest() -> None:
    assert MANIFESTS.keys() == GRAPH.nodes.keys() - OPTIONAL


@pytest.mark.parametrize("name", MANIFESTS)
def test_data_version_and_fingerprint_are_those_of_the_release_that_made_them(name: str) -> None:
    manifest = _manifest(name)
    stage = load_stage(manifest.stage)
    config = stage.config_type.model_validate(manifest.execution)
    assert stage.fingerprint(config, _inputs(manifest), manifest.partition) == manifest.fingerprint


def test_a_finished_output_is_taken_over_without_computing(tmp_path: Path) -> None:
    shutil.copytree(HERE / "root", tmp_path / "root")
    stage: Stage[Any] = load_stage("prompt_sets")
    manifest = _manifest("prompt_sets")
    inputs: Inputs = {}
    output = stage.run(stage.config_type.model_validate(manifest.execution), inputs, tmp_path / "root", verify="digest")
    assert output.manifest == manifest
    (folder,) = (path.parent for path in (tmp_path / "root").glob(f"*/*/{MANIFEST_NAME}"))
    assert output.folder == folder
