"""What a profile's models weigh and cost, by strategy: parameters, and operations of one image."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from features.config import AUTOENCODER_FACTOR
from orchestration.console import table
from training.config import Strategy

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile

NUM_TEXT_TOKENS = 512
"""Text tokens per branch that Table 4 of the paper counts: the encoder's most."""
_SIZE_FACTORS = (1, 2)
_TERA = 1e12


def model_figures(profile: "Profile") -> dict[str, Any]:
    """Return the figures as JSON: exact counts and operations, at the model's own size and at twice that size."""
    from training.cost.flops import KNOWN_TEXT_ENCODERS, count_flops
    from training.cost.params import count_parameter_groups

    model, sampler = profile.model, profile.samples.sampler
    encoder = KNOWN_TEXT_ENCODERS.get(profile.text_encoder.id)
    num_branches = 1 if sampler.guidance_scale == 1 else 2
    strategies = {}
    for strategy in Strategy:
        count = count_parameter_groups(model, strategy)
        flops = {}
        for size in (model.latent_size * scale for scale in _SIZE_FACTORS):
            variants = {}
            for name, cached in (("uncached", False), ("cached", True)):
                found = count_flops(
                    model, strategy, encoder, latent_size=size, cached=cached, num_steps=sampler.num_steps,
                    num_text_tokens=NUM_TEXT_TOKENS, num_branches=num_branches,
                )  # fmt: skip
                variants[name] = found.total
                variants.setdefault("attention", found.attention)
            flops[str(size * AUTOENCODER_FACTOR)] = variants
        strategies[strategy.value] = {"parameters": count.total, "adaln_parameters": count.adaln, "flops": flops}
    return {
        "profile": profile.name,
        "num_steps": sampler.num_steps,
        "num_branches": num_branches,
        "num_text_tokens": NUM_TEXT_TOKENS,
        "text_encoder": profile.text_encoder.id,
        "text_encoder_counted": encoder is not None,
        "strategies": strategies,
    }


def figure_lines(figures: Mapping[str, Any]) -> list[str]:
    """Return the figures as text for a terminal."""
    strategies: Mapping[str, Any] = figures["strategies"]
    has_adaln = any(row["adaln_parameters"] for row in strategies.values())
    counts = [["strategy", "parameters", *(["of them adaLN"] if has_adaln else [])]]
    counts += [
        [name, f"{row['parameters']:,}", *([f"{row['adaln_parameters']:,}"] if has_adaln else [])]
        for name, row in strategies.items()
    ]
    sizes = list(next(iter(strategies.values()))["flops"])
    heads = ["strategy"]
    for size in sizes:
        heads += [f"{size} px uncached", "cached", "attention"]
    costs = [heads]
    for name, row in strategies.items():
        cells = [row["flops"][size][kind] for size in sizes for kind in ("uncached", "cached", "attention")]
        costs.append([name, *(f"{cell / _TERA:.2f}" for cell in cells)])
    encoder = figures["text_encoder"]
    counted = f"{encoder} once" if figures["text_encoder_counted"] else f"without {encoder}, whose shape is not known"
    return [
        f"profile {figures['profile']}: trained parameters (fuse_dit: without the language model that it shares)",
        *table(counts, indent="  ").splitlines(),
        "",
        f"10^12 operations of one image: {figures['num_steps']} steps, {figures['num_branches']} branches of "
        f"{figures['num_text_tokens']} text tokens, {counted}",
        *table(costs, indent="  ").splitlines(),
        "",
        "uncached: text anew at every step, as the released code samples; cached: as throughline samples.",
        "Attention products are in neither, as in Table 4 of the paper, nor is the autoencoder.",
    ]
