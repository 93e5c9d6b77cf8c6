"""Starts a stage's process in one of three forms, relays its progress, and reports its failure as one sentence.

In every form the result is the manifest that the stage writes; its output lines are only for people.
"""

import ctypes
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.core.config import FrozenConfig
from pipelines.core.environment import PROGRESS_JSON
from pipelines.core.errors import ThroughlineError
from pipelines.runner.request import StageRequest, write_request

RUNNER = "pipelines.runner"
"""Module that runs the stage defined in the module given to it."""
PROJECT_ROOT = Path(__file__).resolve().parents[2]
_REAPER = PROJECT_ROOT / "orchestration" / "launch" / "reaper.py"
ON_OTHER_MACHINE = "start on machine"
"""Prefix of the line that gives another machine's rank and command."""
_PROGRESS_MARK = '{"progress":'
_ERROR_MARK = "error: "
_TAIL_LINES = 400
_STOP_SECONDS = 15.0
_PR_SET_PDEATHSIG = 1
_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class LocalLaunch(FrozenConfig):
    """One process on this machine."""

    form: Literal["local"] = "local"
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables that override those of this process."""

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the process."""
        return self.environment

    def command(self, module: str, requests: Sequence[Path]) -> list[str]:
        return [sys.executable, "-m", RUNNER, module, *_config_arguments(requests)]


class AccelerateLaunch(FrozenConfig):
    """``accelerate launch``: one or several processes, on one or several machines."""

    form: Literal["accelerate"] = "accelerate"
    environment: dict[str, str] = Field(default_factory=dict)
    num_processes: int = Field(1, ge=1)
    """Processes on all machines together: one per GPU."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    cpu: bool = False
    """Run on the CPU, with gloo between processes."""
    num_machines: int = Field(1, ge=1)
    machine_rank: int = Field(0, ge=0)
    main_process_ip: str | None = None
    main_process_port: int | None = Field(None, ge=0, le=65535)
    """None lets accelerate choose; required on several machines, as is the address."""
    threads_per_process: int = Field(1, ge=1)
    config_file: str | None = None
    """Your own accelerate configuration, used instead of one generated from these fields, which override it."""

    @model_validator(mode="after")
    def _check(self) -> "AccelerateLaunch":
        if self.num_processes % self.num_machines:
            raise ValueError(
                f"num_processes {self.num_processes} is not a multiple of num_machines {self.num_machines}"
            )
        if self.machine_rank >= self.num_machines:
            raise ValueError(
                f"machine_rank {self.machine_rank}: expected at most {self.num_machines - 1} with num_machines "
                f"{self.num_machines}"
            )
        if self.num_machines > 1 and (self.main_process_ip is None or self.main_process_port is None):
            raise ValueError("several machines need main_process_ip and main_process_port of machine 0")
        return self

    @property
    def is_on_loopback(self) -> bool:
        """Return whether the address of machine 0 is on the loopback interface."""
        return self.main_process_ip is not None and (
            self.main_process_ip in ("localhost", "::1") or self.main_process_ip.startswith("127.")
        )

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the processes."""
        return {**self.environment, "ACCELERATE_USE_CPU": "true"} if self.cpu else self.environment

    def files(self, requests: Sequence[Path]) -> dict[Path, str]:
        """Return the files to write before the command runs: accelerate's configuration."""
        if self.config_file:
            return {}
        config = {
            "compute_environment": "LOCAL_MACHINE",
            # Also on a CPU: without MPI, accelerate's MULTI_CPU silently starts one process.
            "distributed_type": "MULTI_GPU" if self.num_processes > 1 else "NO",
            "num_machines": self.num_machines,
            "num_processes": self.num_processes,
            "machine_rank": self.machine_rank,
            "main_process_ip": self.main_process_ip,
            "main_process_port": self.main_process_port,
            "rdzv_backend": "static",
            "same_network": True,
            "mixed_precision": self.mixed_precision,
            "use_cpu": self.cpu and self.num_processes == 1,
            "dynamo_config": {"dynamo_backend": "NO"},
        }
        return {_accelerate_config(requests): _yaml(config)}

    def command(self, module: str, requests: Sequence[Path]) -> list[str]:
        """Return this machine's command."""
        return self.command_on(self.machine_rank, module, requests)

    def command_on(self, machine_rank: int, module: str, requests: Sequence[Path]) -> list[str]:
        """Return one machine's command; requests and configuration must have the same paths there."""
        arguments = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        arguments += ["--config_file", self.config_file or str(_accelerate_config(requests))]
        if self.config_file:
            arguments += ["--num_processes", str(self.num_processes), "--num_machines", str(self.num_machines)]
            arguments += ["--mixed_precision", self.mixed_precision, "--dynamo_backend", "no"]
            if self.main_process_ip:
                arguments += ["--main_process_ip", self.main_process_ip]
            if self.main_process_port is not None:
                arguments += ["--main_process_port", str(self.main_process_port)]
        arguments += ["--machine_rank", str(machine_rank)]
        arguments += ["--num_cpu_threads_per_process", str(self.threads_per_process)]
        if self.cpu and self.num_processes == 1:
            arguments.append("--cpu")
        return [*arguments, "--module", RUNNER, module, *_config_arguments(requests)]


def _accelerate_config(requests: Sequence[Path]) -> Path:
    return requests[0].with_suffix(".accelerate.yaml")


