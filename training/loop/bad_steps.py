"""Detects bad steps: losses or gradients that are not finite, losses that jump."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from torch import Tensor

from training.config import TrainingConfig

Reason = Literal["loss_not_finite", "grad_norm_not_finite", "loss_jump"]
_MAX_NAMED_SAMPLES = 8


@dataclass(frozen=True)
class BadStep:
    """A bad step, and its suspect samples: those with a non-finite loss, else those with the highest losses."""

    step: int
    reason: Reason
    sample_keys: tuple[str, ...]
    message: str

    def record(self) -> dict[str, Any]:
        """Return the record for metrics and manifest."""
        return {name: value for name, value in asdict(self).items() if name != "message"}


class BadSteps:
    """Judges each step by its losses, its gradient norm and the median loss of the last good steps.

    Every process judges the same gathered values and gets the same result.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._max_jump, self._window = training.max_loss_jump, training.loss_jump_window
        self._recent: deque[float] = deque(maxlen=self._window)
        self.num_in_row = 0
        self.num_taken = 0
        """Optimizer updates so far."""
        self.skipped: list[dict[str, Any]] = []

    def judge(self, step: int, losses: Tensor, sample_keys: list[str], grad_norm: float) -> BadStep | None:
        """Return a bad step, None for a good one. `losses` (B,) and keys are those of the global batch."""
        finite = losses.isfinite()
        if not finite.all():
            named = [key for key, good in zip(sample_keys, finite.tolist(), strict=True) if not good]
            keys = tuple(named[:_MAX_NAMED_SAMPLES])
            return BadStep(step, "loss_not_finite", keys, f"loss of {', '.join(keys)} is not finite")
        highest = losses.argsort(descending=True, stable=True)[:_MAX_NAMED_SAMPLES].tolist()
        keys = tuple(sample_keys[index] for index in highest)
        highest_losses = f"the highest losses are those of {', '.join(keys)}"
        if not math.isfinite(grad_norm):
            message = f"gradient norm over {len(sample_keys)} samples is not finite, {highest_losses}"
            return BadStep(step, "grad_norm_not_finite", keys, message)
        loss = float(losses.mean())
        if self._max_jump is not None and len(self._recent) == self._window:
            usual = median(self._recent)
            if loss > self._max_jump * usual:
                jump = f"loss {loss:.4g} against a median of {usual:.4g} over the last {self._window} steps"
                return BadStep(step, "loss_jump", keys, f"{jump}, {highest_losses}")
        return None

    def record_good(self, loss: float) -> None:
        """Record a step that updated the weights."""
        self.num_taken += 1
        self.num_in_row = 0
        if self._max_jump is not None:
            self._recent.append(loss)

    def record_skipped(self, bad: BadStep) -> None:
        """Record a step that was skipped."""
        self.num_in_row += 1
        self.skipped.append(bad.record())

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a snapshot."""
        return {
            "recent_losses": list(self._recent),
            "num_in_row": self.num_in_row,
            "num_taken": self.num_taken,
            "skipped": list(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a snapshot."""
        self._recent = deque(state["recent_losses"], maxlen=self._window)
        self.num_in_row, self.num_taken = state["num_in_row"], state["num_taken"]
        self.skipped = list(state["skipped"])
