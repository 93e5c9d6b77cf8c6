"""The model of the network benchmarks: its shape as command options, random weights and text, alternating timing."""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.config import ModelConfig, Strategy
from training.models.backbone import Backbone
from training.models.build import build_model
from training.models.fuse_dit import FuseDiT
from training.models.shared_attention import SharedAttention, SharedLayer

BASELINE = Strategy.PENULTIMATE
Key = TypeVar("Key")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the timed model; the defaults are the shape of the committed results."""
    names = [strategy.value for strategy in Strategy]
    parser.add_argument("--strategies", nargs="+", choices=names, default=[*names], metavar="NAME")
    for name, value, text in (
        ("hidden", 384, "hidden size"),
        ("blocks", 8, "blocks"),
        ("heads", 6, "query heads"),
        ("kv-heads", 2, "key and value heads, fewer than query heads as at the paper's scale"),
        ("head-dim", 64, "channels of a head"),
        ("mlp-width", 1536, "inner width of SwiGLU: four times the hidden size, as at the paper's scale"),
        ("latent-size", 16, "height and width of the latents"),
        ("latent-channels", 4, "channels of the latents"),
        ("patch", 2, "patch size"),
        ("layers", 31, "layers of text features"),
        ("text-width", 576, "width of text features"),
        ("tokens", 64, "text tokens, all real"),
        ("batch", 8, "images"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Return the configured model; fuse_dit's blocks share layers spread over the encoder's."""
    return ModelConfig(
        hidden_size=args.hidden,
        num_blocks=args.blocks,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        mlp_width=args.mlp_width,
        patch_size=args.patch,
        latent_channels=args.latent_channels,
        latent_size=args.latent_size,
        text_width=args.text_width,
        num_text_layers=args.layers,
        fuse_first_layer=1,
        fuse_layer_stride=max((args.layers - 2) // max(args.blocks - 1, 1), 1),
    )


def with_baseline(names: Sequence[str]) -> list[Strategy]:
    """Return the strategies in the enum's order, the baseline among them in any case."""
    return [strategy for strategy in Strategy if strategy.value in names or strategy is BASELINE]


def built(config: ModelConfig, strategy: Strategy) -> Backbone:
    """A model with random weights, without zeros that would make products cheaper."""
    model = build_model(config, strategy, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if isinstance(model, FuseDiT):
        model.share_attention(_random_shared(config, generator))
    return model


def _random_shared(config: ModelConfig, generator: torch.Generator) -> SharedAttention:
    width = config.num_kv_heads * config.head_dim

    def layer() -> SharedLayer:
        k_proj, v_proj = torch.randn(2, width, config.text_width, generator=generator) * 0.02
        return SharedLayer(torch.ones(config.text_width), k_proj, v_proj, None)

    layers = {index: layer() for index in config.shared_layers}
    return SharedAttention(layers, config.num_kv_heads, config.head_dim, 1e4, 1e-5)


def random_texts(config: ModelConfig, count: int, tokens: int) -> list[Tensor]:
    """Hidden states (L, S, C) of `count` texts, layers of different scale as an LLM's are."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(0, 1, config.num_text_layers)[:, None, None]
    shape = (config.num_text_layers, tokens, config.text_width)
    return [torch.randn(shape, generator=generator) * scale for _ in range(count)]


def cpu_seconds(work: Mapping[Key, Callable[[], Any]], rounds: int) -> dict[Key, list[float]]:
    """Run each piece of work `rounds` times in turn and return the CPU seconds of each, after a warm-up round.

    The order alternates, so that a machine that slows down does so for all.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in work}
    for index in range(rounds + 1):
        for key in list(work)[:: 1 if index % 2 else -1]:
            started = time.process_time()
            work[key]()
            elapsed = time.process_time() - started
            if index:
                seconds[key].append(elapsed)
    return seconds


def summary(seconds: Mapping[Strategy, Sequence[float]], unit: float, digits: int) -> dict[str, dict[str, float]]:
    """Return fastest and median in `unit` seconds, and ratios to the baseline: of the fastest, and round by round."""
    base = seconds[BASELINE]
    return {
        strategy.value: {
            "min": round(min(values) / unit, digits),
            "median": round(statistics.median(values) / unit, digits),
            "min / penultimate": round(min(values) / min(base), 4),
            "median of round by round / penultimate": round(
                statistics.median(value / other for value, other in zip(values, base, strict=True)), 4
            ),
        }
        for strategy, values in seconds.items()
    }


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """The timed shape and the machine's load, for the results file."""
    return {"shape": {key: value for key, value in vars(args).items() if key != "strategies"}, "load": os.getloadavg()}
