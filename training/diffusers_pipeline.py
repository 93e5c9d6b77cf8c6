"""A trained checkpoint as a diffusers pipeline: the backbone as a ModelMixin, sampling as a pipeline call.

This is the public import of exported folders: `ThroughlinePipeline.from_pretrained(folder)` needs no remote code.
diffusers resolves pipeline classes by name only among its own, so `DiffusionPipeline.from_pretrained(folder,
trust_remote_code=True)` runs `pipeline.py`, three lines in the folder that import this module. The sampling itself is
`training.sampling.sampler.sample_latents`.

Shapes: B images, P distinct prompts, C latent channels, h and w latent height and width.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from features.templates import unconditional_template
from features.text_encoder import TextEncoder
from pipelines.core.config import ModelRef
from pipelines.core.digest import LOCAL_PREFIX, local_revision
from pipelines.core.errors import ThroughlineError
from training.config import ModelConfig, SamplerConfig, Strategy
from training.data.feature_source import prepare_text
from training.model_card import model_card
from training.models.backbone import Backbone
from training.models.build import build_model
from training.models.fuse_dit import FuseDiT
from training.models.saved_model import ConditioningRecord
from training.models.shared_attention import shared_attention_of
from training.sampling.sampler import sample_latents
from training.sampling.schedule import build_scheduler, check_scheduler
from training.sampling.step_conditioning import TextBatch

logger = logging.get_logger(__name__)

_SHIM_NAME = "pipeline"
_SHIM = '''"""The pipeline class of this folder, from the installed package `throughline`."""

from training.diffusers_pipeline import ThroughlinePipeline

__all__ = ["ThroughlinePipeline"]
'''
CARD_NAME = "README.md"
StepCallback = Callable[["ThroughlinePipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class ThroughlineTransformer(ModelMixin, ConfigMixin):
    """The backbone of one strategy, saved and loaded by diffusers."""

    @register_to_config
    def __init__(self, strategy: str, model: dict[str, Any]) -> None:
        """`model` holds the fields of `ModelConfig`. Weights are unset until they are loaded."""
        super().__init__()
        self.backbone: Backbone = build_model(ModelConfig(**model), Strategy(strategy), seed=None)

    def forward(
        self, latents: Tensor, t: Tensor, prepared: Tensor, lengths: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Velocity, as `Backbone.forward`; t = 0 is noise and t = 1 is data, unlike diffusers' timesteps."""
        return self.backbone(latents, t, prepared, lengths, text_mask)

    @apply_forward_hook
    def placed_backbone(self) -> Backbone:
        """Return the backbone, on its accelerator even where the pipeline offloads its parts."""
        return self.backbone


