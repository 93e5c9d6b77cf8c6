"""Prepared texts of a batch, of different lengths: stacked with padding, or one by one.

Shapes: K rows of prepared text, B batch, S text tokens, C' channels.
"""

from typing import TypeAlias

import torch
from torch import Tensor

Prepared: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""Prepared texts of a batch: stacked to (K, B, S, C'), or one (K, S_i, C') for each sample. A CPU sums layers of the
latter without first copying all of them into a stack."""


def stack_texts(prepared: Prepared) -> Tensor:
    """Stack texts (K, S_i, C') to (K, B, S, C') fp32, zero-padded; return a stack unchanged.

    Where any text is on an accelerator the stack is too, even if the unconditional text is on the CPU.
    """
    if isinstance(prepared, Tensor):
        return prepared
    rows, _, channels = prepared[0].shape
    longest = max(text.shape[1] for text in prepared)
    device = next((text.device for text in prepared if text.device.type != "cpu"), prepared[0].device)
    stacked = torch.empty(rows, len(prepared), longest, channels, device=device)
    for sample, text in enumerate(prepared):
        stacked[:, sample, : text.shape[1]] = text
        stacked[:, sample, text.shape[1] :] = 0
    return stacked
