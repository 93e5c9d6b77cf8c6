"""Cost model of `scores`: questions to the judges of all benchmarks."""

from evaluation.benchmarks.cost import benchmarks_of, image_px, images_per_arm, num_arms_of, png_bytes
from evaluation.config import ScoresConfig
from pipelines.core.model_prompts import unified_reward_prompt, vqascore_question
from pipelines.core.quantity import ZERO, Quantity, largest, smallest
from pipelines.runner.cost import CostInputs, StageEstimate, Workload
from recaption.cost import PoolSize, answer_seconds, engine_pool, image_tokens, text_tokens

_YES_NO_TOKENS = Quantity(1.0)


def scores_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `scores`: all arms on all benchmarks."""
    num_arms, rate = num_arms_of(inputs), inputs.assumed("answers_per_second")
    answers, seconds, images = ZERO, ZERO, ZERO
    pools = []
    for benchmark in benchmarks_of(inputs):
        pools.append(_judge_pool(inputs, benchmark))
        judged = num_arms * images_per_arm(inputs, benchmark)
        asked = judged * (inputs.assumed("questions_per_image") if benchmark == "geneval" else Quantity(1.0))
        seconds_each = 1 / rate if rate.is_known else _judge_seconds(inputs, benchmark, pools[-1])
        images, answers, seconds = images + judged, answers + asked, seconds + asked * seconds_each
    gpus = largest(*(pool.gpus for pool in pools))
    return StageEstimate(
        stage=workload.stage,
        rows_in=images,
        rows_out=images,
        bytes_in=png_bytes(inputs, images),
        bytes_out=answers * inputs.assumed("row_bytes"),
        requests=answers,
        seconds=seconds,
        nodes=inputs.nodes_for(gpus),
        gpus=gpus,
        limit="judges",
    )


def _rating_path(inputs: CostInputs) -> str:
    """Return the profile's field that configures DrawBench's ratings."""
    return "scores" if inputs.optional_setting("drawbench_scores", ScoresConfig) is None else "drawbench_scores"


def _judge_pool(inputs: CostInputs, benchmark: str) -> PoolSize:
    path = _rating_path(inputs) if benchmark == "drawbench" else "scores"
    config = inputs.setting(path, ScoresConfig)
    return engine_pool(inputs, path, config.judge, config.pool)


def _judge_seconds(inputs: CostInputs, benchmark: str, pool: PoolSize) -> Quantity:
    """Return the seconds that the whole pool takes for an answer: one token of yes or no, or a rating."""
    assumed, is_rating = inputs.assumed, benchmark == "drawbench"
    parameters = inputs.derived("judge_params", inputs.active_parameters(pool.model))
    question = text_tokens(inputs, unified_reward_prompt("") if is_rating else vqascore_question(""), "protocols")
    image = image_tokens(inputs, image_px(inputs))
    tokens_read = image + question + assumed("prompt_tokens") + assumed("chat_tokens")
    limit = inputs.from_profile(f"{_rating_path(inputs)}.max_rating_tokens")
    tokens_written = smallest(assumed("rating_tokens"), limit) if is_rating else _YES_NO_TOKENS
    return answer_seconds(inputs, pool, parameters, tokens_read, tokens_written)
