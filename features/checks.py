"""Counts what must not be in a cache, by reading its files again: for asset checks and audits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pipelines.runner.outputs import StageOutput

_CHECKED = ("hidden_states", "mean", "std")


def count_nonfinite(output: StageOutput) -> int:
    """Return how many values of a `latents` or `text_features` output are NaN or infinite; reads every file once."""
    return sum(_count(path) for path in output.files(".safetensors"))


def _count(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name in _CHECKED]  # noqa: SIM118 - not a mapping
        return sum(int((~torch.isfinite(piece)).sum()) for name in names for piece in _pieces(file.get_slice(name)))


def _pieces(stored: Any) -> Iterator[Any]:
    """Yield a tensor in pieces along its first axis, so that a large file is never in memory whole."""
    for index in range(stored.get_shape()[0]):
        yield stored[index]
