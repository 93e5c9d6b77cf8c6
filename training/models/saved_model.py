"""Reads a finished checkpoint: its model, its strategy, and how its text and latents were made."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from features.templates import PromptDropForm
from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from training.config import ModelConfig, Strategy

if TYPE_CHECKING:
    from training.models.backbone import Backbone

MODEL_CONFIG_NAME = "config.json"
CONDITIONING_NAME = "conditioning.json"


class ConditioningRecord(FrozenConfig):
    """How a checkpoint's text and latents were made, which sampling needs beside the weights."""

    strategy: Strategy
    text_encoder_id: str
    text_encoder_revision: str
    template_version: str
    prompt_drop_form: PromptDropForm = "instruction"
    """The unconditional text; older checkpoints without this field were trained with the instruction."""
    autoencoder_id: str
    autoencoder_revision: str
    autoencoder_subfolder: str | None
    scaling_factor: float
    """Latents are trained on as (z - shift_factor) * scaling_factor."""
    shift_factor: float


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint in memory."""

    model: "Backbone"
    config: ModelConfig
    conditioning: ConditioningRecord

    @property
    def strategy(self) -> Strategy:
        return self.conditioning.strategy


def read_model_config(checkpoint: StageOutput) -> ModelConfig:
    """Return the configuration of a checkpoint's model."""
    try:
        return ModelConfig.model_validate_json(checkpoint.path(MODEL_CONFIG_NAME).read_bytes())
    except (OSError, ValidationError) as error:
        raise ThroughlineError(f"{checkpoint.folder}: no readable {MODEL_CONFIG_NAME} ({error})") from error


def read_conditioning(checkpoint: StageOutput) -> ConditioningRecord:
    """Return how a checkpoint's text and latents were made."""
    try:
        return ConditioningRecord.model_validate_json(checkpoint.path(CONDITIONING_NAME).read_bytes())
    except (OSError, ValidationError) as error:
        raise ThroughlineError(f"{checkpoint.folder}: no readable {CONDITIONING_NAME} ({error})") from error


def check_models(
    checkpoint: StageOutput, text_encoder: ModelRef | None = None, autoencoder: ModelRef | None = None
) -> None:
    """Raise ThroughlineError where the encoder or the autoencoder is not the one of training."""
    conditioning = read_conditioning(checkpoint)
    if text_encoder is not None and text_encoder.revision != conditioning.text_encoder_revision:
        raise ThroughlineError(
            f"checkpoint {checkpoint.data_version}: trained with {conditioning.text_encoder_id} at "
            f"{conditioning.text_encoder_revision}, given {text_encoder.id} at {text_encoder.revision}; use the former"
        )
    if autoencoder is not None and autoencoder.revision != conditioning.autoencoder_revision:
        raise ThroughlineError(
            f"checkpoint {checkpoint.data_version}: trained on latents of {conditioning.autoencoder_id} at "
            f"{conditioning.autoencoder_revision}, given {autoencoder.id} at {autoencoder.revision}; use the former"
        )


def load_model(checkpoint: StageOutput, text_encoder: ModelRef | None = None, device: str = "cpu") -> SavedModel:
    """Build a checkpoint's model and load its weights, in fp32, for sampling or analysis.

    `text_encoder` provides the layers that fuse_dit shares; without it that strategy can be inspected but not run.
    Raises ThroughlineError where the encoder is not the one of training, a file of weights is missing, or weights do
    not fit the configuration.
    """
    from training.models.build import build_model
    from training.models.weight_files import read_weights

    check_models(checkpoint, text_encoder)
    config, conditioning = read_model_config(checkpoint), read_conditioning(checkpoint)
    model = build_model(config, conditioning.strategy, seed=None)
    try:
        model.load_state_dict(read_weights(checkpoint))
    except RuntimeError as error:
        first = str(error).splitlines()[0]
        raise ThroughlineError(f"{checkpoint.folder}: weights do not fit their configuration ({first})") from error
    if text_encoder is not None:
        connect_text_encoder(model, text_encoder)
    return SavedModel(model.to(device).eval().requires_grad_(False), config, conditioning)


def connect_text_encoder(model: "Backbone", text_encoder: ModelRef) -> None:
    """Load the layers that a fuse_dit model shares with the encoder; do nothing for other models."""
    from training.models.fuse_dit import FuseDiT
    from training.models.shared_attention import load_shared_attention

    if isinstance(model, FuseDiT):
        model.share_attention(load_shared_attention(text_encoder, model.config.shared_layers))


def write_conditioning(record: ConditioningRecord) -> bytes:
    """Return the file's content."""
    return json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True).encode() + b"\n"
