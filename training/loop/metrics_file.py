"""The rows of metrics.jsonl, one per step. Equal runs write equal bytes, so rows hold no times or rates."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.core.atomic import write_bytes
from pipelines.core.errors import ThroughlineError

METRICS_NAME = "metrics.jsonl"
NUM_T_BUCKETS = 10

Row = dict[str, Any]


def t_bucket_sums(t: Tensor, losses: Tensor) -> tuple[list[float], list[int]]:
    """Sum losses (B,) by flow time (B,) in ten equal buckets of [0, 1]; returns sums and counts.

    Omits losses that are not finite. Sums have six digits, enough for means.
    """
    finite = losses.isfinite()
    bucket = (t[finite].double() * NUM_T_BUCKETS).long().clamp(0, NUM_T_BUCKETS - 1).cpu()
    sums = torch.zeros(NUM_T_BUCKETS, dtype=torch.float64).index_add_(0, bucket, losses[finite].double().cpu())
    return [float(f"{value:.6g}") for value in sums.tolist()], torch.bincount(bucket, minlength=NUM_T_BUCKETS).tolist()


def t_bucket_name(index: int) -> str:
    """Return the range of a bucket, such as ``0.1-0.2``."""
    return f"{index / NUM_T_BUCKETS:.1f}-{(index + 1) / NUM_T_BUCKETS:.1f}"


class MetricsFile:
    """Appends rows to a file. Resuming from a snapshot truncates rows after it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: list[Row] = []
        self.num_rows = 0
        self.losses: dict[str, float | None] = {"first_loss": None, "final_loss": None, "validation_loss": None}
        """First and last training loss without skipped steps, last validation loss, and the time head's if any."""

    def resume_from(self, num_rows: int) -> None:
        """Truncate the file to its first rows; raises ThroughlineError where it has fewer."""
        lines = self.path.read_bytes().splitlines(keepends=True)[:num_rows] if self.path.exists() else []
        for line in lines:  # a kill may have truncated the last line, which then comes after the snapshot
            self._summarize(json.loads(line))
        if self.num_rows != num_rows:
            raise ThroughlineError(
                f"{self.path}: {self.num_rows} rows for {num_rows} finished steps; "
                f"remove {self.path.parent} to train from the start"
            )
        write_bytes(self.path, b"".join(lines))

    def append(self, row: Row) -> None:
        self._pending.append(row)
        self._summarize(row)

    def flush(self) -> None:
        """Write pending rows durably."""
        with self.path.open("ab") as stream:
            stream.write(b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in self._pending))
            stream.flush()
            os.fsync(stream.fileno())
        self._pending.clear()

    def _summarize(self, row: Row) -> None:
        self.num_rows += 1
        if "skipped" not in row:
            self.losses["final_loss"] = row["loss"]
            if self.losses["first_loss"] is None:
                self.losses["first_loss"] = row["loss"]
        if row.get("validation_loss") is not None:
            self.losses["validation_loss"] = row["validation_loss"]
        if row.get("validation_time_head_loss") is not None:
            self.losses["validation_time_head_loss"] = row["validation_time_head_loss"]
