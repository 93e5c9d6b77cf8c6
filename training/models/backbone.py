"""The diffusion transformer of arXiv 2602.03510 without its text path: patches in, blocks, patches out.

A block is x += SA(norm x); x += CA(x); x += MLP(norm x), with no timestep conditioning unless the configuration adds
adaLN. `dit.py` gives the blocks fused text, `fuse_dit.py` the keys and values of an LLM.

Shapes: B batch, N image tokens, S text tokens, C channels, h and w latent height and width, G key and value heads, E
channels of a head; K rows of prepared text, C' their channels.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelConfig
from training.models.folded_text import FoldedTextProjection
from training.models.kernels.ragged_texts import Prepared
from training.models.layers import (
    CrossAttention,
    KeysValues,
    Projection,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    sinusoids,
)

_TIME_EMBEDDING_SIZE = 256
_NUM_MODULATIONS = 6
"""Scale, shift and gate for attention and for the MLP."""


class TimestepModulation(nn.Module):
    """adaLN-single (PixArt-alpha, arXiv 2310.00426): one map of t for all blocks, to which each block adds a table.

    Differs from PixArt: it starts at the identity (last layer and tables zero, gates 1 + g), so that a model starts as
    the same function with and without it.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.inner = Projection(_TIME_EMBEDDING_SIZE, (hidden_size,), bias=True)
        self.outer = Projection(hidden_size, (hidden_size,), bias=True)
        self.modulations = Projection(hidden_size, (hidden_size,) * (_NUM_MODULATIONS + 2), bias=True, zero=True)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t (B,) -> modulations of the blocks (B, 6, C) and of the output (B, 2, C)."""
        embedding = self.outer(F.silu(self.inner(sinusoids(1000 * t, _TIME_EMBEDDING_SIZE))))
        values = self.modulations(F.silu(embedding)).unflatten(-1, (_NUM_MODULATIONS + 2, -1))
        return values[:, :_NUM_MODULATIONS], values[:, _NUM_MODULATIONS:]


class ModulationTable(nn.Module):
    """The table that one block adds to the shared modulations; starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(_NUM_MODULATIONS, hidden_size))

    @torch.no_grad()
    def initialise_parameters(self, generator: torch.Generator) -> None:
        self.values.zero_()

    def forward(self, shared: Tensor) -> list[Tensor]:
        """Shared modulations (B, 6, C) -> six of this block, (B, 1, C) each."""
        return list((shared + self.values)[:, :, None].unbind(1))


