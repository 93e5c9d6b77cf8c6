"""Training in subprocesses: killed and resumed, several at once, several strategies in one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipelines.core.config import FrozenConfig
from pipelines.runner.outputs import StageOutput
from pipelines.runner.request import StageRequest, write_request
from tests.training.conftest import TinyData
from tests.training.loop.test_checkpoint import flat, metrics
from training.config import CheckpointConfig, Strategy
from training.loop.checkpoint import STAGE
from training.models.build import build_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_SECONDS = 300


def _environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "MASTER_"))}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}


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
        return [sys.executable, "-m", "pipelines.runner", "checkpoint", *configs]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # accelerate's own --cpu starts a single process without MPI; with ACCELERATE_USE_CPU this form is gloo on the CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    more = ["--num_processes", str(num_processes), "--main_process_port", str(port), "--mixed_precision", "no"]
    return [*launch, *more, "--dynamo_backend", "no", "-m", "pipelines.runner", "checkpoint", *configs]


def _run(requests: Sequence[Path], num_processes: int = 1) -> list[StageOutput]:
    return _run_with_stderr(requests, num_processes)[0]


def _run_with_stderr(requests: Sequence[Path], num_processes: int) -> tuple[list[StageOutput], str]:
    """Run to the end; return the outputs and standard error."""
    done = subprocess.run(
        _command(requests, num_processes),
        cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [StageOutput.load(Path(line)) for line in done.stdout.split()], done.stderr


def _kill_when(requests: Sequence[Path], work: Path, num_snapshots_made: int, num_processes: int = 1) -> int:
    """Start training, send SIGKILL to all its processes once a snapshot of so many steps exists; return its steps."""
    process = subprocess.Popen(
        _command(requests, num_processes),
        cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        made = sorted(path.name for path in work.glob("*/scratch/snapshots/step-*") if not path.name.endswith(".tmp"))
        if made and int(made[-1].removeprefix("step-")) >= num_snapshots_made:
            _kill(process)
            assert process.returncode == -signal.SIGKILL
            return int(made[-1].removeprefix("step-"))
        time.sleep(0.002)
    _kill(process)
    assert process.stderr is not None
    raise AssertionError(f"training was not caught alive: {process.stderr.read().decode()[-2000:]}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGKILL to a process and its descendants: the launcher's workers have sessions of their own."""
    family = [process.pid]
    with suppress(psutil.NoSuchProcess):
        family += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _config(data: TinyData, strategy: Strategy, **training: object) -> CheckpointConfig:
    return data.config(strategy, **{"steps": 40, "validate_every": 10, "checkpoint_every": 3, **training})


