"""Keys and values of texts at many scheduled times, from the few sums of layers that all of those times are made of.

A gate is a smooth function of t, so its layer weights at T times span few directions to fp32 rounding: 2 to 9 for any
T in the gates looked at, random ones and trained ones. Fusion and projection are linear; so they are done for each
direction in place of each time, and every time takes its own combination of the products. Only the norm before the
projection is not linear; but it is one factor for each token, which follows from products of the fused directions with
each other.

Shapes: T times, R directions, L layers, B texts, S tokens, C text width, G key and value heads, E channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.models.layers import KeysValues

_LEFT_OUT = 2e-7
"""What directions that are left out may take from layer weights, as a part of their length: less than fp32 rounding
takes from a sum over layers."""


class TimeBasis(NamedTuple):
    """Layer weights of one gate at T times: coefficients (T, R) @ directions (R, L)."""

    coefficients: Tensor
    directions: Tensor

    @classmethod
    def of(cls, alpha: Tensor) -> "TimeBasis":
        """Return the smallest basis of layer weights (T, L); they themselves where none is smaller or they are NaN."""
        exact = alpha.detach().double().cpu()
        themselves = cls(torch.eye(len(alpha), device=alpha.device), alpha)
        if not exact.isfinite().all():
            return themselves
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        weighted = left * values
        left_out = weighted.square().flip(-1).cumsum(-1).flip(-1).sqrt()
        needed = (left_out > _LEFT_OUT * exact.norm(dim=-1, keepdim=True)).any(0).sum().clamp_min(1)
        if needed == len(alpha):
            return themselves
        return cls(weighted[:, :needed].to(alpha), right[:needed].to(alpha))


@dataclass(frozen=True)
class KeysValuesOverTime:
    """Keys and values of one block, (B, G, S, E), at each of T times."""

    coefficients: Tensor
    """(T, R)"""
    products: Tensor
    """(R, B, S, 2 * G * E): the projection of each fused direction, without bias."""
    scales: Tensor
    """(T, B, S, 1): what the norm before the projection multiplies by, fp32."""
    bias: Tensor
    split: Callable[[Tensor], KeysValues]
    """Projected text (B, S, 2 * G * E) -> keys and values."""

    def at(self, place: int) -> KeysValues:
        """Keys and values at the time of this place."""
        combined = (self.coefficients[place] @ self.products.flatten(1)).view(self.products.shape[1:])
        return self.split(torch.addcmul(self.bias.float(), combined.float(), self.scales[place]))


def inverse_rms(fused: Tensor, coefficients: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(h^2) + eps) of h = coefficients (T, R) @ fused (R, B, S, C), over C: (T, B, S, 1), fp32."""
    with torch.autocast(fused.device.type, enabled=False):
        by_token = fused.float().permute(1, 2, 0, 3).contiguous()
        products = by_token @ by_token.transpose(-1, -2)
        c = coefficients.float()
        pairs = (c[:, :, None] * c[:, None]).flatten(1)
        squares = torch.einsum("tp,bsp->tbs", pairs, products.flatten(2))
        return (squares.clamp_min(0) / fused.shape[-1] + eps).rsqrt()[..., None]
