"""Which steps are not to be taken: losses or gradients that are not finite, losses that jump."""

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
    """A step that was not taken, and the samples to look at: those that are not finite, else those of highest loss."""

    step: int
    reason: Reason
    sample_keys: tuple[str, ...]
    said: str
    """What was found, in words."""

    def record(self) -> dict[str, Any]:
        """Return what metrics and manifest keep of it."""
        return {name: value for name, value in asdict(self).items() if name != "said"}


class BadSteps:
    """Judges each step by its losses, its gradient norm and the median loss of the last steps that were taken.

    Every process judges by the same gathered numbers and comes to the same result.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self._max_jump, self._window = training.max_loss_jump, training.loss_jump_window
        self._recent: deque[float] = deque(maxlen=self._window)
        self.num_in_row = 0
        self.num_taken = 0
        """Steps taken: updates of the optimizer."""
        self.skipped: list[dict[str, Any]] = []

    def judge(self, step: int, losses: Tensor, sample_keys: list[str], grad_norm: float) -> BadStep | None:
        """Return what is wrong with a step, or None. `losses` (B,) are of the whole batch, as are the keys."""
        finite = losses.isfinite()
        if not finite.all():
            named = [key for key, good in zip(sample_keys, finite.tolist(), strict=True) if not good]
            keys = tuple(named[:_MAX_NAMED_SAMPLES])
            return BadStep(step, "loss_not_finite", keys, f"loss of {', '.join(keys)} is not finite")
        highest = losses.argsort(descending=True, stable=True)[:_MAX_NAMED_SAMPLES].tolist()
        keys = tuple(sample_keys[place] for place in highest)
        if not math.isfinite(grad_norm):
            said = f"gradient norm over {len(sample_keys)} samples is not finite, the highest losses are those of "
            return BadStep(step, "grad_norm_not_finite", keys, said + ", ".join(keys))
        loss = float(losses.mean())
        if self._max_jump is not None and len(self._recent) == self._window:
            usual = median(self._recent)
            if loss > self._max_jump * usual:
                said = f"loss {loss:.4g} against a median of {usual:.4g} over the last {self._window} steps, "
                return BadStep(step, "loss_jump", keys, said + f"the highest losses are those of {', '.join(keys)}")
        return None

    def take(self, loss: float) -> None:
        """Note a step that was taken."""
        self.num_taken += 1
        self.num_in_row = 0
        if self._max_jump is not None:
            self._recent.append(loss)

    def skip(self, bad: BadStep) -> None:
        """Note a step that was left out."""
        self.num_in_row += 1
        self.skipped.append(bad.record())

    def state(self) -> dict[str, Any]:
        """Return what a snapshot keeps."""
        return {
            "recent_losses": list(self._recent),
            "num_in_row": self.num_in_row,
            "num_taken": self.num_taken,
            "skipped": list(self.skipped),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned."""
        self._recent = deque(state["recent_losses"], maxlen=self._window)
        self.num_in_row, self.num_taken = state["num_in_row"], state["num_taken"]
        self.skipped = list(state["skipped"])