@pytest.fixture(scope="module")
def whole(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> StageOutput:
    """The uninterrupted run that killed ones must equal."""
    torch.set_num_threads(1)
    config = _config(tiny_data, Strategy.JOINT)
    return STAGE.run(config, tiny_data.inputs, tmp_path_factory.mktemp("whole"), "joint")


def test_killed_twice_and_resumed_equals_uninterrupted(tiny_data: TinyData, whole: StageOutput, tmp_path: Path) -> None:
    request = _request(tiny_data, _config(tiny_data, Strategy.JOINT), tmp_path, "joint", "joint")
    work = tmp_path / "out" / "checkpoint" / "unfinished"
    first = _kill_when([request], work, 6)
    second = _kill_when([request], work, first + 6)
    assert 6 <= first < second < 40
    (resumed,) = _run([request])
    assert resumed.manifest.measurements["resumed_at_step"] >= second
    assert whole.manifest.measurements["resumed_at_step"] == 0
    for name in ("model.safetensors", "metrics.jsonl", "ledger.parquet"):
        assert resumed.path(name).read_bytes() == whole.path(name).read_bytes(), name
    assert resumed.data_version == whole.data_version
    assert not list(work.glob("*/scratch"))


def test_a_corrupt_newest_snapshot_falls_back_and_ends_the_same(
    tiny_data: TinyData, whole: StageOutput, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config(tiny_data, Strategy.JOINT)
    request = _request(tiny_data, config, tmp_path, "joint", "joint")
    _kill_when([request], tmp_path / "out" / "checkpoint" / "unfinished", 9)
    newest = sorted(tmp_path.glob("out/checkpoint/unfinished/*/scratch/snapshots/step-*[0-9]"))[-1]
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\xff")
    resumed = STAGE.run(config, tiny_data.inputs, tmp_path / "out", "joint")
    assert newest.name in caplog.text
    assert "going back to the snapshot before it" in caplog.text
    assert 0 < resumed.manifest.measurements["resumed_at_step"] < int(newest.name.removeprefix("step-"))
    assert resumed.data_version == whole.data_version


def test_two_processes_consume_what_one_does(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategies = (Strategy.DEPTH_WISE, Strategy.FUSE_DIT)
    configs = [_config(tiny_data, strategy, steps=8) for strategy in strategies]
    singles = [STAGE.run(config, tiny_data.inputs, tmp_path / "one", config.strategy.value) for config in configs]
    _interrupt_at(monkeypatch, 5, configs[1], tiny_data, tmp_path / "two" / "out")
    two = [
        _request(tiny_data, _config(tiny_data, s, steps=8, num_processes=2), tmp_path / "two", s.value, s.value)
        for s in strategies
    ]
    first, second, first_again = _run([*two, two[0]], num_processes=2)
    assert first_again == first  # the follower received that nothing was left to do
    assert second.manifest.measurements["resumed_at_step"] == 3
    for single, double in zip(singles, (first, second), strict=True):
        assert double.manifest.partition == single.manifest.partition
        assert double.manifest.measurements["num_processes"] == 2
        assert double.manifest.summary["consumption_digest"] == single.manifest.summary["consumption_digest"]
        assert double.path("ledger.parquet").read_bytes() == single.path("ledger.parquet").read_bytes()
        for a, b in zip(metrics(single), metrics(double), strict=True):
            assert flat(a) == pytest.approx(flat(b), rel=1e-3)


def test_sharded_processes_give_the_losses_of_one_and_resume(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 over two gloo processes: a run from the start, and one from a snapshot that a single process made."""
    config = _config(tiny_data, Strategy.JOINT, steps=8)
    single = STAGE.run(config, tiny_data.inputs, tmp_path / "one", "joint")
    _interrupt_at(monkeypatch, 5, config, tiny_data, tmp_path / "from_one" / "out")
    sharded = _config(
        tiny_data, Strategy.JOINT, steps=8, num_processes=2, sharded=True, accumulation_steps=2,
        checkpoint_activations=True,
    )  # fmt: skip
    folders = [tmp_path / name for name in ("fresh", "from_one")]
    fresh, from_one = _run([_request(tiny_data, sharded, folder, "joint", "joint") for folder in folders], 2)
    assert from_one.manifest.measurements["resumed_at_step"] == 3
    for double in (fresh, from_one):
        assert double.manifest.measurements["num_processes"] == 2
        assert double.path("ledger.parquet").read_bytes() == single.path("ledger.parquet").read_bytes()
        for a, b in zip(metrics(single), metrics(double), strict=True):
            assert flat(a) == pytest.approx(flat(b), rel=1e-3)
        one, two = load_file(single.path("model.safetensors")), load_file(double.path("model.safetensors"))
        assert {name: tensor.shape for name, tensor in one.items()} == {n: tensor.shape for n, tensor in two.items()}
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


_SHARDED = {"num_processes": 2, "sharded": True}


def test_sharded_processes_killed_and_resumed_equal_uninterrupted_ones(tiny_data: TinyData, tmp_path: Path) -> None:
    """From the newest snapshot, and, where one of its files is missing, from the one before."""
    config = _config(tiny_data, Strategy.JOINT, steps=24, max_shard_bytes=100_000, **_SHARDED)
    killed, damaged, undisturbed = (tmp_path / name for name in ("killed", "damaged", "undisturbed"))
    requests = [_request(tiny_data, config, folder, "joint", "joint") for folder in (killed, damaged, undisturbed)]
    steps = _kill_when(requests[:1], killed / "out" / "checkpoint" / "unfinished", 9, num_processes=2)
    assert 9 <= steps < 24
    shutil.copytree(killed / "out", damaged / "out")
    newest = sorted(damaged.glob("out/checkpoint/unfinished/*/scratch/snapshots/step-*[0-9]"))[-1]
    pieces = sorted(newest.glob("tensors-*.safetensors"))
    assert len(pieces) > 2
    pieces[1].unlink()
    outputs, said = _run_with_stderr(requests, num_processes=2)
    resumed, from_before, whole = outputs
    newest_steps = int(newest.name.removeprefix("step-"))
    assert resumed.manifest.measurements["resumed_at_step"] == newest_steps
    assert from_before.manifest.measurements["resumed_at_step"] == newest_steps - 3
    assert whole.manifest.measurements["resumed_at_step"] == 0
    (sentence,) = (line for line in said.splitlines() if "going back to the snapshot before it" in line)
    assert newest.name in sentence and pieces[1].name in sentence
    assert {entry.path for entry in whole.manifest.files} >= {"model.safetensors.index.json", "metrics.jsonl"}
    for output in (resumed, from_before):
        for entry in whole.manifest.files:
            assert output.path(entry.path).read_bytes() == whole.path(entry.path).read_bytes(), entry.path
        assert output.data_version == whole.data_version


@pytest.mark.parametrize(
    "compiled",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
        ),
    ],
)
def test_sharded_bfloat16_stays_close_to_unsharded(compiled: bool, tiny_data: TinyData, tmp_path: Path) -> None:
    """Autocast over FSDP2, plain and compiled, against autocast in one process."""
    settings = {"steps": 12, "validate_every": 6, "precision": "bfloat16"}
    strategies = (Strategy.JOINT,) if compiled else (Strategy.JOINT, Strategy.FUSE_DIT)
    singles = _run([_request(tiny_data, _config(tiny_data, s, **settings), tmp_path / "one", s, s) for s in strategies])
    sharded = {**settings, **_SHARDED, "compile": compiled}
    doubles = _run(
        [_request(tiny_data, _config(tiny_data, s, **sharded), tmp_path / "two", s, s) for s in strategies], 2
    )
    for single, double in zip(singles, doubles, strict=True):
        assert double.manifest.measurements["num_processes"] == 2
        assert double.path("ledger.parquet").read_bytes() == single.path("ledger.parquet").read_bytes()
        for a, b in zip(metrics(single), metrics(double), strict=True):
            assert flat(a) == pytest.approx(flat(b), rel=0.02)
        one, two = load_file(single.path("model.safetensors")), load_file(double.path("model.safetensors"))
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in one.items()} == {
            name: (tensor.shape, torch.float32) for name, tensor in two.items()
        }
        # AdamW moves a weight whose gradient is all rounding as far as any other, so single weights may well differ.
        config = _config(tiny_data, Strategy(single.manifest.partition or ""), **settings)
        start = build_model(config.model, config.strategy, seed=config.training.seed).state_dict()
        assert all(tensor.isfinite().all() for tensor in two.values())
        moved = sum(float((one[name] - start[name]).square().sum()) for name in one) ** 0.5
        apart = sum(float((one[name] - two[name]).square().sum()) for name in one) ** 0.5
        assert apart < 0.2 * moved  # 1 to 6 % in several runs; unrelated ways of one length end 140 % apart


def _interrupt_at(
    monkeypatch: pytest.MonkeyPatch, step: int, config: CheckpointConfig, data: TinyData, root: Path
) -> None:
    """Run in one process and stop at a step, leaving the unfinished run."""
    from training.loop import loop

    original = loop.train_step

    def interrupted(run: loop.TrainingRun, at_step: int) -> loop.StepResult:
        if at_step == step:
            raise KeyboardInterrupt
        return original(run, at_step)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(config, data.inputs, root, config.strategy.value)
    monkeypatch.undo()


def test_an_error_stops_all_processes_with_one_message(tiny_data: TinyData, tmp_path: Path) -> None:
    config = _config(tiny_data, Strategy.STATIC, num_processes=2).model_copy(update={"template_version": "released-1"})
    request = _request(tiny_data, config, tmp_path, "static", "static")
    done = subprocess.run(
        _command([request], 2), cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode != 0
    assert "error: text_features" in done.stderr
    assert not list(tmp_path.glob("out/checkpoint/*/manifest.json"))
