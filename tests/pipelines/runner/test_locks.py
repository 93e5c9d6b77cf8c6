import json
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, Manifest, damaged_files
from pipelines.runner import publication
from pipelines.runner.locks import WAITING, hold
from tests.pipelines.runner import toy_stage
from tests.pipelines.runner.test_stage import start
from tests.pipelines.runner.toy_stage import STAGE, ToyConfig


def start_toy(root: Path, config: ToyConfig) -> "subprocess.Popen[str]":
    return start("-m", toy_stage.__name__, "run", str(root), config.model_dump_json())


def wait_until(path: Path, owner: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert owner.poll() is None, "the process ended before it blocked"
        assert time.monotonic() < deadline, f"no {path.name} within a minute"
        time.sleep(0.02)


@pytest.fixture
def owner(tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process that holds the output of ToyConfig() after its first unit, with a child that it forked."""
    blocked = tmp_path / "blocked"
    config = ToyConfig(count_file=str(tmp_path / "count"), block_at="00001", blocked=str(blocked))
    process = start_toy(tmp_path, config)
    try:
        wait_until(blocked, process)
        yield process
    finally:
        for pid in json.loads(blocked.read_text()) if blocked.exists() else [process.pid]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_a_waiter_names_the_owner_and_resumes_after_its_last_finished_unit_when_it_is_killed(
    tmp_path: Path, owner: "subprocess.Popen[str]"
) -> None:
    waiter = start_toy(tmp_path, ToyConfig(count_file=str(tmp_path / "count")))
    assert waiter.stderr is not None
    line = waiter.stderr.readline()
    assert line.startswith(f"{WAITING}toy is being computed by process {owner.pid} on {platform.node()}, since 20")
    owner.kill()
    output, errors = waiter.communicate(timeout=60)
    assert waiter.returncode == 0, errors
    assert errors == "", "it names the owner once"
    _, child = json.loads((tmp_path / "blocked").read_text())
    assert Path(f"/proc/{child}").exists(), "a child that outlives its parent holds no lock"
    assert (tmp_path / "count").read_text() == "x" * len(toy_stage.UNITS), "the first unit was not computed again"
    assert output.strip() == STAGE.run(ToyConfig(), {}, tmp_path / "alone").data_version


@pytest.mark.slow
def test_a_wait_that_times_out_fails_with_one_sentence_and_does_not_affect_other_fingerprints(
    tmp_path: Path, owner: "subprocess.Popen[str]", capfd: pytest.CaptureFixture[str]
) -> None:
    sentence = rf"^toy: is being computed by process {owner.pid} on .*; this run waited 0 s for it; run again when"
    with pytest.raises(ThroughlineError, match=sentence):
        STAGE.run(ToyConfig(), {}, tmp_path, lock_wait_seconds=0)
    with pytest.raises(ThroughlineError, match=r"this run waited 0\.1 s"):
        STAGE.run(ToyConfig(), {}, tmp_path, lock_wait_seconds=0.1)
    capfd.readouterr()
    assert STAGE.run(ToyConfig(value=2), {}, tmp_path, lock_wait_seconds=0).folder.is_dir()
    assert STAGE.run(ToyConfig(), {}, tmp_path, "00001", lock_wait_seconds=0).folder.is_dir()
    assert capfd.readouterr().err == ""


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    config = ToyConfig(seconds=0.05, count_file=str(tmp_path / "count"))
    versions: list[str] = []
    threads = [
        threading.Thread(target=lambda: versions.append(STAGE.run(config, {}, tmp_path).data_version)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(versions) == 3
    assert len(set(versions)) == 1
    assert (tmp_path / "count").read_text() == "x" * len(toy_stage.UNITS)


def test_a_failure_releases_the_lock_which_excludes_other_processes_until_then(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.lock"
    code = "import sys; from pathlib import Path; from pipelines.runner.locks import hold\n"
    code += "with hold(Path(sys.argv[1]), 'toy', 0): pass"

    def another_process_acquires_it() -> bool:
        other = start("-c", code, str(path))
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 0 or "toy: is being computed by process" in errors
        return other.returncode == 0

    with pytest.raises(RuntimeError), hold(path, "toy"):
        with pytest.raises(ThroughlineError, match="toy: is being computed"), hold(path, "toy", 0):
            pass
        assert not another_process_acquires_it(), "a thread that timed out released the lock of its process"
        raise RuntimeError
    assert another_process_acquires_it()


@pytest.mark.parametrize("harm", ["removed", "taken"])
def test_nothing_is_published_without_the_lock(tmp_path: Path, harm: str) -> None:
    with hold(tmp_path / "a.lock", "toy 00001") as lock:
        lock.check()
        if harm == "removed":
            (tmp_path / "a.lock").unlink()
        else:
            (tmp_path / "a.lock").write_text('{"pid": 1, "host": "b", "since": "now", "token": "c"}')
        with pytest.raises(ThroughlineError, match=r"^toy 00001: its lock .* was removed or taken by another run"):
            lock.check()


def test_an_output_root_that_is_not_writable_fails_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir(mode=0o555)
    code = "import os, sys; from pathlib import Path; from pipelines.runner.locks import hold\n"
    code += "os.setuid(65534) if os.getuid() == 0 else None\n"
    code += "with hold(Path(sys.argv[1]), 'toy'): pass"
    other = start("-c", code, str(tmp_path / "toy" / "unfinished" / "a.lock"))
    _, errors = other.communicate(timeout=60)
    assert "ThroughlineError: " in errors
    assert "not writable by this user (Permission denied); users who share an output root" in errors


@pytest.mark.slow
def test_two_concurrent_publishers_leave_one_complete_output(tmp_path: Path) -> None:
    num_rounds = 60
    racers = [start("-m", toy_stage.__name__, "publish", str(tmp_path), name, str(num_rounds)) for name in "ab"]
    printed = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], [errors for _, errors in printed]
    records = [[json.loads(line) for line in output.splitlines()] for output, _ in printed]
    assert [len(lines) for lines in records] == [num_rounds, num_rounds]
    assert [line for lines in records for line in lines if line[2] or line[3]] == []
    winners = [(one[1], other[1]) for one, other in zip(*records, strict=True)]
    assert all(one == other for one, other in winners), "both return the published copy"


def test_an_intact_output_without_pointer_is_kept_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    first = STAGE.run(ToyConfig(), {}, tmp_path)
    (tmp_path / "toy" / "fingerprints" / first.manifest.fingerprint).unlink()
    before = {path: path.stat().st_ino for path in first.folder.rglob("*")}
    again = STAGE.run(ToyConfig(), {}, tmp_path)
    assert {path: path.stat().st_ino for path in again.folder.rglob("*")} == before
    assert again.manifest == first.manifest, "returns the kept copy"
    first.path("a-00001.bin").write_bytes(b"short")
    recomputed = STAGE.run(ToyConfig(), {}, tmp_path)
    assert not damaged_files(recomputed.folder, recomputed.manifest, read_bytes=True)
    assert [path for path in (tmp_path / "toy" / "unfinished").iterdir() if path.is_dir()] == []


def test_a_folder_with_another_output_is_replaced(tmp_path: Path) -> None:
    output = STAGE.run(ToyConfig(), {}, tmp_path)
    other = STAGE.run(ToyConfig(value=2), {}, tmp_path)
    work = tmp_path / "work"
    output.folder.rename(work)
    other.folder.rename(output.folder)
    (tmp_path / "w").mkdir()
    work.rename(tmp_path / "w" / publication.OUT)
    manifest: Manifest = publication.publish(output.manifest, tmp_path / "w", tmp_path / "toy")
    assert manifest == output.manifest
    assert json.loads((output.folder / MANIFEST_NAME).read_text())["data_version"] == output.data_version
