import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.graph.execution import Execution
from orchestration.launch import reaper
from orchestration.launch.launcher import (
    ON_OTHER_MACHINE,
    AccelerateLaunch,
    Launcher,
    LocalLaunch,
    RayJobLaunch,
    StageFailed,
)
from pipelines.core.errors import ThroughlineError
from pipelines.runner.request import StageRequest
from tests.orchestration.conftest import Recorder, execution_of
from tests.orchestration.small.stages import KeepConfig, SmallProfile


def _with_index(profile: SmallProfile) -> Execution:
    execution = execution_of(profile)
    execution.materialize("laion_index", [None], Recorder())
    return execution


@pytest.mark.slow
def test_several_partitions_run_in_one_process(profile: SmallProfile, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    profile.keep = KeepConfig(starts=str(starts))
    recorder = Recorder()
    outcomes = _with_index(profile).materialize("kept", ["00000", "00001", "00002"], recorder)
    assert len({line.split()[0] for line in starts.read_text().splitlines()}) == 1
    assert [outcome.reused for outcome in outcomes] == [False, False, False]
    assert [record["label"] for record in recorder.records if record["done"] == record["total"]] == [
        "kept 00000",
        "kept 00001",
        "kept 00002",
    ]


@pytest.mark.slow
def test_a_finished_output_starts_no_process(profile: SmallProfile, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    profile.keep = KeepConfig(starts=str(starts))
    execution = _with_index(profile)
    execution.materialize("kept", ["00000"], Recorder())
    outcomes = execution.materialize("kept", ["00000", "00001"], Recorder())
    assert [outcome.reused for outcome in outcomes] == [True, False]
    assert [line.split()[1] for line in starts.read_text().splitlines()] == ["00000", "00001"]


@pytest.mark.slow
def test_the_stages_own_error_is_reported(profile: SmallProfile) -> None:
    profile.keep = KeepConfig(fail_at="00001")
    execution = _with_index(profile)
    with pytest.raises(StageFailed, match=r"^part 00001: expected even numbers, found 3; .* \(log: .*\.log\)$"):
        execution.materialize("kept", ["00000", "00001", "00002"], Recorder())
    assert execution.plan.task("kept", "00000").output is not None, "outputs finished earlier are kept"
    assert execution.plan.task("kept", "00002").output is None


@pytest.mark.slow
def test_a_crash_is_reported_with_its_exception_and_log(profile: SmallProfile) -> None:
    profile.keep = KeepConfig(crash_at="00000")
    with pytest.raises(StageFailed) as caught:
        _with_index(profile).materialize("kept", ["00000"], Recorder())
    message = str(caught.value)
    assert "kept 00000: its process exited with status 1: RuntimeError: a bug of the stage" in message
    log = Path(message.rpartition("log: ")[2].rstrip(")"))
    assert "Traceback" in log.read_text()


@pytest.mark.slow
def test_a_killed_stage_is_reported(profile: SmallProfile) -> None:
    profile.keep = KeepConfig(kill_at="00000")
    with pytest.raises(StageFailed, match="kept 00000: its process was killed by SIGKILL; the machine may have"):
        _with_index(profile).materialize("kept", ["00000"], Recorder())


def test_a_task_with_missing_inputs_is_refused(profile: SmallProfile) -> None:
    with pytest.raises(ThroughlineError, match=r"total can't start: .*the parts of kept are unknown"):
        execution_of(profile).materialize("total", [None], Recorder())


def test_a_stage_stops_when_its_launcher_is_killed(tmp_path: Path) -> None:
    """The launcher dies by SIGKILL and can't clean up; the stage and its worker stop all the same."""
    module = tmp_path / "slow_stages" / "sleeper.py"
    module.parent.mkdir()
    module.write_text(
        "import subprocess, sys\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])\n"
        "print(worker.pid, flush=True)\n"
        "worker.wait()\n"
    )
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from orchestration.launch.launcher import Launcher, LocalLaunch\n"
        "from pipelines.runner.request import StageRequest\n"
        "request = StageRequest(stage='sleeper', config={}, output_root='unused')\n"
        "launcher = Launcher(Path(sys.argv[1]), on_line=lambda line: print(line, flush=True))\n"
        "launcher.run('slow_stages.sleeper', [request], LocalLaunch())\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen(
        [sys.executable, str(driver), str(tmp_path / "logs")], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while _is_running(worker):
        assert time.monotonic() < deadline, "the stage outlived its launcher"
        time.sleep(0.05)


@pytest.mark.parametrize("ignored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_reaper_waits_for_a_clean_exit_up_to_its_limit(tmp_path: Path, ignored: bool) -> None:
    """The stage exits at once, its worker after cleaning up; the reaper waits for both."""
    done = tmp_path / "done"
    worker = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), pathlib.Path({str(done)!r}).touch(), sys.exit()))\n"
        "print('ready', flush=True)\ntime.sleep(120)\n"
    )
    stage = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {worker!r}])\ntime.sleep(120)\n"
    before = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignored else ""
    command = [sys.executable, reaper.__file__, str(os.getpid()), sys.executable, "-c", before + stage]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.terminate()
    if ignored:  # the stage ignores SIGTERM and is killed at the reaper's time limit
        assert process.wait(2 * reaper._STOP_SECONDS) == -signal.SIGKILL
    else:
        assert process.wait(reaper._STOP_SECONDS - 3) == -signal.SIGKILL
    assert done.exists()


