"""FuseDiT: a diffusion transformer whose self-attention also sees the keys and values of a frozen LLM's own layers.

Joint self-attention over [text tokens; image tokens] as in arXiv 2505.10046, configured as in arXiv 2602.03510: the
first LLM layers run alone, then block i shares layer first_layer + i * stride. Text rows are causal and never see the
image, so their keys and values come from stored hidden states; image rows see everything.

Shapes: B batch, N image tokens, S text tokens, L LLM layers, D blocks, C channels, G key and value heads, E channels
of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import ModelConfig, Strategy, check_gate_signal
from training.models.backbone import Backbone
from training.models.folded_text import FoldedTextProjection
from training.models.kernels.ragged_texts import Prepared, stack_texts
from training.models.layers import KeysValues, axis_frequencies, grid_angles, rotary_tables
from training.models.shared_attention import SharedAttention


class FuseDiT(Backbone):
    """The backbone without cross-attention; the LLM's weights are not part of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, cross_attention=False)
        check_gate_signal(config, Strategy.FUSE_DIT)
        if config.shared_layers[-1] >= config.num_text_layers:
            raise ValueError(
                f"fuse_dit: block {config.num_blocks - 1} would share layer {config.shared_layers[-1]}, "
                f"but the encoder has layers 0 to {config.num_text_layers - 1}; lower fuse_layer_stride"
            )
        self._shared: SharedAttention | None = None

    def share_attention(self, shared: SharedAttention) -> None:
        """Set the weights of the LLM layers that blocks share; `prepare_text` needs them."""
        config = self.config
        if (shared.num_kv_heads, shared.head_dim) != (config.num_kv_heads, config.head_dim):
            raise ValueError(
                f"fuse_dit: the encoder has {shared.num_kv_heads} key and value heads of {shared.head_dim} channels, "
                f"the model {config.num_kv_heads} of {config.head_dim}; they must be equal"
            )
        self._shared = shared

    def prepare_text(self, hidden_states: Tensor) -> Tensor:
        """Keys and values of the shared layers: hidden_states (L, S, C) -> (2 * D, S, G * E), fp32."""
        if self._shared is None:
            raise ValueError("fuse_dit: no encoder weights to compute keys with; call share_attention first")
        if hidden_states.shape[0] != self.config.num_text_layers:
            raise ValueError(
                f"text features have {hidden_states.shape[0]} layers, the model was built for "
                f"{self.config.num_text_layers}; set num_text_layers to the encoder's or encode the texts again"
            )
        self._shared = self._shared.to(hidden_states.device)
        rows: list[Tensor] = []
        for layer_index in self.config.shared_layers:
            # Entry i - 1 of the stored hidden states is hidden_states[i], which enters decoder layer i.
            pair = self._shared.keys_values(layer_index, hidden_states[layer_index - 1])
            rows += [part.transpose(0, 1).flatten(1) for part in pair]
        return torch.stack(rows)

    def text_keys_values(
        self, prepared: Prepared, t: Tensor, folded: FoldedTextProjection | None = None
    ) -> list[KeysValues]:
        heads = stack_texts(prepared).unflatten(-1, (self.config.num_kv_heads, self.config.head_dim)).transpose(2, 3)
        return [(heads[2 * index], heads[2 * index + 1]) for index in range(self.config.num_blocks)]

    def rotary(self, height: int, width: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Image positions start after the real text on both axes: (B, N, 1, E) each."""
        head_dim, theta = self.config.head_dim, self.config.rope_theta
        frequencies = axis_frequencies(head_dim, theta, lengths.device).repeat(2)
        offsets = lengths.float()[:, None, None] * frequencies
        return rotary_tables((grid_angles(height, width, head_dim, theta, lengths.device) + offsets)[:, :, None])

    def attention_mask(self, text_mask: Tensor | None, num_image_tokens: int) -> Tensor | None:
        return None if text_mask is None else F.pad(text_mask, (0, num_image_tokens), value=True)[:, None, None]
