"""Exports a finished checkpoint as a diffusers folder: weights, text encoder, autoencoder, model card."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from training.config import SamplerConfig
from training.models.saved_model import check_models, load_model, read_conditioning, read_model_config

if TYPE_CHECKING:
    from training.diffusers_pipeline import ThroughlinePipeline

_COMPUTE_TYPE = "float32"
"""Default compute type of the text encoder in training, in sampling and in an exported pipeline."""


def export_pipeline(
    checkpoint: StageOutput,
    text_encoder: ModelRef,
    autoencoder: ModelRef,
    settings: SamplerConfig,
    folder: Path,
    *,
    save_text_encoder: bool = True,
) -> Path:
    """Write the pipeline to `folder` atomically and return it.

    `settings` are the defaults of a call. Without `save_text_encoder` the folder only names the encoder, by hub id and
    commit, or by content where it is a local folder. The files depend only on the checkpoint's data version, the models
    and the settings. Raises ThroughlineError where the folder is not empty, or the models are not those of training.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ThroughlineError(f"{folder}: the folder is not empty; name a new or an empty one")
    pipeline = build_pipeline(
        checkpoint, text_encoder, autoencoder, settings, with_text_encoder=save_text_encoder, encoder_type=None
    )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(temporary)
    if save_text_encoder:
        _set_compute_type(temporary / "text_encoder" / "config.json")
    if folder.exists():
        folder.rmdir()
    return temporary.rename(folder)


def build_pipeline(
    checkpoint: StageOutput,
    text_encoder: ModelRef,
    autoencoder: ModelRef,
    settings: SamplerConfig,
    *,
    with_text_encoder: bool = True,
    encoder_type: str | None = _COMPUTE_TYPE,
) -> "ThroughlinePipeline":
    """Return the pipeline of a checkpoint in memory; `encoder_type` None loads the encoder in the type of its files.

    Raises ThroughlineError where encoder or autoencoder are not those of training.
    """
    from features.autoencoder import Autoencoder
    from features.text_encoder import TextEncoder
    from training.diffusers_pipeline import ThroughlinePipeline, ThroughlineTransformer

    check_models(checkpoint, text_encoder, autoencoder)
    made_with = read_conditioning(checkpoint)
    saved = load_model(checkpoint)
    transformer = ThroughlineTransformer(saved.strategy.value, saved.config.model_dump(mode="json"))
    transformer.backbone.load_state_dict(saved.model.state_dict())
    vae = Autoencoder.load(autoencoder, subfolder=made_with.autoencoder_subfolder)
    vae.model.register_to_config(_name_or_path=autoencoder.id)  # without it the config holds a path of this machine
    if (vae.scaling_factor, vae.shift_factor) != (made_with.scaling_factor, made_with.shift_factor):
        raise ThroughlineError(
            f"checkpoint {checkpoint.data_version}: latents scaled by {made_with.scaling_factor} after a shift of "
            f"{made_with.shift_factor}, the autoencoder states {vae.scaling_factor} and {vae.shift_factor}"
        )
    encoder = None
    if with_text_encoder:
        encoder = TextEncoder.load(
            text_encoder,
            template_version=made_with.template_version,
            dtype=encoder_type or _type_of_files(text_encoder),
        )
    lineage = lineage_of(checkpoint, settings, size_px=saved.config.latent_size * vae.downscale)
    lineage["text_encoder"]["saved_in"] = with_text_encoder
    return ThroughlinePipeline.assemble(
        transformer.eval().requires_grad_(False), vae.model, encoder, settings, made_with, lineage
    )


def lineage_of(checkpoint: StageOutput, settings: SamplerConfig, *, size_px: int) -> dict[str, Any]:
    """Return a checkpoint's origin as JSON, without paths or anything in which equal checkpoints differ."""
    from training.cost.params import count_parameters

    made_with, manifest = read_conditioning(checkpoint), checkpoint.manifest
    datasets = [item.data_version for item in manifest.inputs.get("dataset", ())]
    return {
        "strategy": made_with.strategy.value,
        "checkpoint": checkpoint.data_version,
        "dataset": datasets[0] if datasets else None,
        "text_encoder": {"id": made_with.text_encoder_id, "revision": made_with.text_encoder_revision},
        "template_version": made_with.template_version,
        "autoencoder": {"id": made_with.autoencoder_id, "revision": made_with.autoencoder_revision},
        "training": manifest.config.get("training", {}),
        "summary": manifest.summary,
        "num_parameters": count_parameters(read_model_config(checkpoint), made_with.strategy),
        "code_version": manifest.code_version,
        "sampler": settings.model_dump(mode="json"),
        "size_px": size_px,
    }


def _type_of_files(model: ModelRef) -> str:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.source, revision=model.hub_revision).get_text_config(decoder=True)
    return str(config.dtype or _COMPUTE_TYPE).removeprefix("torch.")


def _set_compute_type(path: Path) -> None:
    """Set the type in which transformers loads the files to that of training; the files keep their published type."""
    config = json.loads(path.read_text())
    config["dtype"] = _COMPUTE_TYPE
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
