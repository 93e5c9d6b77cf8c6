"""The fusion strategies, side by side: how the layers of the text encoder become the conditioning of each DiT block.

All follow arXiv 2602.03510. With alpha = softmax(z) over layers (Eq. 3),

    H_cond(t, d) = sum_l alpha_{t,d}^(l) * LN(H^(l))                                            (Eq. 2)

and the strategies differ in z alone:

    penultimate   alpha is one at the layer before the last                                     (Eq. 4)
    uniform       alpha = 1 / L                                                                 (Eq. 5)
    static        z learned, one vector                                                         (Eq. 6)
    time_wise     z = g(phi(t)), one gate for all blocks                                        (Eq. 8)
    depth_wise    z_d learned, one vector per block                                             (Eq. 9)
    joint         z_d = g_d(phi(t)), one gate per block                                         (Eq. 10)

fuse_dit fuses nothing: its blocks share the encoder's own keys and values, see fuse_dit.py.

Shapes: L layers, D blocks, B batch, N text tokens, C channels; V = D where blocks differ in their conditioning, else 1.
Time runs as in the paper: t = 0 is noise, t = 1 is data.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import Strategy
from training.models.kernels.onednn import linear
from training.models.layers import sinusoids
from training.sampling.text_over_time import TimeBasis

LAYER_NORM_EPS = 1e-5
_FUSED_VALUES = 2**24
"""How many values of fused directions are made at once."""

Prepared: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""Prepared texts of a batch: stacked to (K, B, S, C'), or one (K, S_i, C') for each sample as they are kept, so that a
CPU need not copy all layers of all texts to make a few sums of them."""


def stack_texts(prepared: Prepared) -> Tensor:
    """Stack texts (K, S_i, C') to (K, B, S, C') fp32, zeros behind the shorter ones; a stack is returned as it is.

    Texts of an accelerator are stacked there, even where one that stands for no prompt comes from the CPU.
    """
    if isinstance(prepared, Tensor):
        return prepared
    rows, _, channels = prepared[0].shape
    longest = max(text.shape[1] for text in prepared)
    device = next((text.device for text in prepared if text.device.type != "cpu"), prepared[0].device)
    stacked = torch.empty(rows, len(prepared), longest, channels, device=device)
    for place, text in enumerate(prepared):
        stacked[:, place, : text.shape[1]] = text
        stacked[:, place, text.shape[1] :] = 0
    return stacked


def normalise(hidden_states: Tensor) -> Tensor:
    """LN of Eq. 2: over channels, without affine parameters, in fp32. (..., C) -> (..., C) fp32."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.layer_norm(hidden_states.float(), hidden_states.shape[-1:], eps=LAYER_NORM_EPS)


def shift_gate_time(t: Tensor) -> Tensor:
    """Eq. 11: t' = t + 0.01 * (1 - cos(pi * (t - 0.2) / 0.8)) for t in (0.2, 1], else t. Used in sampling alone."""
    shifted = t + 0.01 * (1 - torch.cos(math.pi * (t - 0.2) / 0.8))
    return torch.where(t > 0.2, shifted, t)


class TimeGate(nn.Module):
    """V gates g_v of Eq. 7: Linear, SiLU, Linear on the sinusoids phi(t) of Eq. 12, computed in fp32.

    The last layer starts at zero and `initialise` leaves it there, so training starts at the uniform average. The
    released code loses that zero to a later Xavier pass.
    """

    def __init__(self, num_gates: int, num_layers: int, embedding_size: int, width: int, time_scale: float) -> None:
        super().__init__()
        self.embedding_size, self.time_scale = embedding_size, time_scale
        self.weight_in = nn.Parameter(torch.empty(num_gates, embedding_size, width))
        self.bias_in = nn.Parameter(torch.empty(num_gates, 1, width))
        self.weight_out = nn.Parameter(torch.empty(num_gates, width, num_layers))
        self.bias_out = nn.Parameter(torch.empty(num_gates, 1, num_layers))

    @torch.no_grad()
    def initialise_parameters(self, generator: torch.Generator) -> None:
        # Every gate starts from the same first layer, so that joint starts as D copies of time_wise.
        bound = 1 / math.sqrt(self.embedding_size)
        for parameter in (self.weight_in, self.bias_in):
            values = torch.rand(parameter.shape[1:], generator=generator) * (2 * bound) - bound
            parameter.copy_(values.expand(parameter.shape))
        self.weight_out.zero_()
        self.bias_out.zero_()

    def forward(self, t: Tensor) -> Tensor:
        """Logits z (V, B, L) at flow times t (B,)."""
        with torch.autocast(t.device.type, enabled=False):
            phi = sinusoids(t.float() * self.time_scale, self.embedding_size)
            hidden = F.silu(phi @ self.weight_in.float() + self.bias_in.float())
            return hidden @ self.weight_out.float() + self.bias_out.float()


