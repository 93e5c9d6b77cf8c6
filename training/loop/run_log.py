"""The curves of a run: means over windows of steps, rates, memory.

None of it is part of the result: equal runs differ in it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.config import CheckpointConfig
from training.cost.step_cost import peak_flops_of, peak_memory_bytes, training_flops
from training.loop.metrics_file import NUM_T_BUCKETS, Row, t_bucket_name
from training.loop.trackers import Trackers


@dataclass
class _Window:
    """Sums over some steps."""

    num_steps: int = 0
    num_taken: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * NUM_T_BUCKETS)
    counts: list[int] = field(default_factory=lambda: [0] * NUM_T_BUCKETS)
    seconds: float = 0.0
    flops: int = 0


class RunLog:
    """Logs to the run's trackers every `log_every` steps and after the last, and summarises the whole run."""

    def __init__(
        self, config: CheckpointConfig, folder: Path, *, first_step: int, device: torch.device, num_processes: int
    ) -> None:
        training = config.training
        self.folder = folder
        self._every, self._batch_size = training.log_every, training.batch_size
        self._num_steps = training.steps
        self._device = device
        self._flops = training_flops(config.model, config.strategy)
        peak = training.peak_flops or peak_flops_of(device, training.precision)
        self._peak = None if peak is None else peak * num_processes
        self._trackers = Trackers(
            training.trackers, folder, config=config.model_dump(mode="json"), resumed_at_step=first_step or None
        )
        self._window, self._total = _Window(), _Window()

    def add(self, row: Row, num_text_tokens: int, seconds: float) -> None:
        """Add a step's row; `seconds` are those of the step without validation and snapshots."""
        window = self._window
        window.num_steps += 1
        if "skipped" not in row:
            window.num_taken += 1
            window.loss += row["loss"]
            window.grad_norm += row["grad_norm"]
        for index in range(NUM_T_BUCKETS):
            window.sums[index] += row["t_bucket_loss_sums"][index]
            window.counts[index] += row["t_bucket_counts"][index]
        flops = self._flops.total(self._batch_size, num_text_tokens)
        for sums in (window, self._total):
            sums.seconds += seconds
            sums.flops += flops
        self._total.num_steps += 1
        step = row["step"]
        if "skipped" in row:
            self._trackers.log(step, {"skipped": 1.0})
        if row.get("validation_loss") is not None:
            by_time = {
                f"validation_loss_by_t/{t_bucket_name(index)}": loss
                for index, loss in enumerate(row["validation_loss_by_t"])
            }
            head_loss = row.get("validation_time_head_loss")
            losses = {"loss/validation": row["validation_loss"], "loss/validation_time_head": head_loss}
            self._trackers.log(step, losses | by_time)
        if (step + 1) % self._every == 0 or step + 1 == self._num_steps:
            self._trackers.log(step, self._scalars(row))
            self._window = _Window()

    def _scalars(self, row: Row) -> dict[str, float | None]:
        window = self._window
        by_time = {
            f"loss_by_t/{t_bucket_name(index)}": total / count
            for index, (total, count) in enumerate(zip(window.sums, window.counts, strict=True))
            if count
        }
        return {
            "loss/train": window.loss / window.num_taken if window.num_taken else None,
            "grad_norm": window.grad_norm / window.num_taken if window.num_taken else None,
            "learning_rate": row["learning_rate"],
            "images_per_second": self._images_per_second(window),
            "model_flops_utilisation": self._utilisation(window),
            "peak_memory_bytes": float(peak_memory_bytes(self._device)),
            **by_time,
        }

    def _images_per_second(self, window: _Window) -> float | None:
        return window.num_steps * self._batch_size / window.seconds if window.seconds else None

    def _utilisation(self, window: _Window) -> float | None:
        if self._peak is None or not window.seconds:
            return None
        return window.flops / window.seconds / self._peak

    def close(self) -> dict[str, Any]:
        """Close the trackers and return measurements for the manifest; memory is that of the first process."""
        self._trackers.close()
        total = self._total
        rate, utilisation = self._images_per_second(total), self._utilisation(total)
        return {
            "seconds_in_steps": round(total.seconds, 3),
            "images_per_second": None if rate is None else round(rate, 2),
            "model_flops_per_step": total.flops // total.num_steps if total.num_steps else None,
            "model_flops_per_second": round(total.flops / total.seconds) if total.seconds else None,
            "model_flops_utilisation": None if utilisation is None else round(utilisation, 4),
            "peak_memory_bytes": peak_memory_bytes(self._device),
            "tensorboard_folder": str(self.folder),
        }
