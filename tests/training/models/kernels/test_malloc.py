"""The process retains freed memory."""

import subprocess
import sys

import pytest

_SCRIPT = """
import sys
from pathlib import Path
import torch
from training.models.kernels.malloc import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
torch.ones(16 << 20)  # 64 MiB, more than glibc ever keeps by itself
resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
print(resident_pages)
"""
_SIZE_PAGES = (64 << 20) // 4096


def _resident_pages(mode: str) -> int:
    found = subprocess.run([sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True)
    if found.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


@pytest.mark.slow
def test_the_process_retains_the_memory_of_a_freed_tensor() -> None:
    assert _resident_pages("keep") - _resident_pages("leave") > _SIZE_PAGES // 2
