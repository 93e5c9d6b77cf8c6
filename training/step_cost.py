"""What a training step costs: floating-point operations of the model, and what the device could do in the time.

Letters: N image tokens, S text tokens.
"""

import resource
import sys
from dataclasses import dataclass

import torch

from training.config import ModelConfig, Strategy

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
class ImageFlops:
    """Operations of one image in a training step, recomputation left out: `fixed` + `per_text_token` * S."""

    fixed: int
    per_text_token: int

    def total(self, num_images: int, num_text_tokens: int) -> int:
        """Return the operations of a batch by the real lengths of its texts, padding not counted."""
        return self.fixed * num_images + self.per_text_token * num_text_tokens


def training_flops(config: ModelConfig, strategy: Strategy) -> ImageFlops:
    """Count one image in a training step: two operations per multiplication and addition, attention products included.

    Norms, rotary positions and the like are left out, as is usual; the frozen text encoder has no part in a step. The
    count is that of the equations, products in the order they stand in: where the model finds a cheaper order
    (`DiT.text_keys_values`), the saving shows as a higher utilisation.
    """
    hidden, blocks, width = config.hidden_size, config.num_blocks, config.text_width
    query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    num_tokens = (config.latent_size // config.patch_size) ** 2
    has_cross_attention = strategy is not Strategy.FUSE_DIT
    per_block = hidden * (2 * query + 2 * key_value + 3 * config.mlp_width)
    if has_cross_attention:
        per_block += 2 * hidden * query
    per_image_token = blocks * per_block + 2 * hidden * config.latent_channels * config.patch_size**2
    # Image tokens look at each other and at the text, in one attention (fuse_dit) or in two.
    fixed = num_tokens * (per_image_token + blocks * 2 * num_tokens * query)
    per_text_token = blocks * 2 * num_tokens * query
    if config.timestep_conditioning == "adaln":
        fixed += 256 * hidden + 9 * hidden**2
    if has_cross_attention:
        variants = blocks if strategy in (Strategy.DEPTH_WISE, Strategy.JOINT) else 1
        is_fixed = strategy in (Strategy.PENULTIMATE, Strategy.UNIFORM)
        fusion = 0 if is_fixed else config.num_text_layers * width
        per_text_token += variants * (width**2 + fusion) + blocks * 2 * width * key_value
        if strategy.has_time_gate:
            fixed += variants * config.gate_width * (config.gate_embedding_size + config.num_text_layers)
    return ImageFlops(2 * _BACKWARD_FACTOR * fixed, 2 * _BACKWARD_FACTOR * per_text_token)


def peak_flops_of(device: torch.device, precision: str) -> float | None:
    """Return the operations per second that a device could do, or None where no table here says so."""
    if device.type != "cuda" or precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_BFLOAT16.items() if known in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
