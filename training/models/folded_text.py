"""The text projection folded into each block's key and value weights, the cheaper order for many tokens or steps.

Keys and values of block d are W_d (P (g * n) + b), where n is H_cond divided by its root mean square and g the weight
of the norm. Folded, they are (W_d P g) n + W_d b: one product per token instead of two.

Shapes: V conditionings, B batch, S text tokens, C text width, O = 2 * G * E rows of keys and values of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.models.kernels import ops


class FoldedTextProjection(NamedTuple):
    """The map of each block from n to its keys and values."""

    weights: tuple[Tensor, ...]
    """W_d P g, (O, C) each."""
    biases: tuple[Tensor, ...]
    """W_d b, (O,) each."""

    def project(self, conditioning: Tensor, eps: float) -> list[Tensor]:
        """H_cond (V, B, S, C) -> projected text (B, S, O) of each block."""
        normed = list(ops.rms_norm(conditioning, None, eps))
        per_block = normed if len(normed) > 1 else normed * len(self.weights)
        return [ops.linear(n, *maps) for n, *maps in zip(per_block, self.weights, self.biases, strict=True)]


def fold(norm_weight: Tensor, weight: Tensor, bias: Tensor, block_weights: Sequence[Tensor]) -> FoldedTextProjection:
    """Fold g (C,), P (C, C) and b (C,) into the W_d (O, C) of all blocks."""
    stacked = torch.cat(list(block_weights))
    weights = ops.linear(stacked, (weight * norm_weight).t()).chunk(len(block_weights))
    biases = (stacked @ bias).chunk(len(block_weights))
    if not torch.is_grad_enabled():
        ops.pack_constants(weights)
    return FoldedTextProjection(weights, biases)
