"""The cost of a training step: floating-point operations of the model, peak operations and memory of the device.

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
"""Dense bfloat16 operations per second; the first entry that CUDA's device name contains applies."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of one image in a training step, without recomputation: `fixed` + `per_text_token` * S."""

    fixed: int
    per_text_token: int

    def total(self, num_images: int, num_text_tokens: int) -> int:
        """Return the operations of a batch by the real lengths of its texts, without padding."""
        return self.fixed * num_images + self.per_text_token * num_text_tokens


def training_flops(config: ModelConfig, strategy: Strategy) -> StepFlops:
    """Count one image in a training step: two operations per multiplication and addition, attention products included.

    As usual this omits norms, rotary positions and the like, and the frozen text encoder. It counts the products in the
    order of the equations: where the model takes a cheaper order (`DiT.text_keys_values`), utilisation is higher.
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
    """Return the peak operations per second of a device, or None where it is unknown."""
    import torch

    if device.type != "cuda" or precision != "bfloat16":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """Return the dense bfloat16 operations per second of a GPU by its name, or None where it is unknown."""
    return next((peak for known, peak in _PEAK_BFLOAT16.items() if known in name), None)


def known_gpus() -> tuple[str, ...]:
    """Return the GPU names that `peak_flops_by_name` looks for."""
    return tuple(_PEAK_BFLOAT16)


def peak_memory_bytes(device: "torch.device") -> int:
    """Return the peak memory of this process so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
