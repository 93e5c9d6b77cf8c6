"""Snapshots of an unfinished training run: written whole or not at all, verified when read, the last few kept."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.atomic import sync_folder
from pipelines.digest import file_sha256
from pipelines.errors import ThroughlineError

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_PREFIX = "step-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on after `num_steps_done` steps."""

    num_steps_done: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Snapshots:
    """The snapshots in one folder, ``step-<steps done>``, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, num_steps_done: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a snapshot under a temporary name, make it durable, rename it; then drop the oldest."""
        target = self._folder / f"{_PREFIX}{num_steps_done:09d}"
        temporary = target.with_name(target.name + ".tmp")
        for left_over in self._folder.glob(f"{_PREFIX}*.tmp"):
            shutil.rmtree(left_over)
        temporary.mkdir()
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary / _TENSORS)
        record = {
            "num_steps_done": num_steps_done,
            "sha256": file_sha256(temporary / _TENSORS),
            "state": dict(state),
        }
        (temporary / _STATE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        for name in (_TENSORS, _STATE):
            _sync_file(temporary / name)
        sync_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        sync_folder(self._folder)
        for path in self._paths()[: -self._keep]:
            shutil.rmtree(path)
        return target

    def load_newest(self) -> Snapshot | None:
        """Return the newest snapshot that is whole, or None where there is none.

        A damaged one is skipped with a warning that names it, and removed, so that the run writes it anew.
        """
        for path in reversed(self._paths()):
            try:
                return self.load(path)
            except ThroughlineError as error:
                logger.warning("%s; going back to the snapshot before it", error)
                shutil.rmtree(path)
        return None

    def load_step(self, num_steps_done: int) -> Snapshot:
        """Return the snapshot of that many steps, as another process chose it."""
        return self.load(self._folder / f"{_PREFIX}{num_steps_done:09d}")

    @staticmethod
    def load(path: Path) -> Snapshot:
        """Read one snapshot; raises ThroughlineError where it is not whole."""
        try:
            record = json.loads((path / _STATE).read_text())
            found = file_sha256(path / _TENSORS)
            expected, num_steps_done, state = record["sha256"], record["num_steps_done"], record["state"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ThroughlineError(f"{path}: not a readable snapshot ({error})") from error
        if found != expected:
            raise ThroughlineError(f"{path / _TENSORS}: SHA-256 {found[:12]}..., its state says {expected[:12]}...")
        return Snapshot(num_steps_done, load_file(path / _TENSORS), state)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"{_PREFIX}*") if not path.name.endswith(".tmp"))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
