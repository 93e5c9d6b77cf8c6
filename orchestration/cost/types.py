"""The estimate of a whole run."""

from dataclasses import dataclass

from pipelines.core.quantity import ZERO, Quantity, largest, total
from pipelines.laion.cost import FilteringEstimate
from pipelines.runner.cost import StageEstimate


@dataclass(frozen=True, kw_only=True)
class TextEstimate:
    """The cost of the text encoder's layers: stored once, or encoded again for every batch."""

    is_stored: bool
    sample_bytes: Quantity
    """All layers of one caption."""
    stored_bytes: Quantity
    """Of all samples, whether or not the profile stores them."""
    encode_seconds: Quantity
    """In the training of each strategy; zero where they are stored."""


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Stages, totals, filtering on several machines, and notes."""

    profile: str
    rows: Quantity
    parts: Quantity
    samples: Quantity
    """Samples in shards."""
    epochs: Quantity
    """Times that training sees each sample."""
    stages: tuple[StageEstimate, ...]
    filtering: tuple[FilteringEstimate, ...]
    text: TextEstimate
    training_memory_bytes: Quantity
    """Of one process: weights, gradients, optimizer state and moving average, without activations."""
    notes: tuple[str, ...] = ()

    def totals(self) -> dict[str, Quantity]:
        """Return the totals over the stages shown; unknown terms are excluded."""
        return {
            "seconds": total([stage.seconds for stage in self.stages]),
            "gpu_seconds": total([stage.gpu_seconds for stage in self.stages]),
            "requests": total([stage.requests for stage in self.stages]),
            "bytes_out": total([stage.bytes_out for stage in self.stages]),
            "scratch_bytes": largest(ZERO, *(stage.scratch_bytes for stage in self.stages)),
        }

    def unknown(self) -> list[str]:
        """Return the stages whose time is unknown and therefore excluded from the total."""
        return [stage.name for stage in self.stages if not stage.seconds.is_known]