class Block(nn.Module):
    """x += SA(norm x); x += CA(x); x += MLP(norm x). fuse_dit has no CA; its SA sees the text as well."""

    def __init__(self, config: ModelConfig, *, cross_attention: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config) if cross_attention else None
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)
        has_table = config.timestep_conditioning == "adaln"
        self.modulation = ModulationTable(config.hidden_size) if has_table else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        text: KeysValues,
        mask: Tensor | None,
        modulations: Tensor | None,
    ) -> Tensor:
        """Images (B, N, C) with n texts each, keys and values (n * B, G, S, E) -> (n * B, N, C)."""
        if self.modulation is None or modulations is None:
            x = self._attend(x, self.attention_norm(x), rotary, text, mask)
            return x + self.mlp(self.mlp_norm(x))
        scale_sa, shift_sa, gate_sa, scale_mlp, shift_mlp, gate_mlp = self.modulation(modulations)
        modulated = self.attention_norm(x) * (1 + scale_sa) + shift_sa
        x = self._attend(x, modulated, rotary, text, mask, 1 + gate_sa)
        return x + self.mlp(self.mlp_norm(x) * (1 + scale_mlp) + shift_mlp) * (1 + gate_mlp)

    def _attend(
        self,
        x: Tensor,
        normed: Tensor,
        rotary: tuple[Tensor, Tensor],
        text: KeysValues,
        mask: Tensor | None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """x += SA(normed) * gate; x += CA(x)."""
        if self.cross_attention is None:
            x, normed = _repeat_per_text(x, text), _repeat_per_text(normed, text)
            attended = self.attention(normed, *rotary, text=text, mask=mask)
            return x + (attended if gate is None else attended * gate)
        attended = self.attention(normed, *rotary)
        x = _repeat_per_text(x + (attended if gate is None else attended * gate), text)
        return x + self.cross_attention(x, text, mask)

    def text_keys_values(self, conditioning: Tensor) -> KeysValues:
        """Keys and values of the cross-attention from conditioning (B, S, C)."""
        assert self.cross_attention is not None, "fuse_dit's blocks have none"
        return self.cross_attention.keys_values(self.cross_attention.text_kv(conditioning))


def _repeat_per_text(x: Tensor, text: KeysValues) -> Tensor:
    """Repeat images (B, N, C) for n texts each (n * B, G, S, E): they are equal until a block reads its text."""
    num_texts = text[0].shape[0] // x.shape[0]
    return x if num_texts == 1 else x.repeat(num_texts, 1, 1)


class Backbone(nn.Module, ABC):
    """The part that DiT and FuseDiT share."""

    def __init__(self, config: ModelConfig, *, cross_attention: bool) -> None:
        super().__init__()
        self.config = config
        patch_values = config.latent_channels * config.patch_size**2
        # The noise in the patches has to reach the output, and a square random matrix is badly conditioned. Demo model,
        # 200 steps: loss 1.12 with this and residual_scale 0.3, 1.47 with Xavier and 1. Where patches are much narrower
        # than the hidden size, as in the paper, the two hardly differ.
        self.patch_in = Projection(patch_values, (config.hidden_size,), bias=True, orthogonal=True)
        self.blocks = nn.ModuleList(Block(config, cross_attention=cross_attention) for _ in range(config.num_blocks))
        self.norm_out = RMSNorm(config.hidden_size, config.norm_eps)
        self.patch_out = Projection(config.hidden_size, (patch_values,), bias=True, zero=True)
        has_time = config.timestep_conditioning == "adaln"
        self.time = TimestepModulation(config.hidden_size) if has_time else None

    @abstractmethod
    def prepare_text(self, hidden_states: Tensor) -> Tensor:
        """The frozen part of the text path, computed once per text: (L, S, C) -> (K, S, C')."""

    @abstractmethod
    def text_keys_values(
        self, prepared: Prepared, t: Tensor, folded: FoldedTextProjection | None = None
    ) -> list[KeysValues]:
        """The trained part of the text path: prepared texts, t (B,) -> keys and values (B, G, S, E) of each block.

        `folded` is the result of `fold_text_projection`, to compute it once for many calls.
        """

    def fold_text_projection(self) -> FoldedTextProjection | None:
        """Fold the text projection into each block's key and value weights; None where there is none."""
        return None

    @property
    def text_depends_on_time(self) -> bool:
        """True where `text_keys_values` depends on t."""
        return False

    @property
    def text_depends_on_latents(self) -> bool:
        """True where that t is estimated from the latents, so that sampling computes text for each image."""
        return False

    def gate_time(self, latents: Tensor, t: Tensor) -> Tensor:
        """The time (B,) that gates see at latents (B, C, h, w) and flow times t (B,)."""
        return t

    @abstractmethod
    def rotary(self, height: int, width: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of `rotate` for h / patch x w / patch image tokens after texts of the given lengths (B,)."""

    @abstractmethod
    def attention_mask(self, text_mask: Tensor | None, num_image_tokens: int) -> Tensor | None:
        """Turn a text mask (B, S), True for real tokens, into the mask of the attention that sees text."""

    def forward(
        self, latents: Tensor, t: Tensor, prepared: Prepared, lengths: Tensor, text_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity at latents (B, C, h, w) and flow times t (B,), given prepared texts of the same samples.

        `lengths` (B,) are the texts' real lengths; `text_mask` (B, S) is None where no text is padded. Where gates
        follow an estimated time, returns (velocity, logits (B,) of that time).
        """
        return self.velocity(latents, t, self.text_keys_values(prepared, t), lengths, text_mask)

    def velocity(
        self, latents: Tensor, t: Tensor, text: list[KeysValues], lengths: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Velocity (n * B, C, h, w), given each block's keys and values of n * B texts, n per image.

        All images come once per text, n times over, in the order of the texts. `t` is (B,), or (1,) for all.
        """
        height, width = latents.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} are not divisible by the patch size {patch}")
        rotary = self.rotary(height // patch, width // patch, lengths)
        x = self.patch_in(self._to_patches(latents))
        mask = self.attention_mask(text_mask, x.shape[1])
        modulations, modulation_out = self.time(t) if self.time is not None else (None, None)
        for block, keys_values in zip(self.blocks, text, strict=True):
            x = block(x, rotary, keys_values, mask, modulations)
        x = self.norm_out(x)
        if modulation_out is not None:
            scale, shift = modulation_out[:, :, None].unbind(1)
            x = x * (1 + scale) + shift
        return self._to_latents(self.patch_out(x), height, width)

    def _to_patches(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, C * patch * patch)."""
        batch, channels, height, width = latents.shape
        p = self.config.patch_size
        patches = latents.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, (height // p) * (width // p), channels * p * p)

    def _to_latents(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C * patch * patch) -> (B, C, h, w)."""
        p = self.config.patch_size
        grid = patches.reshape(patches.shape[0], height // p, width // p, -1, p, p)
        return grid.permute(0, 3, 1, 4, 2, 5).reshape(patches.shape[0], -1, height, width)
