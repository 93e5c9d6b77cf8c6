import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipelines.laion.laion_world import laion_row, write_laion

ROOT = Path(__file__).parents[3]


def _wait(condition: str, seconds: float, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{condition} within {seconds} s"
        time.sleep(0.5)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _processes_with(word: str) -> list[int]:
    """Return the processes whose environment contains `word`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_the_interface_stops_with_its_command_even_in_a_scripts_background(tmp_path: Path) -> None:
    write_laion(tmp_path / "laion" / "p.parquet", [laion_row("http://example.com/1.jpg", "a red apple")])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = tmp_path / "home"
    command = [sys.executable, "-m", "orchestration.cli.main", "ui", "--profile", "single_gpu", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--set", f'source=["{tmp_path / "laion"}"]'], cwd=ROOT, stdout=subprocess.DEVNULL,
        env=os.environ | {"THROUGHLINE_HOME": str(home), "PYTHONPATH": str(ROOT)},
        # As a shell without job control starts background commands.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    try:
        _wait("the interface answers", 240, lambda: _answers(port))
        assert len(_processes_with(str(home))) > 2
        process.terminate()
        assert process.wait(90) == 0
        _wait("no process is left", 30, lambda: not _processes_with(str(home)))
    finally:
        for pid in _processes_with(str(home)):
            os.kill(pid, signal.SIGKILL)
