"""What models cost in an estimate: operations and bytes of one caption, latent, text, training step, image, answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestration.cost.inputs import Inputs
from orchestration.cost.quantity import ZERO, Figure, smallest
from orchestration.profiles.profile import AUTOENCODER_FACTOR
from pipelines.core.model_prompts import caption_prompt, unified_reward_prompt, vqascore_question
from training.config import Arm, Strategy
from training.cost.flops import KNOWN_TEXT_ENCODERS, count_flops
from training.cost.step_cost import training_flops

if TYPE_CHECKING:
    from evaluation.config import ScoresConfig
    from pipelines.core.config import ModelRef
    from recaption.config import EngineConfig, PoolConfig

_HIDDEN_STATE_BYTES = 2
"""Text features are stored, and kept in memory, as bfloat16 (`features.text_encoder.STORED_TYPE`)."""
_TOKEN_ID_BYTES = 4
_SAMPLE_KEY_BYTES = 16
_NUM_MOMENTS_STORED = 2
"""A latent is a posterior: mean and standard deviation."""
_SD3_AUTOENCODER_PARAMETERS = 83.8e6
_LATENT_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Pool:
    """The engines that answer side by side: GPUs, or CPU processes where there are no GPUs."""

    gpus: Figure
    units: Figure
    model: "ModelRef"

    @property
    def on_gpu(self) -> bool:
        return self.gpus is not ZERO


class ModelEstimator:
    """Costs of one item each; rows and runs are left to `orchestration.cost.stages`."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs, self._profile = inputs, inputs.profile

    # Vision-language models

    def pool(self, stage: str) -> Pool:
        """Return the pool of a stage that asks a vision-language model; ``drawbench_scores`` counts as one."""
        if stage == "captions":
            return self._pool(stage, self._profile.captions.captioner, self._profile.captions.pool)
        config: ScoresConfig = getattr(self._profile, stage)
        return self._pool(stage, config.judge, config.pool)

    def judge_pool(self, benchmark: str) -> Pool:
        """Return the pool that judges a benchmark."""
        rated_apart = benchmark == "drawbench" and self._profile.drawbench_scores is not None
        return self.pool("drawbench_scores" if rated_apart else "scores")

    def _pool(self, stage: str, engine: "EngineConfig", pool: "PoolConfig") -> Pool:
        if engine.kind == "openai":
            gpus = self._inputs.assumed("gpus")
            return Pool(gpus, gpus, engine.model)
        actors = self._inputs.of_profile(f"{stage}.pool.max_actors")
        if not pool.num_gpus_per_actor:
            return Pool(ZERO, actors, engine.model)
        own = actors * self._inputs.of_profile(f"{stage}.pool.num_gpus_per_actor")
        gpus = self._inputs.derived("gpus", own)
        return Pool(gpus, gpus, engine.model)

    def _rate(self, on_gpu: bool, share: str) -> Figure:
        """Return the operations a second of one GPU at a share of its peak, or of one CPU process."""
        if not on_gpu:
            return self._inputs.assumed("cpu_flops")
        return self._inputs.gpu_flops() * self._inputs.assumed(share)

    def _vision_seconds(self, pool: Pool, parameters: Figure, read: Figure, written: Figure) -> Figure:
        """Seconds of a request of a pool that is always busy: tokens read at once, tokens written one by one."""
        reading = 2 * parameters * read / self._rate(pool.on_gpu, "prefill_mfu")
        writing = 2 * parameters * written / self._rate(pool.on_gpu, "decode_mfu")
        return (reading + writing) / pool.units

    def _image_tokens(self, side_px: Figure) -> Figure:
        side = side_px / self._inputs.assumed("vlm_px_per_token")
        return side * side

    def _tokens_of(self, text: str, path: str) -> Figure:
        return self._inputs.implied(len(text), path) / self._inputs.assumed("chars_per_token")

    def caption_tokens(self) -> Figure:
        """Tokens of a caption, cut as the profile says."""
        most = self._inputs.of_profile("captions.max_caption_tokens")
        return smallest(self._inputs.assumed("caption_tokens"), most)

    def caption_bytes(self) -> Figure:
        """Characters of a caption."""
        return self.caption_tokens() * self._inputs.assumed("chars_per_token")

    def caption_seconds(self, pool: Pool) -> Figure:
        """Seconds that the whole pool takes for a caption."""
        parameters = self._inputs.derived("captioner_params", self._inputs.active_parameters(pool.model))
        question = self._tokens_of(caption_prompt(self._profile.captions.prompt_version), "captions.prompt_version")
        image = self._image_tokens(self._inputs.of_profile("images.transform.size_px"))
        read = image + question + self._inputs.assumed("chat_tokens")
        each = self._inputs.assumed("vlm_tokens_per_second")
        if each.is_known:
            return self.caption_tokens() / (each * pool.units)
        return self._vision_seconds(pool, parameters, read, self.caption_tokens())

    def answer_seconds(self, benchmark: str, pool: Pool) -> Figure:
        """Seconds that the whole pool of a judge takes for an answer: one token of yes or no, or a rating."""
        assumed = self._inputs.assumed
        parameters = self._inputs.derived("judge_params", self._inputs.active_parameters(pool.model))
        rates = benchmark == "drawbench"
        words = self._tokens_of(unified_reward_prompt("") if rates else vqascore_question(""), "protocols")
        image = self._image_tokens(self._inputs.of_profile("model.latent_size") * AUTOENCODER_FACTOR)
        read = image + words + assumed("prompt_tokens") + assumed("chat_tokens")
        stage = "drawbench_scores" if self._profile.drawbench_scores is not None else "scores"
        longest = self._inputs.of_profile(f"{stage}.max_rating_tokens")
        written = smallest(assumed("rating_tokens"), longest) if rates else Figure(1.0)
        return self._vision_seconds(pool, parameters, read, written)

    # Latents and text

    def latent_bytes(self) -> Figure:
        """Bytes of the posterior of one image."""
        side = self._inputs.of_profile("latents.image_px") / AUTOENCODER_FACTOR
        value_bytes = _LATENT_BYTES[self._profile.latents.storage_dtype]
        values = self._inputs.of_profile("model.latent_channels") * side * side
        stored = self._inputs.implied(value_bytes * _NUM_MOMENTS_STORED, "latents.storage_dtype")
        return values * stored + _SAMPLE_KEY_BYTES

    def latents_per_second(self, on_gpu: bool) -> Figure:
        """Images that one process encodes in a second."""
        side = self._inputs.of_profile("latents.image_px")
        return self._rate(on_gpu, "vae_mfu") / (side * side * self._autoencoder_flops("vae_encode_flops_per_px"))

    def _autoencoder_flops(self, name: str) -> Figure:
        """Operations for a pixel: SD3's, and of a model in a local folder in proportion to its parameters."""
        flops = self._inputs.assumed(name)
        model_id = self._profile.autoencoder.id
        if model_id not in self._inputs.facts.local_parameters:
            return flops
        share = self._inputs.facts.local_parameters[model_id] / _SD3_AUTOENCODER_PARAMETERS
        return flops * self._inputs.implied(share, f"model {model_id}")

    def text_tokens(self) -> Figure:
        """Tokens of a caption in its template."""
        from features.config import TextFeaturesConfig
        from features.templates import apply_template

        settings = self._profile.text_features
        if settings is not None:
            most = self._inputs.of_profile("text_features.max_tokens")
        else:
            longest = TextFeaturesConfig.model_fields["max_tokens"].default
            most = self._inputs.implied(longest, "text_encoder (longest text)")
        around = self._tokens_of(apply_template(self._profile.template_version, ""), "template_version")
        return smallest(self._inputs.derived("text_tokens", self.caption_tokens() + around), most)

    def text_bytes(self) -> Figure:
        """Bytes of a caption's stored layers."""
        settings = self._profile.text_features
        if settings is not None and settings.layers is not None:
            layers = self._inputs.implied(len(settings.layers), "text_features.layers")
        else:
            layers = self._inputs.of_profile("model.num_text_layers")
        token_bytes = layers * self._inputs.of_profile("model.text_width") * _HIDDEN_STATE_BYTES + _TOKEN_ID_BYTES
        return self.text_tokens() * token_bytes + _SAMPLE_KEY_BYTES

    def texts_per_second(self, on_gpu: bool) -> Figure:
        """Captions that one process encodes in a second."""
        return self._rate(on_gpu, "encode_mfu") / (self.text_tokens() * self._inputs.encoder_flops_per_token())

    # Training and sampling

    def training_flops(self, strategy: Strategy) -> Figure:
        """Operations of one optimizer step."""
        count = training_flops(self._profile.model, strategy)
        fixed = self._inputs.implied(count.fixed, "model")
        per_token = self._inputs.implied(count.per_text_token, "model")
        flops = self._inputs.of_profile("training.batch_size") * (fixed + per_token * self.text_tokens())
        if self._profile.training.checkpoint_activations:
            flops = flops * self._inputs.implied(4 / 3, "training.checkpoint_activations")
        return flops

    def training_rate(self) -> Figure:
        """Operations a second of one training process."""
        reached = self._rate(self._profile.training.device == "cuda", "mfu")
        return self._inputs.derived("training_flops_per_second", reached)

    def drawing_seconds(self, on_gpu: bool) -> Figure:
        """Seconds that one process takes for one image of each arm."""
        inputs, model, sampler = self._inputs, self._profile.model, self._profile.samples.sampler
        encoder = KNOWN_TEXT_ENCODERS.get(self._profile.text_encoder.id)
        side = inputs.of_profile("model.latent_size") * AUTOENCODER_FACTOR
        decoding = side * side * self._autoencoder_flops("vae_decode_flops_per_px")
        seconds = len(self._profile.arms) * decoding / self._rate(on_gpu, "vae_mfu")
        prompt_tokens = inputs.assumed("prompt_tokens")
        for name in self._profile.arms:
            counted = count_flops(
                model, Arm.parse(name).strategy, encoder, latent_size=model.latent_size, cached=True,
                num_steps=sampler.num_steps, num_text_tokens=round(prompt_tokens.value),
                num_branches=1 if sampler.guidance_scale == 1 else 2,
            )  # fmt: skip
            flops = Figure(counted.total + counted.attention, prompt_tokens.inputs)
            seconds = seconds + flops * inputs.implied(1, "samples.sampler") / self._rate(on_gpu, "sample_mfu")
        return seconds
