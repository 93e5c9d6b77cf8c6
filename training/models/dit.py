"""DiT: the backbone that reads fused text by cross-attention, for every strategy but fuse_dit.

Block d attends over the keys and values of text_projection(text_norm(H_cond(t, d))), arXiv 2602.03510 Eq. 2.

Shapes: B batch, S text tokens, C channels, V conditionings, h and w latent height and width.
"""

from typing import cast

from torch import Tensor

from training.config import ModelConfig, Strategy, check_gate_signal
from training.models.backbone import Backbone, Block
from training.models.folded_text import FoldedTextProjection, fold
from training.models.fusion import Fusion
from training.models.kernels import ops
from training.models.kernels.ragged_texts import Prepared
from training.models.layers import CrossAttention, KeysValues, Projection, RMSNorm, grid_angles, rotary_tables
from training.models.time_head import TimeHead


class DiT(Backbone):
    """Fusion, text projection and cross-attention around the shared backbone."""

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
        self.can_fold_text_projection = True
        """Folding needs the weights of all blocks at once, which sharded blocks don't have."""
        self.text_norm = RMSNorm(config.text_width, config.norm_eps)
        self.text_projection = Projection(config.text_width, (config.text_width,), bias=True, std=0.02)

    def prepare_text(self, hidden_states: Tensor) -> Tensor:
        """The frozen part of Eq. 2, computed once per text: (L, S, C) -> (K, S, C)."""
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
        self, prepared: Prepared, t: Tensor, folded: FoldedTextProjection | None = None
    ) -> list[KeysValues]:
        """Keys and values of text_projection(text_norm(H_cond)) for each block, folded where that is cheaper."""
        conditioning = self.fusion.fuse(prepared, t)  # H_cond, (V, B, S, C)
        if folded is None and self._folding_pays(conditioning):
            folded = self.fold_text_projection()
        if folded is not None:
            projected = folded.project(conditioning, self.text_norm.eps)
            return [attention.keys_values(kv) for attention, kv in zip(self.cross_attentions(), projected, strict=True)]
        norm, projection = self.text_norm, self.text_projection
        text = ops.norm_linear(conditioning, norm.weight, norm.eps, projection.weight, cast(Tensor, projection.bias))
        per_block = list(text) if len(text) > 1 else list(text) * len(self.blocks)
        blocks = [cast(Block, block) for block in self.blocks]
        return [block.text_keys_values(text_d) for block, text_d in zip(blocks, per_block, strict=True)]

    def _folding_pays(self, conditioning: Tensor) -> bool:
        num_rows = sum(attention.text_kv.out_features for attention in self.cross_attentions())
        return self.can_fold_text_projection and ops.folding_pays(num_rows, conditioning.shape[:-1].numel())

    def fold_text_projection(self) -> FoldedTextProjection:
        """Fold text_norm and text_projection into the blocks' key and value weights."""
        norm, projection = self.text_norm, self.text_projection
        block_weights = [attention.text_kv.weight for attention in self.cross_attentions()]
        return fold(norm.weight, projection.weight, cast(Tensor, projection.bias), block_weights)

    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attention of each block."""
        return [cast(CrossAttention, cast(Block, block).cross_attention) for block in self.blocks]

    def rotary(self, height: int, width: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
        angles = grid_angles(height, width, self.config.head_dim, self.config.rope_theta, lengths.device)
        return rotary_tables(angles[:, None])

    def attention_mask(self, text_mask: Tensor | None, num_image_tokens: int) -> Tensor | None:
        return None if text_mask is None else text_mask[:, None, None]
