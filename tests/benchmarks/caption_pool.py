"""What the Ray pool costs: captions by one pooled engine against the same engine called bare, in turn.

python -m tests.benchmarks.caption_pool [--rows 400] [--rounds 3]
"""

import argparse
import io
import statistics
import time

import numpy as np

from demo.scenes import render, sample_scene
from orchestration.profiles.loading import load_profile
from pipelines.core.environment import home_folder
from pipelines.core.model_prompts import caption_prompt
from recaption.config import VllmEngineConfig
from recaption.engine import VisionRequest
from tests.benchmarks.record import write_results


def _requests(count: int, prompt: str, max_tokens: int) -> list[VisionRequest]:
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(count):
        buffer = io.BytesIO()
        render(sample_scene(rng)).save(buffer, "JPEG", quality=95)
        requests.append(VisionRequest(image_bytes=buffer.getvalue(), text=prompt, max_tokens=max_tokens))
    return requests


def main() -> None:
    """Measure both ways `--rounds` times in turn; print rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    profile = load_profile("demo", home_folder())
    captions = profile.resolved(profile.captions)
    assert isinstance(captions.captioner, VllmEngineConfig)

    from recaption.ray_pool import close_pools, engine_pool
    from recaption.vllm_engine import VllmEngine

    rows = captions.rows_per_batch
    requests = _requests(args.rows, caption_prompt(captions.prompt_version), captions.max_caption_tokens)
    batches = [(start, requests[start : start + rows]) for start in range(0, len(requests), rows)]
    started = time.monotonic()
    pool = engine_pool(captions.captioner, captions.pool)
    pool.start()
    pool_start = time.monotonic() - started
    started = time.monotonic()
    engine = VllmEngine(captions.captioner)
    engine_start = time.monotonic() - started

    pooled_rates, bare_rates, texts = [], [], {}
    for _ in range(args.rounds + 1):  # the first round warms both up and is not counted
        started = time.monotonic()
        pooled = dict(pool.answer(batches))
        pooled_rates.append(args.rows / (time.monotonic() - started))
        started = time.monotonic()
        bare = {start: engine.generate(batch) for start, batch in batches}
        bare_rates.append(args.rows / (time.monotonic() - started))
        texts = {way: [a.text for s, _ in batches for a in found[s]] for way, found in (("p", pooled), ("b", bare))}
    close_pools()
    ratios = [p / b for p, b in zip(pooled_rates[1:], bare_rates[1:], strict=True)]
    write_results(
        "caption_pool",
        {
            "rows": args.rows,
            "pooled captions per second": round(statistics.median(pooled_rates[1:]), 1),
            "bare captions per second": round(statistics.median(bare_rates[1:]), 1),
            "pooled / bare, median": round(statistics.median(ratios), 3),
            "pooled / bare, each round": [round(ratio, 3) for ratio in ratios],
            "captions equal": sum(a == b for a, b in zip(texts["p"], texts["b"], strict=True)),
            "pool start in seconds": round(pool_start, 1),
            "bare engine start in seconds": round(engine_start, 1),
        },
    )


if __name__ == "__main__":
    main()
