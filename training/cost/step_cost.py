"""What a training step costs: floating-point operations of the model, and what the device could do in the time.

S is the number of text tokens.
"""

import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.config import ModelConfig, Strategy
from training.cost.flops import count_flops

if TYPE_CHECKING:
    import torch

_BACKWARD_FACTOR = 3
"""A training step computes each product once forwards and twice backwards."""

_PEAK_BFLOAT16 = {
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
}
"""Dense bfloat16 operations per second by the name that CUDA gives; the first entry that a name contains counts."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of one image in a training step, recomputation left out: `fixed` + `per_text_token` * S."""

    fixed: int
    per_text_token: int

    def total(self, num_images: int, num_text_tokens: int) -> int:
        """Return the operations of a batch by the real lengths of its texts, padding not counted."""
        return self.fixed * num_images + self.per_text_token * num_text_tokens


def training_flops(config: ModelConfig, strategy: Strategy) -> StepFlops:
    """Count one image in a training step: two operations per multiplication and addition, attention products included.

    Norms, rotary positions and the like are left out, as is usual; the frozen text encoder has no part in a step. The
    count is that of the equations, products in the order they stand in: where the model finds a cheaper order
    (`DiT.text_keys_values`), the saving shows as a higher utilisation.
    """

    def forward(num_text_tokens: int) -> int:
        flops = count_flops(
            config, strategy, None, latent_size=config.latent_size, cached=False, num_steps=1,
            num_text_tokens=num_text_tokens, num_branches=1,
        )  # fmt: skip
        return _BACKWARD_FACTOR * (flops.total + flops.attention)

    fixed = forward(0)
    return StepFlops(fixed, forward(1) - fixed)


def peak_flops_of(device: "torch.device", precision: str) -> float | None:
    """Return the operations per second that a device could do, or None where no table here says so."""
    import torch

    if device.type != "cuda" or precision != "bfloat16":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """Return the dense bfloat16 operations per second of a GPU by a name that contains a known one, or None."""
    return next((peak for known, peak in _PEAK_BFLOAT16.items() if known in name), None)


def known_gpus() -> tuple[str, ...]:
    """Return the names that `peak_flops_by_name` knows."""
    return tuple(_PEAK_BFLOAT16)


def peak_memory_bytes(device: "torch.device") -> int:
    """Return the most memory this process held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
