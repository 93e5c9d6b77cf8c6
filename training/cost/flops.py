"""Floating-point operations of sampling one image, counted as in the paper's Table 4, and of attention products.

Two operations per multiplication and addition of every linear map. The paper does not count attention products, so they
are separate here. The autoencoder is not counted.

Letters: N image tokens, S text tokens, L LLM layers, D blocks, C text width.
"""

from dataclasses import dataclass

from training.config import ModelConfig, Strategy

_TIME_EMBEDDING_SIZE = 256
_NUM_MODULATIONS = 8
"""Modulations of adaLN, of blocks and output."""
_NUM_DIRECTIONS = 8
"""Directions that layer weights at all scheduled times span at `gate_time_scale` 1, about (`text_over_time`)."""


@dataclass(frozen=True)
class TextEncoderShape:
    """The linear maps of a decoder layer with grouped attention and a gated MLP."""

    num_layers: int
    hidden_size: int
    query_width: int
    key_value_width: int
    mlp_width: int

    def flops(self, num_tokens: int, num_layers: int | None = None) -> int:
        """Operations of the first `num_layers` layers (None: all) on `num_tokens` tokens."""
        attention = self.hidden_size * (2 * self.query_width + 2 * self.key_value_width)
        per_layer = attention + 3 * self.hidden_size * self.mlp_width
        return 2 * num_tokens * per_layer * (self.num_layers if num_layers is None else num_layers)


KNOWN_TEXT_ENCODERS = {
    "Qwen/Qwen3-VL-4B-Instruct": TextEncoderShape(36, 2560, 4096, 1024, 9728),
    "HuggingFaceTB/SmolLM2-135M-Instruct": TextEncoderShape(30, 576, 576, 192, 1536),
}


@dataclass(frozen=True)
class ImageFlops:
    """Operations of one image over all steps and both branches of guidance."""

    text_encoder: int
    fusion: int
    """Sums over layers, and gates."""
    text_projection: int
    """The linear map of fused text that all blocks share."""
    text_keys_values: int
    """Keys and values of all blocks; for fuse_dit those computed from stored hidden states, if any."""
    backbone: int
    """All linear maps of image tokens."""
    attention: int
    """Products of queries, keys and values in the backbone. Not in `total`, as in Table 4."""

    @property
    def total(self) -> int:
        """The operations that Table 4 counts."""
        return self.text_encoder + self.fusion + self.text_projection + self.text_keys_values + self.backbone