def _yaml(values: Mapping[str, Any]) -> str:
    """Return values other than None as YAML, of which JSON is a subset."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items() if value is not None)


class RayJobLaunch(FrozenConfig):
    """A job on a Ray cluster, which must be able to read the requests and write the outputs."""

    form: Literal["ray_job"] = "ray_job"
    environment: dict[str, str] = Field(default_factory=dict)
    address: str = "http://127.0.0.1:8265"
    """URL of the cluster's dashboard."""
    num_cpus: float = Field(1, ge=0)
    """CPUs reserved for the job's entrypoint process; actors and tasks reserve their own."""
    num_gpus: float = Field(0, ge=0)
    working_folder: str | None = None
    """This project's folder on the cluster, or a folder to upload; None: the project is installed there."""

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of the process that submits the job; the job gets them from its runtime environment."""
        return self.environment

    def command(self, module: str, requests: Sequence[Path]) -> list[str]:
        runtime: dict[str, Any] = {"env_vars": {**self.environment, PROGRESS_JSON: "1"}}
        if self.working_folder:
            runtime["working_dir"] = self.working_folder
        arguments = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.address]
        arguments += ["--entrypoint-num-cpus", str(self.num_cpus), "--entrypoint-num-gpus", str(self.num_gpus)]
        arguments += ["--runtime-env-json", json.dumps(runtime)]
        return [*arguments, "--", "python", "-m", RUNNER, module, *_config_arguments(requests)]


LaunchForm = Annotated[LocalLaunch | AccelerateLaunch | RayJobLaunch, Field(discriminator="form")]


def _config_arguments(requests: Sequence[Path]) -> list[str]:
    return [argument for path in requests for argument in ("--config", str(path))]


class StageFailed(ThroughlineError):
    """A stage's process ended without a result; the message is the stage's own error if it printed one."""


class Launcher:
    """Starts stage processes one at a time and waits for them.

    `on_progress` receives each progress record, `on_line` every other line of the process. `folder` holds requests and
    logs by stage.
    """

    def __init__(
        self,
        folder: Path,
        on_progress: Callable[[Mapping[str, Any]], None] = lambda record: None,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._folder = folder
        self._on_progress = on_progress
        self._on_line = on_line

    def run(self, module: str, requests: Sequence[StageRequest], form: LaunchForm) -> Path:
        """Run the requests in one process; return the path of its log. Raises StageFailed if it fails."""
        stage = requests[0].stage
        folder = self._folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 1_000_000:06d}"
        paths = []
        for number, request in enumerate(requests):
            path = folder / f"{stamp}-{number}.json"
            write_request(path, request)
            paths.append(path)
        log_path = folder / f"{stamp}.log"
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        command = form.command(module, paths)
        others = []
        if isinstance(form, AccelerateLaunch):
            for path, content in form.files(paths).items():
                path.write_text(content)
            ranks = (rank for rank in range(form.num_machines) if rank != form.machine_rank)
            # The other machines get their environment variables only from this command.
            variables = [f"{name}={value}" for name, value in form.variables.items()]
            before = ["env", *variables] if variables else []
            others = [
                f"{ON_OTHER_MACHINE} {rank}: {shlex.join([*before, *form.command_on(rank, module, paths)])}"
                for rank in ranks
            ]
        with log_path.open("w", buffering=1) as log:
            log.write(f"$ {shlex.join(command)}\n")
            for line in others:
                log.write(line + "\n")
                self._on_line(line)
            status = self._watch(command, form.variables, log.write, tail)
        if status != 0:
            raise StageFailed(_format_error(_label(requests), status, list(tail), log_path))
        for path in paths:
            path.unlink()
        return log_path

    def _watch(
        self, command: list[str], environment: Mapping[str, str], log: Callable[[str], Any], tail: deque[str]
    ) -> int:
        process = subprocess.Popen(
            [sys.executable, str(_REAPER), str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONPATH": _python_path(), **environment, PROGRESS_JSON: "1"},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            assert process.stdout is not None
            for raw in process.stdout:
                for line in raw.rstrip("\n").split("\r"):
                    self._relay(line, log, tail)
            return process.wait()
        except BaseException:
            _stop(process)
            raise

    def _relay(self, line: str, log: Callable[[str], Any], tail: deque[str]) -> None:
        start = line.find(_PROGRESS_MARK)
        if start >= 0:
            try:
                self._on_progress(json.loads(line[start:])["progress"])
                return
            except (ValueError, KeyError):
                pass  # two processes wrote into the same line; log it like any other
        if not line.strip():
            return
        tail.append(line)
        log(line + "\n")
        self._on_line(line)


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(PROJECT_ROOT), inherited]) if inherited else str(PROJECT_ROOT)


def end_with_parent() -> None:
    """Make the kernel send this process SIGTERM when its parent dies, even by SIGKILL; for Popen's preexec_fn."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: "subprocess.Popen[str]") -> None:
    for stop_signal in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, stop_signal)
        except ProcessLookupError:
            return
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _label(requests: Sequence[StageRequest]) -> str:
    first = requests[0]
    label = f"{first.stage} {first.partition}" if first.partition else first.stage
    return label if len(requests) == 1 else f"{label} and {len(requests) - 1} more"


def _format_error(label: str, status: int, tail: list[str], log_path: Path) -> str:
    """Return the failure as one sentence: the stage's own error, or the last line of a traceback."""
    lines = [_ESCAPE_SEQUENCE.sub("", line).strip() for line in tail]
    for line in reversed(lines):
        if line.startswith(_ERROR_MARK):
            return f"{line.removeprefix(_ERROR_MARK)} (log: {log_path})"
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; the machine may have run out of memory" if -status == signal.SIGKILL else ""
        return f"{label}: its process was killed by {name}{hint} (log: {log_path})"
    last = next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)), "")
    message = last or next((line for line in reversed(lines) if line), "no output")
    return f"{label}: its process exited with status {status}: {message} (log: {log_path})"
