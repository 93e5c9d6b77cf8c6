"""Layers of both backbones: projections, norms, rotary positions, attention, SwiGLU, and their initial values.

Shapes: B batch, N image tokens, S text tokens, C channels, H query heads, G key and value heads, E channels of a head.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelConfig
from training.models.kernels import ops


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on (seed, name) alone."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def initialise(model: nn.Module, seed: int) -> None:
    """Set the initial value of every parameter, with one generator per parameter name.

    Parameters of the same name and shape start equal in all strategies, so arms differ only in their fusion. Nothing
    else sets initial values, so a zero init stays zero.
    """
    for name, module in model.named_modules():
        start = getattr(module, "initialise_parameters", None)
        if start is not None:
            start(named_generator(seed, name))


@torch.no_grad()
def fill_normal(parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with N(0, std^2), drawn on the CPU so that devices agree."""
    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


@torch.no_grad()
def fill_xavier(weight: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix (out, in) with the Xavier uniform distribution."""
    bound = math.sqrt(6.0 / sum(weight.shape))
    weight.copy_(torch.rand(weight.shape, generator=generator) * (2 * bound) - bound)


@torch.no_grad()
def fill_orthogonal(weight: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix (out, in) with orthonormal rows or columns, scaled to the variance of `fill_xavier`."""
    left, _, right = torch.linalg.svd(torch.randn(weight.shape, generator=generator), full_matrices=False)
    weight.copy_((left @ right) * math.sqrt(2.0 * max(weight.shape) / sum(weight.shape)))


class Projection(nn.Linear):
    """One or several linear maps of the same input in one product, of the output sizes `outputs`.

    Each map starts Xavier uniform with its own fan-out, or normal with `std`, or, with `orthogonal`, orthogonal with
    Xavier's variance; then it is multiplied by `scale`. Biases start at zero, and with `zero` weights do too.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Sequence[int],
        *,
        bias: bool = False,
        zero: bool = False,
        std: float | None = None,
        scale: float = 1.0,
        orthogonal: bool = False,
    ) -> None:
        super().__init__(in_features, sum(outputs), bias=bias)
        self.outputs, self.zero, self.std, self.scale, self.orthogonal = tuple(outputs), zero, std, scale, orthogonal

    def reset_parameters(self) -> None:
        """Do nothing: `initialise` sets initial values."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def initialise_parameters(self, generator: torch.Generator) -> None:
        if self.bias is not None:
            self.bias.zero_()
        if self.zero:
            self.weight.zero_()
            return
        for part in self.weight.split(self.outputs):
            if self.std is not None:
                fill_normal(part, self.std, generator)
            elif self.orthogonal:
                fill_orthogonal(part, generator)
            else:
                fill_xavier(part, generator)
            part.mul_(self.scale)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    @torch.no_grad()
    def initialise_parameters(self, generator: torch.Generator) -> None:
        self.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def sinusoids(t: Tensor, size: int) -> Tensor:
    """phi(t) = [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i / (size / 2)): (B,) -> (B, size), fp32. Eq. 12."""
    half = size // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=16)
def grid_angles(height: int, width: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Return the angles of 2D rotary positions, (height * width, E / 2), fp32: E / 4 for rows, then E / 4 for columns.

    Rotating channel i against channel i + E / 2 gives the head layout [rows, columns, rows, columns] in quarters.
    """
    with torch.inference_mode(False):  # a table cached by sampling must work in training too
        frequencies = axis_frequencies(head_dim, theta, device)
        rows = torch.arange(height, dtype=torch.float32, device=device)[:, None, None] * frequencies
        columns = torch.arange(width, dtype=torch.float32, device=device)[None, :, None] * frequencies
        both = [rows.expand(height, width, -1), columns.expand(height, width, -1)]
        return torch.cat(both, dim=-1).reshape(height * width, head_dim // 2)


def axis_frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Return the E / 4 rotary frequencies of one image axis, which owns half of the head's channels."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=device) / (head_dim // 2)
    return theta**-exponents


def rotary_tables(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Turn angles (..., E / 2) into the factors of `rotate`: (cos, cos) and (-sin, sin), (..., E) each."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i of each head against channel i + E / 2: x (B, N, H, E), tables (N or B x N, 1, E)."""
    values = x.float()
    return torch.addcmul(values * cos, values.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, each (B, G, S, E)."""


def attend(q: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
    """Attention of q (B, H, N, E) over grouped keys and values (B, G, S, E), flattened to (B, N, H * E).

    `mask` is boolean, True where a key is visible, broadcast to (B, H, N, S); None, which is faster, shows all keys.
    """
    k, v = keys_values
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention of image tokens with 2D rotary positions; fuse_dit prepends text keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.qkv = Projection(config.hidden_size, (query, key_value, key_value))
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out = Projection(query, (config.hidden_size,), scale=config.residual_scale)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, text: KeysValues | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split((self.heads, self.kv_heads, self.kv_heads), 2)
        q = rotate(self.q_norm(q), cos, sin).transpose(1, 2)
        k = rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if text is not None:
            k, v = torch.cat([text[0].to(k.dtype), k], dim=2), torch.cat([text[1].to(v.dtype), v], dim=2)
        return self.out(attend(q, (k, v), mask))


class CrossAttention(nn.Module):
    """Attention of image tokens over the conditioning, without positions on either side."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = Projection(config.hidden_size, (query,))
        self.text_kv = Projection(config.text_width, (key_value, key_value))
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out = Projection(query, (config.hidden_size,), scale=config.residual_scale)

    def keys_values(self, projected: Tensor) -> KeysValues:
        """Keys and values (B, G, S, E) from text_kv(conditioning), (B, S, 2 * G * E)."""
        k, v = projected.unflatten(-1, (-1, self.head_dim)).split(self.kv_heads, 2)
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, text: KeysValues, mask: Tensor | None) -> Tensor:
        q = self.q_norm(self.q(x).unflatten(-1, (self.heads, self.head_dim))).transpose(1, 2)
        k, v = text[0].to(q.dtype), text[1].to(q.dtype)
        return self.out(attend(q, (k, v), mask))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Projection(config.hidden_size, (config.mlp_width, config.mlp_width))
        self.down = Projection(config.mlp_width, (config.hidden_size,), scale=config.residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.silu_gated(x, self.gate_up.weight))