def count_flops(
    config: ModelConfig,
    strategy: Strategy,
    text_encoder: TextEncoderShape | None,
    *,
    latent_size: int,
    cached: bool,
    num_steps: int = 50,
    num_text_tokens: int = 512,
    num_branches: int = 2,
    num_directions: int = _NUM_DIRECTIONS,
) -> ImageFlops:
    """Count one image of one prompt; `num_branches` is 2 with guidance.

    Without `cached` it counts the released code, which computes fusion, projection, keys and values at every step.
    `cached` counts `training.sampling`, which computes them once per text, or with a time gate once per text and
    direction of the gate's weights, and shares between both branches everything before an image first reads its text.
    The text encoder (None: not counted) runs once either way; for fuse_dit the released code stops it at the last
    shared layer, and `cached` runs all of it and computes the shared layers' keys and values from its hidden states.
    Raises ValueError where latents are not divisible by the patch size.
    """
    if latent_size % config.patch_size:
        raise ValueError(f"latents of {latent_size} are not divisible by the patch size {config.patch_size}")
    text_tokens = num_text_tokens * num_branches
    is_fuse_dit = strategy is Strategy.FUSE_DIT
    if strategy.has_time_gate and cached:
        times = 1
        projection, keys_values, fusion = _text_over_time(
            config, strategy, text_tokens, num_steps, min(num_directions, num_steps, config.num_text_layers)
        )
    else:
        times = 1 if cached else 0 if is_fuse_dit else num_steps
        projection, keys_values, fusion = _text_path(config, strategy, text_tokens, num_branches)
    encoder_layers = config.shared_layers[-1] + 1 if is_fuse_dit and not cached else None
    image_tokens = (latent_size // config.patch_size) ** 2
    shared, shared_attention = _before_text(config, image_tokens, is_fuse_dit)
    num_shared = num_steps * (num_branches - 1) if cached else 0
    return ImageFlops(
        text_encoder=0 if text_encoder is None else text_encoder.flops(text_tokens, encoder_layers),
        text_projection=times * projection,
        text_keys_values=times * keys_values,
        fusion=times * fusion,
        backbone=num_steps * num_branches * _backbone(config, image_tokens, cross_attention=not is_fuse_dit)
        - num_shared * shared,
        attention=num_steps * num_branches * _attention(config, image_tokens, num_text_tokens)
        - num_shared * shared_attention,
    )


def _text_path(config: ModelConfig, strategy: Strategy, text_tokens: int, num_texts: int) -> tuple[int, int, int]:
    """Projection, keys and values, and fusion of one evaluation of the text path."""
    width, layers, blocks = config.text_width, config.num_text_layers, config.num_blocks
    keys_values = 2 * blocks * text_tokens * width * 2 * _key_value_width(config)
    if strategy is Strategy.FUSE_DIT:
        return 0, keys_values, 0
    variants = config.num_blocks if strategy.varies_with_block else 1
    fusion = 0
    if strategy not in (Strategy.PENULTIMATE, Strategy.UNIFORM):
        fusion += 2 * variants * layers * text_tokens * width
    if strategy.has_time_gate:
        fusion += 2 * variants * num_texts * config.gate_width * (config.gate_embedding_size + layers)
    return 2 * variants * text_tokens * width**2, keys_values, fusion


def _text_over_time(
    config: ModelConfig, strategy: Strategy, text_tokens: int, num_steps: int, num_directions: int
) -> tuple[int, int, int]:
    """Projection, keys and values, and fusion of the text path at all steps, from directions of the gates' weights.

    The projection is folded into the weights of keys and values. Fusion includes the products behind the norm's factor.
    The combination at each step, a thousandth of this, is not counted.
    """
    width, layers = config.text_width, config.num_text_layers
    variants = config.num_blocks if strategy.varies_with_block else 1
    rows = config.num_blocks * 2 * _key_value_width(config)
    gates = num_steps * config.gate_width * (config.gate_embedding_size + layers)
    sums = num_directions * text_tokens * width * layers
    norms = num_directions**2 * text_tokens * (width + num_steps)
    keys_values = rows * num_directions * text_tokens * width
    return 2 * rows * width**2, 2 * keys_values, 2 * variants * (gates + sums + norms)


def _backbone(config: ModelConfig, image_tokens: int, *, cross_attention: bool) -> int:
    hidden, query = config.hidden_size, config.num_heads * config.head_dim
    per_block = hidden * (2 * query + 2 * _key_value_width(config)) + 3 * hidden * config.mlp_width
    if cross_attention:
        per_block += 2 * hidden * query
    patches = 2 * hidden * config.latent_channels * config.patch_size**2
    return 2 * image_tokens * (config.num_blocks * per_block + patches) + _time(config)


def _time(config: ModelConfig) -> int:
    """The timestep conditioning of one image."""
    if config.timestep_conditioning == "none":
        return 0
    return 2 * config.hidden_size * (_TIME_EMBEDDING_SIZE + (1 + _NUM_MODULATIONS) * config.hidden_size)


def _before_text(config: ModelConfig, image_tokens: int, is_fuse_dit: bool) -> tuple[int, int]:
    """The part before the first text: time, patches, and the first block's self-attention where it doesn't see text."""
    hidden, query = config.hidden_size, config.num_heads * config.head_dim
    patches = hidden * config.latent_channels * config.patch_size**2
    attention = hidden * (2 * query + 2 * _key_value_width(config))
    products = 2 * 2 * query * image_tokens**2
    projections = 2 * image_tokens * (patches + (0 if is_fuse_dit else attention))
    return projections + _time(config), 0 if is_fuse_dit else products


def _attention(config: ModelConfig, image_tokens: int, text_tokens: int) -> int:
    """Image tokens attend to each other and to the text; one attention (fuse_dit) and two have as many products."""
    per_pair = 2 * 2 * config.num_heads * config.head_dim
    return config.num_blocks * per_pair * image_tokens * (image_tokens + text_tokens)


def _key_value_width(config: ModelConfig) -> int:
    return config.num_kv_heads * config.head_dim
