"""Snapshots of an unfinished training run: written atomically, verified when read, the last few retained."""

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

from pipelines.core.atomic import sync_folder
from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from training.models.weight_files import split_tensors

_TENSORS_STEM = "tensors"
_STATE = "state.json"
_PREFIX = "step-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to resume after `num_steps_done` steps."""

    num_steps_done: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Snapshots:
    """The snapshots in one folder, ``step-<steps done>``: the newest `keep`, and those at multiples of `keep_every`.

    They exist while a run is unfinished; its stage removes the folder at the end. A snapshot is ``state.json``, which
    names the other files with their digests, and tensors in files of at most `max_shard_bytes`.
    """

    def __init__(
        self, folder: Path, keep: int, *, keep_every: int | None = None, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        self._folder, self._keep, self._keep_every = folder, keep, keep_every
        self._max_shard_bytes = max_shard_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, num_steps_done: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write a snapshot under a temporary name, sync and rename it; then remove the oldest."""
        target = self._folder / f"{_PREFIX}{num_steps_done:09d}"
        temporary = target.with_name(target.name + ".tmp")
        for leftover in self._folder.glob(f"{_PREFIX}*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        digests = {}
        for file, names in split_tensors(on_cpu, _TENSORS_STEM, self._max_shard_bytes).items():
            save_file({name: on_cpu[name] for name in names}, temporary / file)
            digests[file] = file_sha256(temporary / file)
        record = {"num_steps_done": num_steps_done, "files": digests, "state": dict(state)}
        (temporary / _STATE).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        for name in (*digests, _STATE):
            _sync_file(temporary / name)
        sync_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        sync_folder(self._folder)
        for path in self._paths()[: -self._keep]:
            if self._keep_every is None or _num_steps(path) % self._keep_every:
                shutil.rmtree(path)
        return target

    def load_newest(self) -> Snapshot | None:
        """Return the newest intact snapshot, or None where there is none.

        Removes a damaged one with a warning that names it; the run will write it again.
        """
        for path in reversed(self._paths()):
            try:
                return self.load(path)
            except ThroughlineError as error:
                logger.warning("%s; going back to the snapshot before it", error)
                shutil.rmtree(path)
        return None

    def load_step(self, num_steps_done: int) -> Snapshot:
        """Return the snapshot after that many steps."""
        return self.load(self._folder / f"{_PREFIX}{num_steps_done:09d}")

    @staticmethod
    def load(path: Path) -> Snapshot:
        """Read one snapshot; raises ThroughlineError where it is damaged."""
        try:
            record = json.loads((path / _STATE).read_text())
            files, num_steps_done, state = dict(record["files"]), record["num_steps_done"], record["state"]
            actual = {file: file_sha256(path / file) for file in files}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ThroughlineError(f"{path}: not a readable snapshot ({error})") from error
        tensors: dict[str, Tensor] = {}
        for file, expected in files.items():
            if actual[file] != expected:
                raise ThroughlineError(f"{path / file}: SHA-256 {actual[file][:12]}..., expected {expected[:12]}...")
            tensors |= load_file(path / file)
        return Snapshot(num_steps_done, tensors, state)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self._folder.glob(f"{_PREFIX}*") if not path.name.endswith(".tmp"))


def _num_steps(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
