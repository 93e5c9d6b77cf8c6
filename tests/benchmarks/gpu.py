"""The cost of the paper's models on a GPU: a training step by strategy and batch, and the latency of an image.

python -m tests.benchmarks gpu [--strategies NAME ...] [--batches 4 8 16 32] [--modes eager compile]
python -m tests.benchmarks gpu --shape tiny --device cpu --steps 2   (to check that it runs)

Training: bf16 autocast over fp32 weights, random latents and text, forward, backward, clipping, AdamW; wall time by
device events, peak memory, and model-FLOPs utilisation: matrix products and attention of one eager step as torch counts
them, over time and the device's peak. Sampling: one guided image from the hidden states of its prompt, without text
encoder and autoencoder; the paper's Table 4, given for comparison, includes both.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.model_shape import built, random_texts
from tests.benchmarks.record import write_results
from training.config import ModelConfig, SamplerConfig, Strategy, TrainingConfig
from training.data.feature_source import Batch, prepare_text, text_lengths
from training.loop.loop import batch_losses
from training.loop.run_state import build_optimizer
from training.sampling.sampler import sample_latents
from training.sampling.step_conditioning import TextBatch

SHAPES = {
    "paper": ModelConfig(),
    "tiny": ModelConfig(
        hidden_size=32, num_blocks=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64, latent_channels=4,
        text_width=48, num_text_layers=5, gate_width=16, fuse_first_layer=1,
    ),
}  # fmt: skip
PAPER_LATENCY_MS = {
    Strategy.PENULTIMATE: 2339, Strategy.UNIFORM: 2370, Strategy.STATIC: 2373, Strategy.FUSE_DIT: 2575,
    Strategy.TIME_WISE: 2391, Strategy.DEPTH_WISE: 2515, Strategy.JOINT: 2523,
}  # fmt: skip
"""Table 4: 512 px, 50 steps, guidance, 512 text tokens."""
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "4090": 165}
"""Dense bf16, by a word of the device's name."""
PIXELS_PER_LATENT = 8


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the options; exits where a device is asked for that is not there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [strategy.value for strategy in Strategy]
    parser.add_argument("--shape", choices=sorted(SHAPES), default="paper")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--strategies", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compile"), default=["eager", "compile"])
    parser.add_argument("--tokens", type=int, default=512, help="text tokens, all real")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="pixels of sampled images")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="the device's dense bf16 peak; default: by its name")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --shape tiny --steps 2 shows that it runs")
    if args.shape == "tiny":
        args.tokens, args.sizes = min(args.tokens, 16), [min(size, 64) for size in args.sizes[:1]]
        args.batches = args.batches[:1]
    return args


def peak_flops(args: argparse.Namespace) -> float | None:
    """Return the device's bf16 peak in FLOP/s, or None where it is neither given nor known."""
    if args.peak_tflops is not None:
        return args.peak_tflops * 1e12
    if args.device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for word, peak in PEAK_TFLOPS.items() if word in name), None)


def _seconds(work: Callable[[], Any], device: str, rounds: int) -> float:
    """Median wall seconds of `rounds` calls, after two that warm up."""
    values = []
    for index in range(rounds + 2):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        if index >= 2:
            values.append(time.perf_counter() - started)
    return statistics.median(values)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _training(config: ModelConfig, strategy: Strategy, batch_size: int, mode: str, args: Any) -> dict[str, Any]:
    device, training = args.device, TrainingConfig(batch_size=batch_size)
    model = built(config, strategy)
    texts = [
        prepare_text(model.prepare_text, text, torch.bfloat16)
        for text in random_texts(config, 1, args.tokens) * batch_size
    ]
    model = model.to(device).train()
    optimizer = build_optimizer(model, training)
    shape = (2, batch_size, config.latent_channels, config.latent_size, config.latent_size)
    data, noise = torch.randn(shape)
    batch = Batch(torch.arange(batch_size), data, noise, torch.rand(batch_size), tuple(texts), *text_lengths(texts))
    batch = batch.to(torch.device(device))
    called = torch.compile(model) if mode == "compile" else model

    def backward(network: Any) -> None:
        with torch.autocast(device, torch.bfloat16):
            losses, _ = batch_losses(network, batch)
        losses.mean().backward()

    def step() -> None:
        backward(called)
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        backward(model)
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(step, device, args.rounds)
    flops, peak = counter.get_total_flops(), peak_flops(args)
    return {
        "ms": round(seconds * 1e3, 2),
        "images per second": round(batch_size / seconds, 1),
        "TFLOP": float(f"{flops / 1e12:.4g}"),
        "utilisation": None if peak is None else round(flops / seconds / peak, 3),
        "peak memory, GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
    }


def _sampling(config: ModelConfig, strategy: Strategy, size_px: int, args: Any) -> dict[str, Any]:
    device = args.device
    model = built(config, strategy)
    prompt, unconditional = random_texts(config, 2, args.tokens)
    model = model.to(device).eval()  # weights still require gradients: autocast caches casts of no others
    prepare = model.prepare_text
    side = size_px // PIXELS_PER_LATENT
    noise = torch.randn(1, config.latent_channels, side, side, device=device)
    settings = SamplerConfig(num_steps=args.steps)

    def text(hidden_states: torch.Tensor) -> TextBatch:
        return TextBatch.of([prepare_text(prepare, hidden_states, torch.float32)], torch.device(device))

    texts = text(prompt), text(unconditional)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16):
            fresh = [TextBatch(one.prepared, one.lengths) for one in texts]
            sample_latents(model, *fresh, torch.zeros(1, dtype=torch.long, device=device), noise, settings)

    paper = PAPER_LATENCY_MS[strategy] if args.shape == "paper" and size_px == 512 and args.steps == 50 else None
    return {"ms": round(_seconds(run, device, args.rounds) * 1e3, 1), "paper, ms": paper}


def measure(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `work`, or that the device ran out of memory."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return {"out of memory": True}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> None:
    """Measure and write everything that the options select."""
    args = parse_arguments(argv)
    config = SHAPES[args.shape]
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    measured: dict[str, Any] = {"device": device_name, "options": vars(args), "peak FLOP/s": peak_flops(args)}
    for strategy in map(Strategy, args.strategies):
        for mode in args.modes:
            for batch in args.batches:
                label = f"{strategy}, training, {mode}, batch {batch}"
                measured[label] = measure(lambda: _training(config, strategy, batch, mode, args))  # noqa: B023
                print(label, measured[label], flush=True)
        for size_px in args.sizes:
            label = f"{strategy}, sampling, {size_px} px"
            measured[label] = measure(lambda: _sampling(config, strategy, size_px, args))  # noqa: B023
            print(label, measured[label], flush=True)
    write_results("gpu", measured)


if __name__ == "__main__":
    main()
