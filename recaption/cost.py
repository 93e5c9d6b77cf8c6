"""Cost model of `captions`, and the time a pool of vision-language engines takes for one answer."""

from dataclasses import dataclass

from pipelines.core.config import ModelRef
from pipelines.core.model_prompts import caption_prompt
from pipelines.core.quantity import ZERO, Quantity
from pipelines.download.cost import image_row_bytes
from pipelines.runner.cost import CostInputs, StageEstimate, Workload
from pipelines.shards.cost import caption_bytes, caption_tokens
from recaption.config import CaptionsConfig, EngineConfig, PoolConfig


@dataclass(frozen=True)
class PoolSize:
    """Engines that answer in parallel: on GPUs, or in CPU processes where there are no GPUs."""

    gpus: Quantity
    workers: Quantity
    """GPUs, or CPU processes."""
    model: ModelRef

    @property
    def on_gpu(self) -> bool:
        return self.gpus is not ZERO


def captions_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `captions`."""
    config, rows = inputs.setting("captions", CaptionsConfig), workload.rows
    pool = engine_pool(inputs, "captions", config.captioner, config.pool)
    captioned = rows * inputs.assumed("captioned_share")
    rate = inputs.assumed("captions_per_second")
    return StageEstimate(
        stage=workload.stage,
        rows_in=rows,
        rows_out=captioned,
        bytes_in=rows * image_row_bytes(inputs),
        bytes_out=captioned * (caption_bytes(inputs) + inputs.assumed("row_bytes")),
        requests=rows,
        seconds=rows / rate if rate.is_known else rows * _caption_seconds(inputs, config, pool),
        nodes=inputs.nodes_for(pool.gpus),
        gpus=pool.gpus,
        limit="as measured" if rate.is_known else "captioner",
    )


def engine_pool(inputs: CostInputs, path: str, engine: EngineConfig, pool: PoolConfig) -> PoolSize:
    """Return the pool of an engine; `path` is the profile's field that holds ``pool``."""
    if engine.kind == "openai":
        gpus = inputs.assumed("gpus")
        return PoolSize(gpus, gpus, engine.model)
    actors = inputs.from_profile(f"{path}.pool.max_actors")
    if not pool.num_gpus_per_actor:
        return PoolSize(ZERO, actors, engine.model)
    gpus = inputs.derived("gpus", actors * inputs.from_profile(f"{path}.pool.num_gpus_per_actor"))
    return PoolSize(gpus, gpus, engine.model)


def answer_seconds(
    inputs: CostInputs, pool: PoolSize, parameters: Quantity, tokens_read: Quantity, tokens_written: Quantity
) -> Quantity:
    """Return the seconds of a request to a saturated pool: a parallel prefill, then one decoding step a token."""
    prefill = 2 * parameters * tokens_read / inputs.flops_per_second(pool.on_gpu, "prefill_mfu")
    decode = 2 * parameters * tokens_written / inputs.flops_per_second(pool.on_gpu, "decode_mfu")
    return (prefill + decode) / pool.workers


def image_tokens(inputs: CostInputs, side_px: Quantity) -> Quantity:
    """Return the tokens of a square image."""
    side = side_px / inputs.assumed("vlm_px_per_token")
    return side * side


def text_tokens(inputs: CostInputs, text: str, path: str) -> Quantity:
    """Return the tokens of a fixed text that the field `path` of the profile selects."""
    return inputs.implied(len(text), path) / inputs.assumed("chars_per_token")


def _caption_seconds(inputs: CostInputs, config: CaptionsConfig, pool: PoolSize) -> Quantity:
    parameters = inputs.derived("captioner_params", inputs.active_parameters(pool.model))
    question = text_tokens(inputs, caption_prompt(config.prompt_version), "captions.prompt_version")
    image = image_tokens(inputs, inputs.from_profile("images.transform.size_px"))
    tokens_per_second = inputs.assumed("vlm_tokens_per_second")
    if tokens_per_second.is_known:
        return caption_tokens(inputs) / (tokens_per_second * pool.workers)
    tokens_read = image + question + inputs.assumed("chat_tokens")
    return answer_seconds(inputs, pool, parameters, tokens_read, caption_tokens(inputs))
