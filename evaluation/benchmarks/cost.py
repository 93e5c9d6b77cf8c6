"""Cost model of `samples`, and the number and size of the images that arms draw."""

from evaluation.config import PromptSetsConfig, SamplesConfig
from features.config import AUTOENCODER_FACTOR
from features.cost import autoencoder_flops
from pipelines.core.config import ModelRef
from pipelines.core.quantity import ZERO, Quantity
from pipelines.runner.cost import CostInputs, StageEstimate, Workload, limit_on
from training.config import Arm, ModelConfig
from training.cost.flops import KNOWN_TEXT_ENCODERS, count_flops


def samples_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `samples`: all arms on all benchmarks."""
    benchmarks, num_arms = benchmarks_of(inputs), num_arms_of(inputs)
    images = sum((images_per_arm(inputs, name) for name in benchmarks), ZERO)
    prompts = sum((images_per_arm(inputs, name) / _images_per_prompt(inputs, name) for name in benchmarks), ZERO)
    on_gpu = inputs.setting("samples", SamplesConfig).device == "cuda"
    rate = inputs.assumed("samples_per_second")
    seconds_all_arms = 1 / rate * len(_arms(inputs)) if rate.is_known else _sampling_seconds(inputs, on_gpu)
    gpus = workload.num_runs if on_gpu else ZERO
    return StageEstimate(
        stage=workload.stage,
        rows_in=num_arms * prompts,
        rows_out=num_arms * images,
        bytes_in=ZERO,
        bytes_out=png_bytes(inputs, num_arms * images),
        seconds=images * seconds_all_arms / workload.num_runs,
        nodes=inputs.nodes_for(gpus) if on_gpu else workload.num_runs,
        gpus=gpus,
        limit=limit_on("sampling", on_gpu),
    )


def benchmarks_of(inputs: CostInputs) -> tuple[str, ...]:
    """Return the benchmarks that the profile has prompts of."""
    return inputs.setting("prompt_sets", PromptSetsConfig).benchmarks


def num_arms_of(inputs: CostInputs) -> Quantity:
    """Return the number of arms."""
    return inputs.implied(len(_arms(inputs)), "arms")


def images_per_arm(inputs: CostInputs, benchmark: str) -> Quantity:
    """Return the images that one arm draws for a benchmark."""
    prompts = inputs.facts.prompts.get(benchmark, float("nan"))
    return inputs.implied(prompts, f"prompt_sets ({benchmark})") * _images_per_prompt(inputs, benchmark)


def image_px(inputs: CostInputs) -> Quantity:
    """Return the side of a drawn image in pixels."""
    return inputs.from_profile("model.latent_size") * AUTOENCODER_FACTOR


def png_bytes(inputs: CostInputs, images: Quantity) -> Quantity:
    """Return the bytes of drawn images as PNG files."""
    size_px = image_px(inputs)
    return images * size_px * size_px * inputs.assumed("png_bytes_per_px")


def _arms(inputs: CostInputs) -> tuple[str, ...]:
    return inputs.setting("arms", tuple)


def _images_per_prompt(inputs: CostInputs, benchmark: str) -> Quantity:
    return inputs.from_profile(f"samples.images_per_prompt.{benchmark}")


def _sampling_seconds(inputs: CostInputs, on_gpu: bool) -> Quantity:
    """Return the seconds that one process takes for one image of each arm."""
    model, sampler = inputs.setting("model", ModelConfig), inputs.setting("samples", SamplesConfig).sampler
    encoder = KNOWN_TEXT_ENCODERS.get(inputs.setting("text_encoder", ModelRef).id)
    side = image_px(inputs)
    decoding = side * side * autoencoder_flops(inputs, "vae_decode_flops_per_px")
    seconds = len(_arms(inputs)) * decoding / inputs.flops_per_second(on_gpu, "vae_mfu")
    prompt_tokens = inputs.assumed("prompt_tokens")
    for name in _arms(inputs):
        counted = count_flops(
            model, Arm.parse(name).strategy, encoder, latent_size=model.latent_size, cached=True,
            num_steps=sampler.num_steps, num_text_tokens=round(prompt_tokens.value),
            num_branches=1 if sampler.guidance_scale == 1 else 2,
        )  # fmt: skip
        flops = Quantity(counted.total + counted.attention, prompt_tokens.sources)
        flops = flops * inputs.implied(1, "samples.sampler")
        seconds = seconds + flops / inputs.flops_per_second(on_gpu, "sample_mfu")
    return seconds
