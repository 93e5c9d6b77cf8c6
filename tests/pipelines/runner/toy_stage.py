"""A stage of three small units, and a program that runs it, kills it at given lines, and races two publishers.

As a program: ``kill ROOT STRIDE`` prints one JSON line per kill; ``run ROOT [CONFIG]`` runs the stage and prints its
version; ``publish ROOT NAME ROUNDS`` publishes outputs in turn, in a race with another such process.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.core import atomic, manifest
from pipelines.core.config import FrozenConfig, execution_field
from pipelines.core.digest import digest_json
from pipelines.core.manifest import FileEntry, Manifest
from pipelines.runner import dropped, locks, outputs, publication, stage, units
from pipelines.runner.units import StageResult, StageRun
from tests.plain_stage import plain_stage

UNITS = ("00000", "00001", "00002")


class ToyConfig(FrozenConfig):
    value: int = 1
    seconds: float = execution_field(0.0)
    count_file: str | None = execution_field(None)
    """One byte is appended for each unit that is computed."""
    block_at: str | None = execution_field(None)
    """Before this unit, fork a child, write both process ids into the file `blocked`, and stop."""
    blocked: str | None = execution_field(None)


def produce(run: StageRun[ToyConfig]) -> StageResult:
    for number, name in enumerate(UNITS):
        if run.is_finished(name):
            continue
        if run.config.block_at == name:
            _block(run.config)
        if run.config.count_file:
            with Path(run.config.count_file).open("a") as stream:
                stream.write("x")
        time.sleep(run.config.seconds)
        with run.unit(name) as unit:
            unit.write(f"a-{name}.bin", bytes([number, run.config.value]) * 100, num_rows=3)
            unit.write(f"deep/b-{name}.bin", name.encode())
            unit.drop(f"{number:032x}", "odd", "because")
            unit.account(rows_in=4, rows_out=3)
            unit.notes["number"] = number
    return StageResult(summary={"numbers": [unit.notes["number"] for unit in run.finished_units()]})


def _block(config: ToyConfig) -> None:
    child = os.fork()
    if child:
        assert config.blocked is not None
        atomic.write_json(Path(config.blocked), [os.getpid(), child])
    time.sleep(600)


STAGE = plain_stage(name="toy", code_version="1", config_type=ToyConfig, produce=produce)

_TRACED = {module.__file__ for module in (stage, units, outputs, dropped, atomic, manifest, locks, publication)} | {
    __file__
}


class _KillAt:
    """Counts executed lines of the stage runner, and kills this process before one of them."""

    def __init__(self, line: int | None) -> None:
        self.line, self.count = line, 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in _TRACED:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.line:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def count_lines(root: Path) -> int:
    counter = _KillAt(None)
    sys.settrace(counter)
    try:
        STAGE.run(ToyConfig(), {}, root)
    finally:
        sys.settrace(None)
    return counter.count


def killed_run(root: Path, line: int) -> bool:
    """Run the stage in a child that is killed before its line number `line`; return whether it was killed."""
    child = os.fork()
    if child == 0:
        sys.settrace(_KillAt(line))
        STAGE.run(ToyConfig(), {}, root)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kill_everywhere(root: Path, stride: int) -> None:
    for line in range(1, count_lines(root / "uninterrupted"), stride):
        folder = root / str(line)
        was_killed = killed_run(folder, line)
        again = killed_run(folder, line)  # a second kill, in a run that resumes
        output = STAGE.run(ToyConfig(), {}, folder)
        problems = manifest.damaged_files(output.folder, output.manifest, read_bytes=True)
        left = sorted(path.name for path in (folder / "toy" / "unfinished").iterdir() if path.is_dir())
        record = {"line": line, "killed": was_killed, "again": again, "version": output.data_version}
        print(json.dumps(record | {"problems": problems, "left": left}), flush=True)


def publish_rounds(root: Path, name: str, num_rounds: int) -> None:
    """Publish outputs 0, 1, ... simultaneously with the other process; print the problems of each afterwards."""
    for number in range(num_rounds):
        data, stage_root = bytes([number]) * 5000, root / "toy"
        sha256 = hashlib.sha256(data).hexdigest()
        record = Manifest(
            stage="toy",
            partition=None,
            code_version="1",
            fingerprint=digest_json(number),
            config={},
            files=(FileEntry(path="a.bin", sha256=sha256, num_bytes=len(data)),),
            measurements={"by": name},
        ).sealed()
        work = stage_root / "unfinished" / f"{name}-{number}"
        (work / publication.OUT).mkdir(parents=True)
        (work / publication.OUT / "a.bin").write_bytes(data)
        (root / f"{number}-{name}").touch()
        deadline = time.monotonic() + 60
        while len(list(root.glob(f"{number}-*"))) < 2:
            assert time.monotonic() < deadline, "the other process is gone"
        published = publication.publish(record, work, stage_root)
        folder = stage_root / record.data_version
        found = manifest.read_manifest(folder / manifest.MANIFEST_NAME)
        problems = manifest.damaged_files(folder, found, read_bytes=True)
        print(json.dumps([number, published.measurements["by"], problems, work.exists()]), flush=True)


if __name__ == "__main__":
    import pyarrow.parquet  # noqa: F401 - once here, not in each child

    command, root = sys.argv[1], Path(sys.argv[2])
    if command == "kill":
        kill_everywhere(root, int(sys.argv[3]))
    elif command == "publish":
        publish_rounds(root, sys.argv[3], int(sys.argv[4]))
    else:
        config = ToyConfig(seconds=0.2, count_file=str(root / "count"))
        if len(sys.argv) > 3:
            config = ToyConfig.model_validate_json(sys.argv[3])
        print(STAGE.run(config, {}, root).data_version)
