"""The CPU time of a training step with each strategy, alternating in one process.

python -m tests.benchmarks training_step [--strategies uniform depth_wise joint] [--batches 8 32] [--rounds 20]
python -m tests.benchmarks training_step --modes eager bf16 compile   (bf16: autocast; compile: compiled blocks)

Timed: a step of training/loop/loop.py from prepared texts to the optimizer: fusion, projection, keys and values, the
network forward and backward, gradient clipping, AdamW. Text features are cached and normalised once per caption, as in
training; that cost has its own line, and `--raw-text` adds it to every step. Not timed: reading latents, random noise,
the moving average of the weights.
"""

import argparse
import statistics
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
from training.config import ModelConfig, Strategy, TrainingConfig
from training.data.feature_source import Batch, prepare_text, text_lengths
from training.loop.loop import batch_losses
from training.loop.parallel import parallelize
from training.loop.run_state import build_optimizer
from training.models.kernels.malloc import keep_freed_memory

EAGER, BF16, COMPILE = MODES = "eager", "bf16", "compile"


def training_step(
    config: ModelConfig, strategy: Strategy, args: argparse.Namespace, mode: str = EAGER
) -> Callable[[], object]:
    """Return one step of a strategy, ready to be timed."""
    training = TrainingConfig(batch_size=args.batch, compile=mode == COMPILE)
    model = built(config, strategy).train()
    parallelize(model, training, torch.device("cpu"), num_processes=1)
    optimizer = build_optimizer(model, training)
    hidden_states = random_texts(config, args.batch, args.tokens)

    def prepared() -> list[torch.Tensor]:
        return [prepare_text(model.prepare_text, text, torch.float32) for text in hidden_states]

    cached = prepared()
    generator = torch.Generator().manual_seed(3)
    shape = (args.batch, config.latent_channels, config.latent_size, config.latent_size)
    data, noise = torch.randn(2, *shape, generator=generator)
    t = torch.rand(args.batch, generator=generator)

    def step() -> None:
        texts = prepared() if args.raw_text else cached
        batch = Batch(torch.arange(args.batch), data, noise, t, tuple(texts), *text_lengths(texts))
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == BF16):
            losses, _ = batch_losses(model, batch)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time a step of each strategy in turn; print CPU milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", help="several batch sizes, one after the other")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[EAGER])
    parser.add_argument("--raw-text", action="store_true", help="normalise raw hidden states in every step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    config, strategies = model_config(args), with_baseline(args.strategies)
    figures: dict[str, object] = {}
    for batch in args.batches or [args.batch]:
        args.batch = batch
        steps = {(s, mode): training_step(config, s, args, mode) for s in strategies for mode in args.modes}
        seconds = cpu_seconds(steps, args.rounds)
        for mode in args.modes:
            of_mode = {strategy: seconds[strategy, mode] for strategy in strategies}
            for name, values in summary(of_mode, unit=1e-3, digits=1).items():
                if mode != args.modes[0]:
                    first = seconds[Strategy(name), args.modes[0]]
                    pairs = zip(first, of_mode[Strategy(name)], strict=True)
                    values[f"times as fast as {args.modes[0]}"] = round(statistics.median(a / b for a, b in pairs), 3)
                figures[f"batch {batch}, {mode}, {name}, ms"] = values
    texts = random_texts(config, args.batch, args.tokens)
    model = built(config, Strategy.DEPTH_WISE)

    def normalised() -> None:
        for text in texts:
            prepare_text(model.prepare_text, text, torch.float32)

    once = min(cpu_seconds({Strategy.DEPTH_WISE: normalised}, 5)[Strategy.DEPTH_WISE])
    write_results(
        "training_step",
        {
            **conditions(args),
            "normalising all layers of the last batch's captions, once per caption, ms": round(once * 1e3, 1),
            **figures,
        },
    )


if __name__ == "__main__":
    main()