def _is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_accelerate_reads_the_configuration_written_for_it(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    form = AccelerateLaunch(
        num_processes=16, num_machines=2, mixed_precision="bf16", main_process_ip="10.0.0.1", main_process_port=29500
    )
    ((path, content),) = form.files([tmp_path / "1.json"]).items()
    path.write_text(content)
    read = load_config_from_file(str(path))
    assert (read.num_processes, read.num_machines, read.machine_rank) == (16, 2, 0)
    assert (read.main_process_ip, read.main_process_port, read.mixed_precision) == ("10.0.0.1", 29500, "bf16")
    assert read.distributed_type == "MULTI_GPU"
    first, second = (form.command_on(rank, "training.loop.checkpoint", [tmp_path / "1.json"]) for rank in (0, 1))
    assert first == form.command("training.loop.checkpoint", [tmp_path / "1.json"])
    assert first[first.index("--config_file") + 1] == str(path)
    differing = [(one, two) for one, two in zip(first, second, strict=True) if one != two]
    assert differing == [("0", "1")]
    assert first[first.index("0") - 1] == "--machine_rank"


@pytest.mark.slow
def test_two_machines_train_what_one_process_trains(tmp_path: Path) -> None:
    """Two launchers of rank 0 and 1 on the loopback interface; the second runs the command that users are shown."""
    from tests.tiny_models import write_causal_lm
    from tests.training.conftest import NUM_LAYERS, write_tiny_data
    from tests.training.loop.test_checkpoint import flat, metrics
    from training.config import Strategy
    from training.loop.checkpoint import STAGE

    data = write_tiny_data(tmp_path / "inputs", write_causal_lm(tmp_path / "llm", num_layers=NUM_LAYERS))

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    form = AccelerateLaunch(
        num_processes=2, num_machines=2, cpu=True, main_process_ip="127.0.0.1", main_process_port=port
    )
    second: list[subprocess.Popen[bytes]] = []

    def start_second(line: str) -> None:
        if line.startswith(ON_OTHER_MACHINE):
            rank, _, command = line.removeprefix(ON_OTHER_MACHINE).strip().partition(": ")
            assert rank == "1"
            environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
            second.append(subprocess.Popen(shlex.split(command), env=environment, stderr=subprocess.DEVNULL))

    two = data.config(Strategy.JOINT, steps=8, num_processes=2)
    request = StageRequest(
        stage="checkpoint",
        partition="joint",
        config=two.model_dump(mode="json"),
        inputs={name: [str(item.manifest_path) for item in items] for name, items in data.inputs.items()},
        output_root=str(tmp_path / "two"),
    )
    try:
        Launcher(tmp_path / "logs", on_line=start_second).run("training.loop.checkpoint", [request], form)
        (other,) = second
        assert other.wait(60) == 0
    finally:
        for process in second:
            process.kill()
    single = STAGE.run(data.config(Strategy.JOINT, steps=8), data.inputs, tmp_path / "one", "joint")
    double = STAGE.find_finished(two, data.inputs, tmp_path / "two", "joint")
    assert double is not None
    assert double.manifest.measurements["num_processes"] == 2
    assert double.manifest.summary["consumption_digest"] == single.manifest.summary["consumption_digest"]
    assert double.path("ledger.parquet").read_bytes() == single.path("ledger.parquet").read_bytes()
    for a, b in zip(metrics(single), metrics(double), strict=True):
        assert flat(a) == pytest.approx(flat(b), rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_processes": 4, "num_machines": 2}, "several machines need main_process_ip"),
        ({"num_processes": 3, "num_machines": 2}, "not a multiple of num_machines"),
        ({"num_processes": 2, "machine_rank": 1}, "machine_rank 1: expected at most 0"),
    ],
)
def test_inconsistent_machines_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccelerateLaunch.model_validate(fields)


def test_launch_forms_pass_every_request_to_the_module() -> None:
    requests = [Path("/r/1.json"), Path("/r/2.json")]
    ends = ["--config", "/r/1.json", "--config", "/r/2.json"]
    for form in (LocalLaunch(), AccelerateLaunch(num_processes=2, cpu=True), RayJobLaunch(environment={"A": "1"})):
        command = form.command("pipelines.download.images", requests)
        assert command[-4:] == ends
        assert command[-5] == "pipelines.download.images"
    several = AccelerateLaunch(num_processes=2, cpu=True)
    assert "--cpu" not in several.command("training.loop.checkpoint", requests)  # it would start only one process
    assert several.variables["ACCELERATE_USE_CPU"] == "true"
    assert "--cpu" in AccelerateLaunch(cpu=True).command("training.loop.checkpoint", requests)
    command = RayJobLaunch(environment={"A": "1"}).command("pipelines.download.images", requests)
    runtime = json.loads(command[command.index("--runtime-env-json") + 1])
    assert runtime["env_vars"] == {"A": "1", "THROUGHLINE_PROGRESS_JSON": "1"}
