"""Samples images from a checkpoint: flow matching with Euler steps and guidance, text computed once.

Shapes: B images, P distinct prompts, S text tokens.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from features.templates import unconditional_template
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from training.config import SamplerConfig
from training.data.feature_source import load_text_encoder, prepare_text, unconditional_hidden_states
from training.models.backbone import Backbone
from training.models.flow import sampling_noise
from training.models.kernels import ops
from training.models.kernels.malloc import keep_freed_memory
from training.models.saved_model import SavedModel, check_models, load_model
from training.sampling.schedule import build_scheduler, euler_step, flow_time
from training.sampling.step_conditioning import StepConditioning, TextBatch

if TYPE_CHECKING:
    from PIL.Image import Image

    from features.autoencoder import Autoencoder

OnStep = Callable[[int, int, Tensor], Tensor | None]
"""Called after each step with its index, the number of steps, and the latents (B, C, h, w); may return new latents."""

_MAX_CACHED_PROMPTS = 512


@torch.no_grad()
def sample_latents(
    model: Backbone,
    text: TextBatch,
    unconditional: TextBatch,
    prompt_of: Tensor,
    noise: Tensor,
    settings: SamplerConfig,
    on_step: OnStep | None = None,
    *,
    scheduler: Any = None,
    unconditional_of: Tensor | None = None,
) -> Tensor:
    """Integrate from noise (B, C, h, w) at t = 0 to latents at t = 1.

    Image i has prompt `prompt_of[i]` of `text` and unconditional text `unconditional_of[i]` of `unconditional` (None:
    the first). Guidance is u + s * (c - u), both branches in one batch. `scheduler` is a flow-matching one of diffusers
    with its timesteps set; None takes Euler steps as in `settings`.
    """
    batch, guided = noise.shape[0], settings.guidance_scale != 1
    if unconditional_of is None:
        unconditional_of = torch.zeros_like(prompt_of)
    lengths = text.lengths[prompt_of]
    lengths = torch.cat([unconditional.lengths[unconditional_of], lengths]) if guided else lengths
    longest = int(max(text.lengths.max(), unconditional.lengths.max())) if guided else int(text.lengths.max())
    padded = bool((lengths < longest).any())
    mask = torch.arange(longest, device=noise.device) < lengths[:, None] if padded else None
    if scheduler is None:
        scheduler = build_scheduler(settings.num_steps, settings.time_shift)
    timesteps = cast(Tensor, scheduler.timesteps)
    times = flow_time(timesteps).to(noise.device)
    x_t = noise
    with ops.packed_weights(model):
        conditioning = StepConditioning(
            model, text, unconditional if guided else None, prompt_of, unconditional_of, times,
            gate_shift=settings.gate_shift,
        )  # fmt: skip
        for index, (timestep, t) in enumerate(zip(timesteps, times, strict=True)):
            keys_values = conditioning.keys_values(index, x_t)
            velocity = model.velocity(x_t, t[None], keys_values, lengths, mask).float()
            if guided:
                u, c = velocity.split(batch)
                velocity = u + settings.guidance_scale * (c - u)
            x_t = euler_step(scheduler, x_t, velocity, timestep)
            if on_step is not None:
                replaced = on_step(index, len(timesteps), x_t)
                x_t = x_t if replaced is None else replaced
    return x_t


@dataclass
class Sampler:
    """A checkpoint ready to sample images."""

    saved: SavedModel
    encode: Callable[[Sequence[str]], list[Tensor]]
    """Texts -> hidden states (L, S, C) each; "" is the unconditional text."""
    decode: Callable[[Tensor], np.ndarray]
    """Unscaled latents (B, C, h, w) -> images uint8 (B, H, W, 3)."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    negative_prompt: str = ""
    """Text of the unconditional branch; "" is that of training."""
    _prepared: "OrderedDict[str, Tensor]" = field(default_factory=OrderedDict)
    _unconditional: TextBatch | None = None

    def generate(
        self,
        prompts: Sequence[str],
        sample_indices: Sequence[int],
        seed: int,
        settings: SamplerConfig,
        on_step: OnStep | None = None,
    ) -> "list[Image]":
        """Sample one image per (prompt, sample index), in order.

        An image depends on checkpoint, prompt, sample index, seed and settings; its batch changes at most rounding.
        Raises ValueError where the settings ask for the shift of Eq. 11 and the model has no time gate.
        """
        if len(prompts) != len(sample_indices):
            raise ValueError(f"{len(prompts)} prompts but {len(sample_indices)} sample indices; give one for each")
        if settings.gate_shift and not self.saved.strategy.has_time_gate:
            raise ValueError(f"{self.saved.strategy}: the shift of Eq. 11 needs a time gate (time_wise or joint)")
        images: list[Image] = []
        for start in range(0, len(prompts), settings.batch_size):
            chosen = slice(start, start + settings.batch_size)
            images += self._generate_batch(prompts[chosen], sample_indices[chosen], seed, settings, on_step)
        return images

    def latents(
        self,
        prompts: Sequence[str],
        sample_indices: Sequence[int],
        seed: int,
        settings: SamplerConfig,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample scaled latents (B, C, h, w), one per (prompt, sample index), in one batch."""
        config = self.saved.config
        shape = (config.latent_channels, config.latent_size, config.latent_size)
        noise = torch.stack([
            sampling_noise(seed, prompt, index, shape) for prompt, index in zip(prompts, sample_indices, strict=True)
        ])  # fmt: skip
        distinct = list(dict.fromkeys(prompts))
        prompt_of = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        text = self._text_batch([self._prepare(distinct)[prompt] for prompt in distinct])
        if self._unconditional is None:
            self._unconditional = self._text_batch(list(self._prepare([self.negative_prompt]).values()))
        model, unconditional = self.saved.model, self._unconditional
        return sample_latents(model, text, unconditional, prompt_of, noise.to(self.device), settings, on_step)

    def _generate_batch(
        self,
        prompts: Sequence[str],
        sample_indices: Sequence[int],
        seed: int,
        settings: SamplerConfig,
        on_step: OnStep | None,
    ) -> "list[Image]":
        latents = self.latents(prompts, sample_indices, seed, settings, on_step)
        conditioning = self.saved.conditioning
        from PIL import Image

        pixels = self.decode(latents / conditioning.scaling_factor + conditioning.shift_factor)
        return [Image.fromarray(image) for image in pixels]

    def _prepare(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the prepared text of each prompt, cached for the most recent prompts."""
        missing = [prompt for prompt in prompts if prompt not in self._prepared]
        if missing:
            for prompt, hidden_states in zip(missing, self.encode(missing), strict=True):
                try:
                    prepared = prepare_text(self.saved.model.prepare_text, hidden_states, torch.float32)
                except ThroughlineError as error:
                    raise ThroughlineError(f"prompt {prompt!r}: {error}") from error
                self._prepared[prompt] = prepared.to(self.device)
        texts = {prompt: self._prepared[prompt] for prompt in prompts}
        while len(self._prepared) > _MAX_CACHED_PROMPTS:
            self._prepared.popitem(last=False)
        return texts

    def _text_batch(self, texts: Sequence[Tensor]) -> TextBatch:
        return TextBatch.of(texts, self.device)


def load_sampler(
    checkpoint: StageOutput,
    text_encoder: ModelRef,
    autoencoder: ModelRef,
    *,
    device: str = "cpu",
    encoder: "Encodes | None" = None,
    decoder: "Decodes | None" = None,
) -> Sampler:
    """Load a checkpoint with its text encoder and autoencoder.

    Pass `encoder` (a features TextEncoder) and `decoder` (a features Autoencoder) to share them between checkpoints.
    Raises ThroughlineError where text encoder or autoencoder are not those of training.
    """
    check_models(checkpoint, text_encoder, autoencoder)
    if device == "cpu":
        keep_freed_memory()
    saved = load_model(checkpoint, text_encoder, device)
    conditioning = saved.conditioning
    if encoder is None:
        encoder = load_text_encoder(text_encoder, conditioning.template_version, device)
    if decoder is None:
        decoder = load_autoencoder(autoencoder, device, conditioning.autoencoder_subfolder)
    prompt_encoder = encoder

    template = unconditional_template(conditioning.template_version, conditioning.prompt_drop_form)

    def encode(texts: Sequence[str]) -> list[Tensor]:
        # One by one, because rounding depends on the batch.
        return [
            unconditional_hidden_states(text_encoder, template)
            if text == "" and template != conditioning.template_version
            else prompt_encoder.encode([text])[0].hidden_states
            for text in texts
        ]

    return Sampler(saved, encode, decoder.decode, torch.device(device))


class Encodes(Protocol):
    """The part of a text encoder that sampling uses."""

    def encode(self, captions: Sequence[str], /) -> Sequence[Any]: ...


class Decodes(Protocol):
    """The part of an autoencoder that sampling uses."""

    def decode(self, latents: Tensor, /) -> np.ndarray: ...


def load_autoencoder(model: ModelRef, device: str = "cpu", subfolder: str | None = None) -> "Autoencoder":
    """Load the autoencoder in fp32."""
    from features.autoencoder import Autoencoder

    return Autoencoder.load(model, subfolder=subfolder, device=device)
