"""Training in processes of its own: killed and resumed, several at once, several strategies in one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipelines.config import FrozenConfig
from pipelines.stage import StageOutput, StageRequest, write_request
from tests.training.conftest import TinyData
from training.config import CheckpointConfig, Strategy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 150


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _request(data: TinyData, config: FrozenConfig, root: Path, name: str, partition: str) -> Path:
    path = root / f"{name}.json"
    root.mkdir(parents=True, exist_ok=True)
    inputs = {key: [str(item.manifest_path) for item in items] for key, items in data.inputs.items()}
    write_request(
        path,
        StageRequest(
            stage="checkpoint",
            partition=partition,
            config=config.model_dump(mode="json"),
            inputs=inputs,
            output_root=str(root / "out"),
        ),
    )
    return path


def _command(requests: Sequence[Path], num_processes: int = 1) -> list[str]:
    configs = [word for path in requests for word in ("--config", str(path))]
    if num_processes == 1:
        return [sys.executable, "-m", "training.checkpoint", *configs]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--multi_cpu", "--num_machines", "1"]
    more = ["--num_processes", str(num_processes), "--main_process_port", str(port), "--mixed_precision", "no"]
    return [*launch, *more, "--dynamo_backend", "no", "-m", "training.checkpoint", *configs]


def _run(requests: Sequence[Path], num_processes: int = 1) -> list[StageOutput]:
    done = subprocess.run(
        _command(requests, num_processes),
        cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [StageOutput.load(Path(line)) for line in done.stdout.split()]


def _kill_when(requests: Sequence[Path], work: Path, num_snapshots_made: int) -> int:
    """Start training, send SIGKILL as soon as that snapshot exists; return how many steps it had done."""
    process = subprocess.Popen(
        _command(requests), cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        made = sorted(path.name for path in work.glob("*/scratch/snapshots/step-*") if not path.name.endswith(".tmp"))
        if made and int(made[-1].removeprefix("step-")) >= num_snapshots_made:
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.returncode == -signal.SIGKILL
            return int(made[-1].removeprefix("step-"))
        time.sleep(0.002)
    process.kill()
    assert process.stderr is not None
    raise AssertionError(f"training was not caught alive: {process.stderr.read().decode()[-2000:]}")


def _metrics(output: StageOutput) -> list[dict[str, float]]:
    return [json.loads(line) for line in output.path("metrics.jsonl").read_text().splitlines()]


def _config(data: TinyData, strategy: Strategy, **training: object) -> CheckpointConfig:
    return data.config(strategy, **{"steps": 40, "validate_every": 10, "checkpoint_every": 3, **training})


def test_killed_twice_and_resumed_equals_undisturbed(tiny_data: TinyData, tmp_path: Path) -> None:
    config = _config(tiny_data, Strategy.JOINT)
    whole_request = _request(tiny_data, config, tmp_path / "whole", "joint", "joint")
    request = _request(tiny_data, config, tmp_path / "killed", "joint", "joint")
    work = tmp_path / "killed" / "out" / "checkpoint" / "work"
    first = _kill_when([request], work, 6)
    second = _kill_when([request], work, first + 6)
    assert 6 <= first < second < 40
    (resumed,), (whole,) = _run([request]), _run([whole_request])
    assert resumed.manifest.measurements["resumed_at_step"] >= second
    assert whole.manifest.measurements["resumed_at_step"] == 0
    for name in ("model.safetensors", "metrics.jsonl", "ledger.parquet"):
        assert resumed.path(name).read_bytes() == whole.path(name).read_bytes(), name
    assert resumed.data_version == whole.data_version
    assert not list(work.glob("*/scratch"))


def test_two_processes_see_what_one_sees(tiny_data: TinyData, tmp_path: Path) -> None:
    strategies = (Strategy.DEPTH_WISE, Strategy.FUSE_DIT)
    one = [_request(tiny_data, _config(tiny_data, s, steps=8), tmp_path / "one", s.value, s.value) for s in strategies]
    two = [
        _request(tiny_data, _config(tiny_data, s, steps=8, num_processes=2), tmp_path / "two", s.value, s.value)
        for s in strategies
    ]
    singles, doubles = _run(one), _run(two, num_processes=2)
    assert [output.manifest.partition for output in doubles] == [strategy.value for strategy in strategies]
    for single, double in zip(singles, doubles, strict=True):
        assert double.manifest.measurements["num_processes"] == 2
        assert double.manifest.summary["consumption_digest"] == single.manifest.summary["consumption_digest"]
        assert double.path("ledger.parquet").read_bytes() == single.path("ledger.parquet").read_bytes()
        for a, b in zip(_metrics(single), _metrics(double), strict=True):
            assert a == pytest.approx(b, rel=1e-3)
    again = _run(two, num_processes=2)  # all followers hear that there is nothing to do
    assert [output.manifest.environment for output in again] == [output.manifest.environment for output in doubles]


def test_two_processes_resume_where_one_was_killed(tiny_data: TinyData, tmp_path: Path) -> None:
    config = _config(tiny_data, Strategy.STATIC)
    request = _request(tiny_data, config, tmp_path, "static", "static")
    killed_at = _kill_when([request], tmp_path / "out" / "checkpoint" / "work", 6)
    (output,) = _run([request], num_processes=2)
    assert output.manifest.measurements["resumed_at_step"] >= killed_at
    assert [row["step"] for row in _metrics(output)] == list(range(40))
    assert output.manifest.summary["num_samples_seen"] == 40 * 8


def test_a_corrupt_newest_snapshot_falls_back_and_ends_the_same(tiny_data: TinyData, tmp_path: Path) -> None:
    config = _config(tiny_data, Strategy.STATIC)
    request = _request(tiny_data, config, tmp_path / "killed", "static", "static")
    work = tmp_path / "killed" / "out" / "checkpoint" / "work"
    _kill_when([request], work, 9)
    newest = sorted(work.glob("*/scratch/snapshots/step-*"))[-1]
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    done = subprocess.run(
        _command([request]), cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True, timeout=150
    )
    assert newest.name in done.stderr
    assert "going back to the snapshot before it" in done.stderr
    (whole,) = _run([_request(tiny_data, config, tmp_path / "whole", "static", "static")])
    assert StageOutput.load(Path(done.stdout.strip())).data_version == whole.data_version


def test_an_error_stops_all_processes_with_one_sentence(tiny_data: TinyData, tmp_path: Path) -> None:
    config = _config(tiny_data, Strategy.STATIC, num_processes=2).model_copy(update={"template_version": "released-1"})
    request = _request(tiny_data, config, tmp_path, "static", "static")
    done = subprocess.run(
        _command([request], 2), cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode != 0
    assert "error: text_features" in done.stderr
    assert not list(tmp_path.glob("out/checkpoint/*/manifest.json"))
