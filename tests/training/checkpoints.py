"""Finished checkpoints of untrained models: every parameter moved off its initial value, published as usual."""

from pathlib import Path

from pipelines.core.config import ModelRef
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from tests.plain_stage import plain_stage
from tests.training.conftest import TEMPLATE, TINY_MODEL, TINY_TRAINING
from tests.training.models.test_dit import built
from training.config import CheckpointConfig, ModelConfig, Strategy
from training.models.saved_model import (
    CONDITIONING_NAME,
    MODEL_CONFIG_NAME,
    ConditioningRecord,
    write_conditioning,
)
from training.models.weight_files import WEIGHTS_NAME


def write_checkpoint(
    root: Path,
    strategy: Strategy,
    text_encoder: ModelRef,
    autoencoder: ModelRef,
    model: ModelConfig = TINY_MODEL,
    *,
    code_version: str = "1",
    **conditioning: str,
) -> StageOutput:
    """Publish a checkpoint of an untrained model under `root`; another `code_version` gives another checkpoint.

    `conditioning` are fields of its record in place of the usual ones.
    """

    def produce(run: StageRun[CheckpointConfig]) -> None:
        from safetensors.torch import save

        record = ConditioningRecord(
            strategy=strategy,
            text_encoder_id=text_encoder.id,
            text_encoder_revision=text_encoder.revision,
            template_version=TEMPLATE,
            autoencoder_id=autoencoder.id,
            autoencoder_revision=autoencoder.revision,
            autoencoder_subfolder=None,
            scaling_factor=1.5,
            shift_factor=0.06,
        ).model_copy(update=conditioning)
        with run.unit("model") as unit:
            unit.write(WEIGHTS_NAME, save(built(strategy, model).state_dict(), metadata={"format": "pt"}))
            unit.write(MODEL_CONFIG_NAME, model.model_dump_json().encode())
            unit.write(CONDITIONING_NAME, write_conditioning(record))

    stage = plain_stage(name="checkpoint", code_version=code_version, config_type=CheckpointConfig, produce=produce)
    config = CheckpointConfig(
        strategy=strategy, model=model, training=TINY_TRAINING, text_encoder=text_encoder, template_version=TEMPLATE
    )
    return stage.run(config, {}, root, strategy.value)