class Fusion(nn.Module):
    """H_cond of Eq. 2 for one of the strategies."""

    def __init__(
        self,
        strategy: Strategy,
        num_layers: int,
        num_blocks: int,
        *,
        gate_embedding_size: int = 128,
        gate_width: int = 512,
        gate_time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if strategy is Strategy.FUSE_DIT:
            raise ValueError("fuse_dit shares the encoder's keys and values; it has no layer weights")
        self.strategy, self.num_layers, self.num_blocks = strategy, num_layers, num_blocks
        self.logits: nn.Parameter | None = None
        self.gate: TimeGate | None = None
        match strategy:
            case Strategy.STATIC:
                self.logits = nn.Parameter(torch.empty(1, num_layers))
            case Strategy.DEPTH_WISE:
                self.logits = nn.Parameter(torch.empty(num_blocks, num_layers))
            case Strategy.TIME_WISE:
                self.gate = TimeGate(1, num_layers, gate_embedding_size, gate_width, gate_time_scale)
            case Strategy.JOINT:
                self.gate = TimeGate(num_blocks, num_layers, gate_embedding_size, gate_width, gate_time_scale)

    @torch.no_grad()
    def initialise_parameters(self, generator: torch.Generator) -> None:
        if self.logits is not None:
            self.logits.zero_()

    @property
    def num_variants(self) -> int:
        """V: how many different conditionings the blocks see at one time."""
        return self.num_blocks if self.strategy.varies_with_block else 1

    @property
    def is_fixed(self) -> bool:
        """Whether nothing is learned, so that the fused features of a text never change."""
        return self.strategy in (Strategy.PENULTIMATE, Strategy.UNIFORM)

    def all_weights(self, t: Tensor) -> Tensor:
        """Layer weights alpha (V, B, L) at flow times t (B,), fp32. They don't depend on B where t plays no part."""
        match self.strategy:
            case Strategy.PENULTIMATE:  # Eq. 4: hidden_states[-2]
                alpha = torch.zeros(1, self.num_layers, device=t.device)
                alpha[0, -2] = 1.0
            case Strategy.UNIFORM:  # Eq. 5
                alpha = torch.full((1, self.num_layers), 1 / self.num_layers, device=t.device)
            case Strategy.STATIC | Strategy.DEPTH_WISE:  # Eq. 6, Eq. 9
                assert self.logits is not None
                alpha = self.logits.float().softmax(-1)
            case _:  # Eq. 8, Eq. 10
                assert self.gate is not None
                return self.gate(t).softmax(-1)
        return alpha[:, None].expand(-1, t.shape[0], -1)

    def weights(self, t: Tensor, block_index: int) -> Tensor:
        """Layer weights alpha_{t,d} of one block: t (B,) -> (B, L), fp32, rows sum to one. Eq. 3."""
        if not 0 <= block_index < self.num_blocks:
            raise ValueError(f"block_index {block_index}: this model has blocks 0 to {self.num_blocks - 1}")
        return self.all_weights(t)[block_index if self.num_variants > 1 else 0]

    def forward(self, hidden_states: Tensor, t: Tensor, block_index: int) -> Tensor:
        """Eq. 2 as written, for one block: hidden_states (L, B, N, C) and t (B,) -> H_cond (B, N, C)."""
        weights = self.weights(t, block_index)
        return torch.einsum("bl,lbnc->bnc", weights, normalise(hidden_states)).to(hidden_states.dtype)

    def prepare(self, hidden_states: Tensor) -> Tensor:
        """The part of Eq. 2 that training can't change, done once per text: (L, ..., C) -> (K, ..., C), fp32.

        LN has no parameters, so it is applied here; where the weights are fixed too, so is the sum, and K = 1.
        Raises ValueError where the number of layers is not the model's.
        """
        if hidden_states.shape[0] != self.num_layers:
            raise ValueError(
                f"text features have {hidden_states.shape[0]} layers, the model was built for {self.num_layers}; "
                "set num_text_layers to the encoder's or encode the texts again"
            )
        match self.strategy:
            case Strategy.PENULTIMATE:
                return normalise(hidden_states[-2:-1])
            case Strategy.UNIFORM:
                return normalise(hidden_states).mean(0, keepdim=True)
            case _:
                return normalise(hidden_states)

    def fuse(self, prepared: Prepared, t: Tensor) -> Tensor:
        """The rest of Eq. 2 for all blocks: prepared text of B samples, t (B,) -> (V, B, N, C).

        Fp32 where texts come one by one, else of the stack's type.
        """
        if self.is_fixed:
            return stack_texts(prepared)
        alpha = self.all_weights(t) if self.logits is None else self.logits.float().softmax(-1)[:, None]
        return _weighted_sums(alpha, prepared)

    def time_bases(self, times: Tensor) -> list[TimeBasis]:
        """Bases of the layer weights of each of the V gates at times (T,)."""
        return [TimeBasis.of(alpha) for alpha in self.all_weights(times)]

    def fuse_directions(self, prepared: Prepared, bases: Sequence[TimeBasis]) -> Iterator[Tensor]:
        """Eq. 2 with the directions of each basis in place of layer weights: -> (R, B, N, C) for each.

        Those of all bases at once, which reads the texts once, where it makes few values.
        """
        directions = [basis.directions for basis in bases]
        row = prepared[0].numel() if isinstance(prepared, Tensor) else sum(text[0].numel() for text in prepared)
        if row * sum(map(len, directions)) <= _FUSED_VALUES:
            fused = _weighted_sums(torch.cat(directions)[:, None], prepared)
            yield from fused.split([len(some) for some in directions])
        else:
            yield from (_weighted_sums(some[:, None], prepared) for some in directions)


def _weighted_sums(alpha: Tensor, prepared: Prepared) -> Tensor:
    """sum_l alpha (V, B or 1, L) * prepared (L, B, N, C) -> (V, B, N, C)."""
    if alpha.device.type == "cpu":
        texts = prepared.unbind(1) if isinstance(prepared, Tensor) else prepared
        dtype = prepared.dtype if isinstance(prepared, Tensor) else torch.float32
        return cast(Tensor, _SumOnCpu.apply(alpha.to(dtype), *texts))
    prepared = stack_texts(prepared)
    num_layers, batch, tokens, channels = prepared.shape
    alpha = alpha.to(prepared.dtype)
    if alpha.shape[1] == 1:
        return (alpha[:, 0] @ prepared.reshape(num_layers, -1)).view(-1, batch, tokens, channels)
    fused = alpha.transpose(0, 1) @ prepared.flatten(2).transpose(0, 1)
    return fused.view(batch, -1, tokens, channels).transpose(0, 1)


class _SumOnCpu(torch.autograd.Function):
    """sum_l alpha (V, B or 1, L) * text (L, N_i, C) of each sample, written where it belongs in (V, B, N, C): a batched
    product would be laid out by sample, and every pass behind it would copy. Prepared text learns nothing, so it gets
    no gradient."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, *texts: Tensor) -> Tensor:
        ctx.save_for_backward(*texts)
        ctx.is_shared = alpha.shape[1] == 1
        longest, channels = max(text.shape[1] for text in texts), texts[0].shape[2]
        fused = alpha.new_empty(alpha.shape[0], len(texts), longest, channels)
        for sample, text in enumerate(texts):
            weights, length = alpha[:, 0 if ctx.is_shared else sample], text.shape[1]
            torch.mm(weights, text.to(alpha.dtype).flatten(1), out=fused[:, sample, :length].flatten(1))
            fused[:, sample, length:] = 0
        return fused

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        texts, grad = ctx.saved_tensors, grads[0]
        products = [
            linear(grad[:, sample, : text.shape[1]].flatten(1), text.to(grad.dtype).flatten(1))
            for sample, text in enumerate(texts)
        ]
        of_alpha = torch.stack(products, dim=1)
        return of_alpha.sum(1, keepdim=True) if ctx.is_shared else of_alpha, *(None for _ in texts)
