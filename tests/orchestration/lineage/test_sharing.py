"""Several processes share one output root and one Dagster instance."""

import os
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest

from orchestration.defs.instance import open_instance
from pipelines.core.manifest import MANIFEST_NAME, damaged_files, read_manifest
from tests.orchestration.conftest import NUMBERS
from tests.orchestration.small import run_all

ROOT = Path(__file__).parents[3]


def run_two_at_once(tmp_path: Path, home: Path) -> list[str]:
    """Start two full runs over one home simultaneously; return their standard error."""
    go = tmp_path / "go"
    ready = [tmp_path / f"ready-{number}" for number in range(2)]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", run_all.__name__, str(home), str(tmp_path / "starts"), str(path), str(go)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )
        for path in ready
    ]  # fmt: skip
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in ready):
        assert [run.poll() for run in runs] == [None, None], "a run ended before it was ready"
        assert time.monotonic() < deadline, "not ready within two minutes"
        time.sleep(0.05)
    go.touch()
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], "\n".join(errors)
    return errors


def versions(output_root: Path) -> set[str]:
    manifests = {path: read_manifest(path) for path in output_root.glob(f"*/*/{MANIFEST_NAME}")}
    problems = [damaged_files(path.parent, found, read_bytes=True) for path, found in manifests.items()]
    assert not any(problems)
    return {f"{found.stage} {found.partition} {found.data_version}" for found in manifests.values()}


@pytest.mark.slow
def test_two_concurrent_runs_give_the_same_outputs_as_one(
    tmp_path: Path, finished_outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("DAGSTER_HOME", str(home / "dagster"))
    run_two_at_once(tmp_path, home)
    assert versions(home / "outputs") == versions(finished_outputs)
    computed = [line.split()[1] for line in (tmp_path / "starts").read_text().splitlines()]
    assert sorted(computed) == sorted(NUMBERS), "each part was computed once"
    with open_instance(home) as instance:
        assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.SUCCESS] * 2
        assert instance.get_dynamic_partitions("part") == list(NUMBERS)
