"""Configuration of the stages `text_features` and `latents`."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from features.templates import apply_template
from pipelines.core.config import FrozenConfig, ModelRef, execution_field

ComputeType = Literal["float32", "bfloat16"]
AUTOENCODER_FACTOR = 8
"""Image pixels per latent position, for every autoencoder that a profile names."""


class TextFeaturesConfig(FrozenConfig):
    """Stage `text_features`: hidden states of every caption. Costs layers x width x 2 bytes a token: 35 KB for
    SmolLM2-135M, 184 KB for Qwen3-VL-4B."""

    text_encoder: ModelRef
    template_version: str = "released-1"
    """A key of `features.templates.TEXT_TEMPLATES`."""
    layers: tuple[int, ...] | None = None
    """Entries of hidden_states to store, 1 = output of the first layer; None stores 1..L."""
    max_tokens: int = Field(512, ge=1)
    """Longer texts are truncated and counted."""
    dtype: ComputeType = "float32"
    """Compute type. On CPUs without bfloat16 arithmetic float32 is 10 times faster (32 captions: 2.4 against 28 s)."""
    max_batch_tokens: int = Field(2048, ge=1)
    """Tokens of a batch including padding; each takes layers x width x 4 bytes of memory."""
    device: str = execution_field("cpu")
    num_threads: int | None = execution_field(None, ge=1)
    """CPU threads; None takes torch's default."""

    @field_validator("template_version")
    @classmethod
    def _known_template(cls, version: str) -> str:
        apply_template(version, "")
        return version

    @model_validator(mode="after")
    def _ordered_layers(self) -> Self:
        layers = self.layers
        if layers is not None and (not layers or layers[0] < 1 or list(layers) != sorted(set(layers))):
            raise ValueError(f"layers {layers} must be ascending, without repeats, from 1 (0 is the embedding output)")
        return self


class LatentsConfig(FrozenConfig):
    """Stage `latents`: the autoencoder's posterior for every image."""

    autoencoder: ModelRef
    subfolder: str | None = None
    """Folder of the autoencoder inside its repository, such as ``vae`` in a diffusers pipeline."""
    image_px: int = Field(256, ge=8)
    """Side of the square images; other images are refused."""
    dtype: ComputeType = "float32"
    """Compute type."""
    storage_dtype: Literal["float16", "float32"] = "float16"
    """float16 has a relative error of 1 in 2,000; values beyond 65,504 stop the stage."""
    batch_size: int = Field(4, ge=1)
    """Images encoded together: 4 fit a CPU's caches (32 take half as long again per image), a GPU wants 64 or more."""
    device: str = execution_field("cpu")
    num_threads: int | None = execution_field(None, ge=1)
    """CPU threads; None takes torch's default."""