class _InterruptedError(Exception):
    """A callback requested a stop; carries the latents so far."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


class ThroughlinePipeline(DiffusionPipeline):
    """Text to image with one checkpoint and any flow-matching scheduler."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 - diffusers' name and form
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ThroughlineTransformer,
        vae: AutoencoderKL,
        scheduler: Any,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template_version: str = "plain-1",
        max_tokens: int = 512,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        lineage: dict[str, Any] | None = None,
        prompt_drop_form: str = "instruction",
    ) -> None:
        """`num_inference_steps` and `guidance_scale` are the defaults of a call; `lineage` is the content of the card.

        `prompt_drop_form` is the form of the empty prompt, as in training. Without encoder and tokenizer the first call
        loads those that `lineage` names; `load_text_encoder` loads them from a local folder. Like a call, raises
        ValueError for a scheduler without flow matching.
        """
        super().__init__()
        check_scheduler(scheduler)
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            template_version=template_version,
            max_tokens=max_tokens,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            lineage=lineage,
            prompt_drop_form=prompt_drop_form,
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._interrupt = False
        self._guidance_scale = guidance_scale
        self._num_timesteps = 0

    @property
    def guidance_scale(self) -> float:
        """s of the current or the last call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Network evaluations of the current or the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set by a callback (`pipe._interrupt = True`) to stop after its step."""
        return self._interrupt

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Read the folder's index with this class as its pipeline, so that loading runs no code of the folder."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config["_class_name"] = cls.__name__
        return loaded

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the index, the import for `trust_remote_code` and the model card."""
        folder = Path(save_directory)
        super().save_config(folder, push_to_hub=False)
        index = folder / self.config_name
        content = json.loads(index.read_text())
        content["_class_name"] = [_SHIM_NAME, type(self).__name__]
        content.pop("_name_or_path", None)  # a path of the machine that loaded it
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        (folder / f"{_SHIM_NAME}.py").write_text(_SHIM)
        if self.config.lineage:
            (folder / CARD_NAME).write_text(model_card(self.config.lineage))
        if push_to_hub:
            super().save_config(folder, push_to_hub=True, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        gate_shift: bool = False,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample `num_images_per_prompt` images of each prompt, grouped by prompt.

        An empty prompt samples unconditionally; one longer than the encoder reads is truncated with a warning. `height`
        and `width` are pixels, by default those of training. `latents` (B, C, h, w) replace the noise of `generator`.
        `gate_shift` is Eq. 11. `output_type` is pil, np, pt or latent; latents are scaled as in training. Raises
        ValueError for arguments that contradict each other, or a scheduler without flow matching.
        """
        check_scheduler(self.scheduler)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = self._negatives(negative_prompt, len(prompts))
        settings = SamplerConfig(
            num_steps=self.config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=self.config.guidance_scale if guidance_scale is None else guidance_scale,
            gate_shift=gate_shift,
        )
        self._check(prompts, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs, gate_shift)
        self._guidance_scale, self._interrupt = settings.guidance_scale, False
        device = self._execution_device
        shape = self._latent_shape(len(prompts) * num_images_per_prompt, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}, this call needs {shape}")
        text, prompt_of = self._encode(prompts, num_images_per_prompt, device)
        unconditional, negative_of = self._encode(negatives, num_images_per_prompt, device)
        sampled = self._sample(
            latents.to(device, torch.float32), text, unconditional, prompt_of, negative_of, settings,
            callback_on_step_end, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        images: Any = sampled if output_type == "latent" else self._decode(sampled, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(
        self,
        noise: Tensor,
        text: TextBatch,
        unconditional: TextBatch,
        prompt_of: Tensor,
        negative_of: Tensor,
        settings: SamplerConfig,
        callback: StepCallback | None,
        tensor_inputs: Sequence[str],
    ) -> Tensor:
        self.scheduler.set_timesteps(settings.num_steps, device=noise.device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        backbone, dtype = self.transformer.placed_backbone(), self.transformer.dtype
        # adaLN and gates compute in fp32 even where weights have a lower type.
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(noise.device.type, dtype)
        with self.progress_bar(total=len(timesteps)) as bar, autocast:

            def on_step(index: int, _: int, x_t: Tensor) -> Tensor | None:
                bar.update()
                if callback is None:
                    return None
                replaced = callback(self, index, timesteps[index], dict.fromkeys(tensor_inputs, x_t)).get(
                    "latents", x_t
                )
                if self._interrupt:
                    raise _InterruptedError(replaced)
                return replaced

            try:
                return sample_latents(
                    backbone, text, unconditional, prompt_of, noise, settings, on_step,
                    scheduler=self.scheduler, unconditional_of=negative_of,
                )  # fmt: skip
            except _InterruptedError as stopped:
                return stopped.latents

    def _encode(self, texts: Sequence[str], images_per_text: int, device: torch.device) -> tuple[TextBatch, Tensor]:
        """Return the prepared distinct texts, and the index of each image's text."""
        encoder = self.prompt_encoder()
        unconditional_encoder = self._encoder(
            unconditional_template(self.config.template_version, self.config.prompt_drop_form)
        )
        backbone = self.transformer.backbone
        if isinstance(backbone, FuseDiT):
            backbone.share_attention(shared_attention_of(self.text_encoder, backbone.config.shared_layers))
        distinct = list(dict.fromkeys(texts))
        prepared = []
        for text in distinct:
            # One by one, because rounding depends on the batch.
            (encoded,) = (encoder if text else unconditional_encoder).encode([text])
            if encoded.was_truncated:
                logger.warning(
                    f"a prompt is longer than the {encoder.max_tokens} tokens that the encoder reads and is truncated; "
                    f"shorten it: {text[:80]!r}"
                )
            hidden_states = encoded.hidden_states.to(self.text_encoder.device)
            prepared.append(prepare_text(backbone.prepare_text, hidden_states, torch.float32).cpu())
        batch = TextBatch.of(prepared, device, self.transformer.dtype)
        indices = [distinct.index(text) for text in texts for _ in range(images_per_text)]
        return batch, torch.tensor(indices, device=device)

    def prompt_encoder(self) -> TextEncoder:
        """Return the text encoder as training and sampling use it, after loading one that is only named."""
        if self.text_encoder is None or self.tokenizer is None:
            self.load_text_encoder()
        return self._encoder(self.config.template_version)

    def _encoder(self, template_version: str) -> TextEncoder:
        return TextEncoder(
            self.text_encoder, self.tokenizer, ref=self._named_encoder(), layers=None,
            template_version=template_version, max_tokens=self.config.max_tokens,
        )  # fmt: skip

    def load_text_encoder(self, folder: str | Path | None = None) -> None:
        """Load the encoder that `lineage` names from the hub or from a local folder, replacing any other.

        Raises ThroughlineError where it is not on a hub and no folder is given, or the folder holds another model.
        """
        ref = self._named_encoder()
        if folder is not None:
            ref = ref.model_copy(update={"path": str(folder)})
        if ref.revision.startswith(LOCAL_PREFIX):
            if folder is None:
                raise ThroughlineError(
                    f"text encoder {ref.id} ({ref.revision}) is neither in this pipeline's folder nor on a hub; pass "
                    "the folder that holds it to load_text_encoder"
                )
            revision = local_revision(Path(folder))
            if revision != ref.revision:
                raise ThroughlineError(
                    f"{folder}: holds a model of revision {revision}, the checkpoint was trained with {ref.id} at "
                    f"{ref.revision}; pass the folder of that one"
                )
        loaded = TextEncoder.load(ref, template_version=self.config.template_version, max_tokens=self.config.max_tokens)
        self.register_modules(text_encoder=loaded.model.to(self.transformer.device), tokenizer=loaded.tokenizer)

    def _named_encoder(self) -> ModelRef:
        names = (self.config.lineage or {}).get("text_encoder", {"id": "text_encoder", "revision": "unknown"})
        return ModelRef(id=names["id"], revision=names["revision"])

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0.0)
        pixels = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)

    def _latent_shape(self, batch: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        model = self.transformer.backbone.config
        unit = self.vae_scale_factor * model.patch_size
        sides = []
        for name, side in (("height", height), ("width", width)):
            pixels = model.latent_size * self.vae_scale_factor if side is None else side
            if pixels < unit or pixels % unit:
                raise ValueError(f"{name} {pixels} is not a multiple of {unit}; use {max(unit, pixels // unit * unit)}")
            sides.append(pixels // self.vae_scale_factor)
        return batch, model.latent_channels, sides[0], sides[1]

    def _negatives(self, negative_prompt: str | Sequence[str] | None, num_prompts: int) -> list[str]:
        if negative_prompt is None or isinstance(negative_prompt, str):
            return [negative_prompt or ""] * num_prompts
        if len(negative_prompt) != num_prompts:
            raise ValueError(f"{num_prompts} prompts but {len(negative_prompt)} negative prompts; pass one for each")
        return list(negative_prompt)

    def _check(
        self, prompts: Sequence[str], num_images: int, output_type: str, tensor_inputs: Sequence[str], gate_shift: bool
    ) -> None:
        if not prompts or num_images < 1:
            raise ValueError(f"{len(prompts)} prompts with {num_images} images each: nothing to sample")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}; known: pil, np, pt, latent")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks get {self._callback_tensor_inputs}, not {sorted(unknown)}")
        if gate_shift and not self.transformer.backbone.text_depends_on_time:
            raise ValueError("the shift of Eq. 11 needs a time gate (time_wise or joint)")

    @classmethod
    def assemble(
        cls,
        transformer: ThroughlineTransformer,
        vae: AutoencoderKL,
        encoder: TextEncoder | None,
        settings: SamplerConfig,
        made_with: ConditioningRecord,
        lineage: Mapping[str, Any],
    ) -> Self:
        """Assemble loaded parts; with `encoder` None the first call loads the one that `lineage` names."""
        return cls(
            transformer=transformer,
            vae=vae,
            scheduler=build_scheduler(settings.num_steps, settings.time_shift),
            text_encoder=None if encoder is None else encoder.model,
            tokenizer=None if encoder is None else encoder.tokenizer,
            template_version=made_with.template_version,
            num_inference_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            lineage=dict(lineage),
            prompt_drop_form=made_with.prompt_drop_form,
        )
