"""The diffusion transformer with cross-attention to fused text, the backbone of every strategy but fuse_dit.

Shapes: B batch, N image tokens, S text tokens, L LLM layers, D blocks, C channels, h and w latent height and width;
K rows of prepared text. The backbone is that of arXiv 2602.03510: a block is x += SA(norm x); x += CA(x);
x += MLP(norm x), with no timestep conditioning unless the configuration adds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelConfig, Strategy, check_gate_signal
from training.models.fusion import Fusion, Prepared
from training.models.kernels.onednn import linear, pack
from training.models.layers import (
    CrossAttention,
    KeysValues,
    Projection,
    RMSNorm,
    SelfAttention,
    SwiGLU,
    grid_angles,
    initialise,
    rms_norm,
    rotary_tables,
    sinusoids,
)
from training.models.time_head import TimeHead
from training.sampling.text_over_time import KeysValuesOverTime, TimeBasis, inverse_rms

_TIME_EMBEDDING_SIZE = 256


class TextProjection(NamedTuple):
    """A map of text: weight (out, in), bias (out,), and the weight as `cpu_products.pack` lays it out, if it did."""

    weight: Tensor
    bias: Tensor
    packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, packed=self.packed)


_NUM_MODULATIONS = 6
"""Scale, shift and gate for attention and for the MLP."""


class TimestepModulation(nn.Module):
    """adaLN-single (PixArt-alpha, arXiv 2310.00426): one map of t for all blocks, beside a table in each block.

    Differs from PixArt: it starts at the identity (last layer and tables zero, gates 1 + g), so that with and without
    it a model starts as the same function.
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
    """What one block adds to the shared modulations; starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(_NUM_MODULATIONS, hidden_size))

    @torch.no_grad()
    def initialise_parameters(self, generator: torch.Generator) -> None:
        self.values.zero_()

    def forward(self, shared: Tensor) -> list[Tensor]:
        return list((shared + self.values)[:, :, None].unbind(1))


class Block(nn.Module):
    """x += SA(norm x); x += CA(x) where there is cross-attention; x += MLP(norm x)."""

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
        if self.cross_attention is None:
            x = _for_each_text(x, text)
        if self.modulation is None or modulations is None:
            x = x + self._attend(self.attention_norm(x), rotary, text, mask)
            if self.cross_attention is not None:
                x = _for_each_text(x, text)
                x = x + self.cross_attention(x, text, mask)
            return x + self.mlp(self.mlp_norm(x))
        scale_sa, shift_sa, gate_sa, scale_mlp, shift_mlp, gate_mlp = self.modulation(modulations)
        modulated = self.attention_norm(x) * (1 + scale_sa) + shift_sa
        x = x + self._attend(modulated, rotary, text, mask) * (1 + gate_sa)
        if self.cross_attention is not None:
            x = _for_each_text(x, text)
            x = x + self.cross_attention(x, text, mask)
        return x + self.mlp(self.mlp_norm(x) * (1 + scale_mlp) + shift_mlp) * (1 + gate_mlp)

    def text_keys_values(self, conditioning: Tensor) -> KeysValues:
        """Keys and values of the cross-attention from conditioning (B, S, C)."""
        assert self.cross_attention is not None, "fuse_dit's blocks have none"
        return self.cross_attention.keys_values(self.cross_attention.text_kv(conditioning))

    def _attend(self, x: Tensor, rotary: tuple[Tensor, Tensor], text: KeysValues, mask: Tensor | None) -> Tensor:
        if self.cross_attention is None:
            return self.attention(x, *rotary, text=text, mask=mask)
        return self.attention(x, *rotary)


def _for_each_text(x: Tensor, text: KeysValues) -> Tensor:
    """Repeat images (B, N, C) for n texts each (n * B, G, S, E); they are the same until a block has seen its text."""
    times = text[0].shape[0] // x.shape[0]
    return x if times == 1 else x.repeat(times, 1, 1)


class Backbone(nn.Module, ABC):
    """What DiT and FuseDiT have in common: patches in, blocks, patches out."""

    def __init__(self, config: ModelConfig, *, cross_attention: bool) -> None:
        super().__init__()
        self.config = config
        patch_values = config.latent_channels * config.patch_size**2
        # Noise has to pass through to be taken away, and a square random matrix is badly conditioned. Demo model, 200
        # steps: loss 1.12 with this and residual_scale 0.3, 1.47 with Xavier and 1. Where patches are much narrower
        # than the hidden size, as in the paper, the two hardly differ.
        self.patch_in = Projection(patch_values, (config.hidden_size,), bias=True, orthogonal=True)
        self.blocks = nn.ModuleList(Block(config, cross_attention=cross_attention) for _ in range(config.num_blocks))
        self.norm_out = RMSNorm(config.hidden_size, config.norm_eps)
        self.patch_out = Projection(config.hidden_size, (patch_values,), bias=True, zero=True)
        has_time = config.timestep_conditioning == "adaln"
        self.time = TimestepModulation(config.hidden_size) if has_time else None

    @abstractmethod
    def prepare_text(self, hidden_states: Tensor) -> Tensor:
        """The frozen part of the text path, done once per text: (L, S, C) -> (K, S, C')."""

    @abstractmethod
    def text_keys_values(
        self, prepared: Prepared, t: Tensor, projections: Sequence[TextProjection] | None = None
    ) -> list[KeysValues]:
        """The trained part of the text path: prepared (K, B, S, C'), t (B,) -> keys and values of each block.

        `projections` are those of `text_projections`, where they were made before.
        """

    def text_projections(self) -> list[TextProjection] | None:
        """What `text_keys_values` makes of weights alone, worth keeping while it is asked for many times; or None."""
        return None

    @property
    def text_depends_on_time(self) -> bool:
        """Whether `text_keys_values` depends on t."""
        return False

    @property
    def text_depends_on_latents(self) -> bool:
        """Whether that time is read off the latents, so that sampling has to repeat it for each image."""
        return False

    def gate_time(self, latents: Tensor, t: Tensor) -> Tensor:
        """The time (B,) that gates see at latents (B, C, h, w) and flow times t (B,)."""
        return t

    @abstractmethod
    def rotary(self, height: int, width: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of `rotate` for h / patch x w / patch image tokens behind texts of the given lengths (B,)."""

    @abstractmethod
    def attention_mask(self, text_mask: Tensor | None, num_image_tokens: int) -> Tensor | None:
        """Turn a text mask (B, S), True for real tokens, into the mask of the attention that sees text."""

    def forward(
        self, latents: Tensor, t: Tensor, prepared: Prepared, lengths: Tensor, text_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity at latents (B, C, h, w) and flow times t (B,), given prepared text of the same samples.

        `lengths` (B,) are the texts' real lengths; `text_mask` (B, S) is None where no text is padded. Where gates
        follow an estimated time, its logits (B,) come beside the velocity.
        """
        return self.velocity(latents, t, self.text_keys_values(prepared, t), lengths, text_mask)

    def velocity(
        self, latents: Tensor, t: Tensor, text: list[KeysValues], lengths: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Velocity (n * B, C, h, w), given keys and values of n * B texts for each block, n of them for each image.

        Images come n times over, in the order of the texts. `t` is (B,), or (1,) where it is one for all.
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


class DiT(Backbone):
    """The backbone that reads fused text by cross-attention."""

    def __init__(self, config: ModelConfig, strategy: Strategy) -> None:
        super().__init__(config, cross_attention=True)
        check_gate_signal(config, strategy)
        self.time_head = TimeHead(config.latent_channels) if config.gate_signal == "estimated" else None
        self.fusion = Fusion(
            strategy,
            config.num_text_layers,
            config.num_blocks,
            gate_embedding_size=config.gate_embedding_size,
            gate_width=config.gate_width,
            gate_time_scale=config.gate_time_scale,
        )
        self.folds_text_projection = True
        """Whether keys and values may be computed from the product of matrices, which needs all blocks' at once."""
        self.text_norm = RMSNorm(config.text_width, config.norm_eps)
        self.text_projection = Projection(config.text_width, (config.text_width,), bias=True, std=0.02)

    def prepare_text(self, hidden_states: Tensor) -> Tensor:
        return self.fusion.prepare(hidden_states)

    @property
    def text_depends_on_time(self) -> bool:
        return self.fusion.gate is not None

    @property
    def text_depends_on_latents(self) -> bool:
        return self.time_head is not None

    def gate_time(self, latents: Tensor, t: Tensor) -> Tensor:
        return t if self.time_head is None else self.time_head(latents).sigmoid().detach()

    def forward(
        self, latents: Tensor, t: Tensor, prepared: Prepared, lengths: Tensor, text_mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.time_head is None:
            return super().forward(latents, t, prepared, lengths, text_mask)
        logits = self.time_head(latents)
        text = self.text_keys_values(prepared, logits.sigmoid().detach())
        return self.velocity(latents, t, text, lengths, text_mask), logits

    def text_keys_values(
        self, prepared: Prepared, t: Tensor, projections: Sequence[TextProjection] | None = None
    ) -> list[KeysValues]:
        """Keys and values of text_projection(text_norm(H_cond)) for each block, the products in the cheaper order.

        The norm's weights are taken into the matrix, so that backward needs no product with it where nothing before it
        learns. Blocks that see different conditioning take the matrix into their own key and value weights
        (`text_projections`) where those have fewer rows than the batch has tokens.
        """
        fused = self.fusion.fuse(prepared, t)
        normed = rms_norm(fused, None, self.text_norm.eps)
        attentions = self._cross_attentions()
        if projections is None and self.folds_text_projection:
            rows = sum(attention.text_kv.out_features for attention in attentions)
            projections = self.text_projections() if rows < normed.shape[:-1].numel() else None
        inputs = normed if projections is not None else self._projection()(normed)
        variants = list(inputs) * (1 if inputs.shape[0] > 1 else len(attentions))
        if projections is None:
            blocks = [cast(Block, block) for block in self.blocks]
            return [block.text_keys_values(variant) for block, variant in zip(blocks, variants, strict=True)]
        return [
            attention.keys_values(projection(variant))
            for attention, variant, projection in zip(attentions, variants, projections, strict=True)
        ]

    def text_over_time(
        self, prepared: Prepared, bases: Sequence[TimeBasis], projections: Sequence[TextProjection]
    ) -> list[KeysValuesOverTime]:
        """For each block what `text_keys_values` gives for every text, at each of the times of `Fusion.time_bases`."""
        maps = list(zip(self._cross_attentions(), projections, strict=True))
        per_basis = len(maps) // len(bases)  # one, or all
        timed: list[KeysValuesOverTime] = []
        for number, (basis, fused) in enumerate(zip(bases, self.fusion.fuse_directions(prepared, bases), strict=True)):
            of_basis = maps[number * per_basis : (number + 1) * per_basis]
            products = [linear(fused, projection.weight, packed=projection.packed) for _, projection in of_basis]
            coefficients = basis.coefficients.to(products[0].dtype)
            scales = inverse_rms(fused, coefficients, self.text_norm.eps)
            timed += [
                KeysValuesOverTime(coefficients, product, scales, projection.bias, attention.keys_values)
                for product, (attention, projection) in zip(products, of_basis, strict=True)
            ]
        return timed

    def text_projections(self) -> list[TextProjection]:
        """Maps of normed H_cond to each block's keys and values: W_d (P u_d + b) = (W_d P) u_d + W_d b."""
        projection = self._projection()
        attentions = self._cross_attentions()
        weight = torch.cat([attention.text_kv.weight for attention in attentions])
        folded = linear(weight, projection.weight.t()).chunk(len(attentions))
        biases = (weight @ projection.bias).chunk(len(attentions))
        packed = () if torch.is_grad_enabled() else pack(folded)
        return [TextProjection(*maps) for maps in zip(folded, biases, packed or (None,) * len(folded), strict=True)]

    def _projection(self) -> TextProjection:
        return TextProjection(
            self.text_projection.weight * self.text_norm.weight, cast(Tensor, self.text_projection.bias)
        )

    def _cross_attentions(self) -> list[CrossAttention]:
        return [cast(CrossAttention, cast(Block, block).cross_attention) for block in self.blocks]

    def rotary(self, height: int, width: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
        angles = grid_angles(height, width, self.config.head_dim, self.config.rope_theta, lengths.device)
        return rotary_tables(angles[:, None])

    def attention_mask(self, text_mask: Tensor | None, num_image_tokens: int) -> Tensor | None:
        return None if text_mask is None else text_mask[:, None, None]


def build_model(config: ModelConfig, strategy: Strategy, *, seed: int | None = 0) -> Backbone:
    """Build the model of a strategy with starting values from `seed`; None leaves them unset, for loading or counting.

    Models of different strategies start equal in every parameter they share. fuse_dit prepares text only once it was
    given the encoder's weights (`FuseDiT.share_attention`).
    """
    from training.models.fuse_dit import FuseDiT

    model: Backbone = FuseDiT(config) if strategy is Strategy.FUSE_DIT else DiT(config, strategy)
    if seed is not None:
        initialise(model, seed)
    return model
