"""The fusion strategies: how the layers of the text encoder become the conditioning of each DiT block.

All follow arXiv 2602.03510. With alpha = softmax(z) over layers (Eq. 3),

    H_cond(t, d) = sum_l alpha_{t,d}^(l) * LN(H^(l))                                            (Eq. 2)

and the strategies differ only in z:

    penultimate   alpha is one at the layer before the last                                     (Eq. 4)
    uniform       alpha = 1 / L                                                                 (Eq. 5)
    static        z learned, one vector                                                         (Eq. 6)
    time_wise     z = g(phi(t)), one gate for all blocks                                        (Eq. 8)
    depth_wise    z_d learned, one vector per block                                             (Eq. 9)
    joint         z_d = g_d(phi(t)), one gate per block                                         (Eq. 10)

fuse_dit fuses nothing: its blocks share the encoder's own keys and values, see fuse_dit.py.

Shapes: L layers, D blocks, B batch, N text tokens, C channels; V conditionings: D where blocks differ in theirs, else
1. As in the paper, t = 0 is noise and t = 1 is data.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import Strategy
from training.models.kernels import ops
from training.models.kernels.ragged_texts import Prepared, stack_texts
from training.models.layers import sinusoids

LAYER_NORM_EPS = 1e-5


def normalise(hidden_states: Tensor) -> Tensor:
    """LN of Eq. 2, over channels, without affine parameters: (..., C) -> (..., C), fp32."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.layer_norm(hidden_states.float(), hidden_states.shape[-1:], eps=LAYER_NORM_EPS)


def shift_gate_time(t: Tensor) -> Tensor:
    """Eq. 11: t' = t + 0.01 * (1 - cos(pi * (t - 0.2) / 0.8)) for t in (0.2, 1], else t. Only sampling uses it."""
    shifted = t + 0.01 * (1 - torch.cos(math.pi * (t - 0.2) / 0.8))
    return torch.where(t > 0.2, shifted, t)


class TimeGate(nn.Module):
    """V gates g_v of Eq. 7: Linear, SiLU, Linear on the sinusoids phi(t) of Eq. 12, computed in fp32.

    The last layer starts at zero, so training starts at the uniform average. The released code overwrites that zero
    with a later Xavier pass.
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
        # All gates share one initial first layer, so joint starts as D copies of time_wise.
        bound = 1 / math.sqrt(self.embedding_size)
        for parameter in (self.weight_in, self.bias_in):
            values = torch.rand(parameter.shape[1:], generator=generator) * (2 * bound) - bound
            parameter.copy_(values.expand(parameter.shape))
        self.weight_out.zero_()
        self.bias_out.zero_()

    def forward(self, t: Tensor) -> Tensor:
        """Logits z = g(phi(t)) (V, B, L) at flow times t (B,). Eq. 7."""
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
        """V: the number of different conditionings that the blocks see at one time."""
        return self.num_blocks if self.strategy.varies_with_block else 1

    @property
    def is_fixed(self) -> bool:
        """True where nothing is learned, so the fused features of a text never change."""
        return self.strategy in (Strategy.PENULTIMATE, Strategy.UNIFORM)

    def _alpha(self, t: Tensor) -> Tensor:
        """Layer weights alpha (V, B, L) at flow times t (B,), fp32; (V, 1, L) where they don't depend on t."""
        match self.strategy:
            case Strategy.PENULTIMATE:  # Eq. 4: hidden_states[-2]
                alpha = torch.zeros(1, 1, self.num_layers, device=t.device)
                alpha[..., -2] = 1.0
                return alpha
            case Strategy.UNIFORM:  # Eq. 5
                return torch.full((1, 1, self.num_layers), 1 / self.num_layers, device=t.device)
            case Strategy.STATIC | Strategy.DEPTH_WISE:  # Eq. 6, Eq. 9
                assert self.logits is not None
                return self.logits.float().softmax(-1)[:, None]
            case _:  # Eq. 8, Eq. 10
                assert self.gate is not None
                return self.gate(t).softmax(-1)

    def all_weights(self, t: Tensor) -> Tensor:
        """Layer weights alpha (V, B, L) at flow times t (B,), fp32, rows sum to one. Eq. 3."""
        return self._alpha(t).expand(-1, t.shape[0], -1)

    def weights(self, t: Tensor, block_index: int) -> Tensor:
        """Layer weights alpha_{t,d} of one block: t (B,) -> (B, L), fp32, rows sum to one. Eq. 3."""
        if not 0 <= block_index < self.num_blocks:
            raise ValueError(f"block_index {block_index}: this model has blocks 0 to {self.num_blocks - 1}")
        return self.all_weights(t)[block_index if self.num_variants > 1 else 0]

    def forward(self, hidden_states: Tensor, t: Tensor, block_index: int) -> Tensor:
        """Eq. 2 as printed, for one block: hidden_states (L, B, N, C) and t (B,) -> H_cond (B, N, C)."""
        weights = self.weights(t, block_index)
        return torch.einsum("bl,lbnc->bnc", weights, normalise(hidden_states)).to(hidden_states.dtype)

    def prepare(self, hidden_states: Tensor) -> Tensor:
        """The part of Eq. 2 that training can't change, computed once per text: (L, ..., C) -> (K, ..., C), fp32.

        This is LN, which has no parameters; where the weights are fixed too it is the whole sum, and K = 1. Raises
        ValueError where the number of layers is not the model's.
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
        """The rest of Eq. 2 for all blocks: prepared texts of B samples and t (B,) -> H_cond (V, B, N, C).

        Returns the stack's type; fp32 for texts given one by one.
        """
        if self.is_fixed:
            return stack_texts(prepared)
        return ops.sum_layers(self._alpha(t), prepared)
