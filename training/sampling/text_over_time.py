"""Keys and values of texts at many scheduled times, from a few weighted sums of layers that all those times share.

A gate is a smooth function of t, so its layer weights at T times span few directions to fp32 rounding: 2 to 9 for any
T, for random and for trained gates. Fusion and projection are linear, so they are computed per direction instead of per
time, and each time combines the products. Only the norm before the projection is not linear, but it is one factor per
token, which follows from inner products of the fused directions.

Shapes: T times, R directions, V conditionings, L layers, B texts, S tokens, C text width, G key and value heads, E
channels of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from training.models.dit import DiT
from training.models.folded_text import FoldedTextProjection
from training.models.fusion import Fusion
from training.models.kernels import ops
from training.models.kernels.ragged_texts import Prepared
from training.models.layers import KeysValues

_TOLERANCE = 2e-7
"""The part of layer weights that omitted directions may hold, relative to their norm: less than fp32 rounding of a sum
over layers."""
_MAX_FUSED_VALUES = 2**24
"""Fused values above which the conditionings are fused one after the other."""


class TimeBasis(NamedTuple):
    """Layer weights of one gate at T times: coefficients (T, R) @ directions (R, L)."""

    coefficients: Tensor
    directions: Tensor

    @classmethod
    def of(cls, alpha: Tensor) -> "TimeBasis":
        """Return the smallest basis of layer weights (T, L), or themselves where none is smaller or they hold NaN."""
        exact = alpha.detach().double().cpu()
        identity = cls(torch.eye(len(alpha), device=alpha.device), alpha)
        if not exact.isfinite().all():
            return identity
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        weighted = left * values
        residuals = weighted.square().flip(-1).cumsum(-1).flip(-1).sqrt()
        num_needed = (residuals > _TOLERANCE * exact.norm(dim=-1, keepdim=True)).any(0).sum().clamp_min(1)
        if num_needed == len(alpha):
            return identity
        return cls(weighted[:, :num_needed].to(alpha), right[:num_needed].to(alpha))


def time_bases(fusion: Fusion, times: Tensor) -> list[TimeBasis]:
    """Return the basis of each of the V gates at times (T,)."""
    return [TimeBasis.of(alpha) for alpha in fusion.all_weights(times)]


@dataclass(frozen=True)
class KeysValuesOverTime:
    """Keys and values of one block, (B, G, S, E), at each of T times."""

    coefficients: Tensor
    """(T, R)"""
    products: Tensor
    """(R, B, S, 2 * G * E): the projection of each fused direction, without bias."""
    scales: Tensor
    """(T, B, S, 1): the factor of the norm before the projection, fp32."""
    bias: Tensor
    split: Callable[[Tensor], KeysValues]
    """Projected text (B, S, 2 * G * E) -> keys and values."""

    def at(self, time_index: int) -> KeysValues:
        """Return keys and values at one of the times."""
        combined = (self.coefficients[time_index] @ self.products.flatten(1)).view(self.products.shape[1:])
        return self.split(torch.addcmul(self.bias.float(), combined.float(), self.scales[time_index]))


def text_over_time(
    model: DiT, prepared: Prepared, bases: Sequence[TimeBasis], folded: FoldedTextProjection
) -> list[KeysValuesOverTime]:
    """Return for each block the result of `DiT.text_keys_values` for every text at each of the bases' times."""
    maps = list(zip(model.cross_attentions(), folded.weights, folded.biases, strict=True))
    blocks_per_basis = len(maps) // len(bases)  # one, or all
    blocks: list[KeysValuesOverTime] = []
    for index, (basis, fused) in enumerate(zip(bases, _fuse_directions(prepared, bases), strict=True)):
        basis_maps = maps[index * blocks_per_basis : (index + 1) * blocks_per_basis]
        products = [ops.linear(fused, weight) for _, weight, _ in basis_maps]
        coefficients = basis.coefficients.to(products[0].dtype)
        scales = inverse_rms(fused, coefficients, model.text_norm.eps)
        blocks += [
            KeysValuesOverTime(coefficients, product, scales, bias, attention.keys_values)
            for product, (attention, _, bias) in zip(products, basis_maps, strict=True)
        ]
    return blocks


def _fuse_directions(prepared: Prepared, bases: Sequence[TimeBasis]) -> Iterator[Tensor]:
    """Eq. 2 with the directions of each basis as layer weights: -> (R, B, S, C) for each.

    Fuses all bases at once, which reads the texts once, unless that takes too much memory.
    """
    directions = [basis.directions for basis in bases]
    num_values = prepared[0].numel() if isinstance(prepared, Tensor) else sum(text[0].numel() for text in prepared)
    if num_values * sum(map(len, directions)) <= _MAX_FUSED_VALUES:
        fused = ops.sum_layers(torch.cat(directions)[:, None], prepared)
        yield from fused.split([len(rows) for rows in directions])
    else:
        yield from (ops.sum_layers(rows[:, None], prepared) for rows in directions)


def inverse_rms(fused: Tensor, coefficients: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(h^2) + eps) of h = coefficients (T, R) @ fused (R, B, S, C), over C: (T, B, S, 1), fp32."""
    with torch.autocast(fused.device.type, enabled=False):
        by_token = fused.float().permute(1, 2, 0, 3).contiguous()
        products = by_token @ by_token.transpose(-1, -2)
        c = coefficients.float()
        pairs = (c[:, :, None] * c[:, None]).flatten(1)
        squares = torch.einsum("tp,bsp->tbs", pairs, products.flatten(2))
        return (squares.clamp_min(0) / fused.shape[-1] + eps).rsqrt()[..., None]
