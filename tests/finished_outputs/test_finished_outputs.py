"""Outputs of earlier releases stay valid: nothing that a team has computed is computed again after an upgrade.

`manifests` holds one manifest of each stage of a demo run by version 0.1, without environment and measurements, which
are in no digest; `root` holds a small finished output, bytes and all. If a stage's results change on purpose, its
`code_version` is raised and its manifest here is replaced in the same commit.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestration.graph.nodes import GRAPH
from pipelines.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from pipelines.runner.outputs import Inputs
from pipelines.runner.registry import load_stage
from pipelines.runner.stage import Stage

HERE = Path(__file__).parent
MANIFESTS = sorted((HERE / "manifests").glob("*.json"))
OPTIONAL = {"laion_selection", "trajectory_analysis"}
"""Stages that the demo's profile leaves out."""


@dataclass(frozen=True)
class _Version:
    data_version: str


def _inputs(manifest: Manifest) -> Any:
    return {name: [_Version(ref.data_version) for ref in refs] for name, refs in manifest.inputs.items()}


def test_every_stage_of_the_demo_has_its_manifest() -> None:
    assert {path.stem for path in MANIFESTS} == GRAPH.nodes.keys() - OPTIONAL


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_data_version_and_fingerprint_are_those_of_the_release_that_made_them(path: Path) -> None:
    manifest = read_manifest(path)  # raises where the content digest is not the data version
    stage = load_stage(manifest.stage)
    config = stage.config_type.model_validate(manifest.execution)
    assert stage.fingerprint(config, _inputs(manifest), manifest.partition) == manifest.fingerprint


def test_a_finished_output_is_taken_over_without_computing(tmp_path: Path) -> None:
    shutil.copytree(HERE / "root", tmp_path / "root")
    stage: Stage[Any] = load_stage("prompt_sets")
    manifest = read_manifest(HERE / "manifests" / "prompt_sets.json")
    inputs: Inputs = {}
    output = stage.run(stage.config_type.model_validate(manifest.execution), inputs, tmp_path / "root", verify="digest")
    assert output.manifest == manifest
    (folder,) = (path.parent for path in (tmp_path / "root").glob(f"*/*/{MANIFEST_NAME}"))
    assert output.folder == folder
