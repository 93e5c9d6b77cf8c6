"""The CPU time of guided sampling with each strategy, alternating in one process.

python -m tests.benchmarks sampling [--strategies uniform depth_wise joint] [--batch 8] [--steps 10] [--rounds 5]

Timed: from the raw hidden states of as many different prompts as there are images, and of the unconditional text, to
latents: normalisation, fusion, keys and values, every Euler step with both branches. Not timed: the text encoder, the
autoencoder.
"""

import argparse
from collections.abc import Callable

import torch

from tests.benchmarks.model_shape import (
    add_arguments,
    built,
    conditions,
    cpu_seconds,
    model_config,
    random_texts,
    summary,
    with_baseline,
)
from tests.benchmarks.record import write_results
from training.config import ModelConfig, SamplerConfig, Strategy
from training.data.feature_source import prepare_text
from training.models.kernels.malloc import keep_freed_memory
from training.sampling.sampler import sample_latents
from training.sampling.step_conditioning import TextBatch


def sampling_run(config: ModelConfig, strategy: Strategy, args: argparse.Namespace) -> Callable[[], object]:
    """Return one whole sampling of a batch, ready to be timed."""
    model = built(config, strategy).eval().requires_grad_(False)
    *prompts, unconditional = random_texts(config, args.batch + 1, args.tokens)
    shape = (args.batch, config.latent_channels, config.latent_size, config.latent_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    settings = SamplerConfig(num_steps=args.steps, guidance_scale=args.guidance, batch_size=args.batch)

    def text(hidden_states: list[torch.Tensor]) -> TextBatch:
        prepared = [prepare_text(model.prepare_text, one, torch.float32) for one in hidden_states]
        return TextBatch.of(prepared, torch.device("cpu"))

    def run() -> None:
        sample_latents(model, text(prompts), text([unconditional]), torch.arange(args.batch), noise, settings)

    return run


def main() -> None:
    """Time a sampling of each strategy in turn; print CPU seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=6.0, help="1 leaves the unconditional branch out")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config = model_config(args)
    runs = {strategy: sampling_run(config, strategy, args) for strategy in with_baseline(args.strategies)}
    figures = summary(cpu_seconds(runs, args.rounds), unit=1.0, digits=3)
    write_results("sampling", {**conditions(args), **{f"{name}, s": values for name, values in figures.items()}})


if __name__ == "__main__":
    main()
