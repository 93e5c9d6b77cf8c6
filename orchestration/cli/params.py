"""The commands `throughline params`, which counts the parameters and operations of a profile's models, and
`throughline profile show`, which prints a profile."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from orchestration.cli.options import add_json_argument, add_profile_arguments, load_profile, print_json

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile

NUM_TEXT_TOKENS = 512
"""Text tokens per branch in Table 4 of the paper: the encoder's maximum."""
_SIZE_FACTORS = (1, 2)
_TERA = 1e12


def add_params_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `params`."""
    add_profile_arguments(parser)
    add_json_argument(parser)


def run_params(arguments: argparse.Namespace) -> int:
    """Print the parameters and operations of a profile's models; return 0."""
    figures = model_figures(load_profile(arguments.profile, arguments.changes))
    if arguments.json:
        print_json(figures)
    else:
        print("\n".join(figure_lines(figures)))
    return 0


def add_profile_show_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `profile`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    show = actions.add_parser("show", help="print the whole resolved configuration")
    show.add_argument("name", nargs="?", help="demo, single_gpu, paper, or a TOML file; default: THROUGHLINE_PROFILE")
    show.add_argument("--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE")
    add_json_argument(show)


def run_profile_show(arguments: argparse.Namespace) -> int:
    """Print a profile as lines that --set accepts, or as JSON; return 0."""
    profile = load_profile(arguments.name, arguments.changes)
    values = profile.model_dump(mode="json")
    if arguments.json:
        print_json(values)
        return 0
    for line in _flattened(values, ""):
        print(line)
    for warning in profile.warnings():
        print(f"note: {warning}", file=sys.stderr)
    return 0


def _flattened(value: Any, path: str) -> Iterator[str]:
    """Yield nested configuration as ``field.field = value`` lines."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flattened(item, f"{path}.{name}" if path else name)
    else:
        yield f"{path} = {json.dumps(value, ensure_ascii=False)}"


def model_figures(profile: "Profile") -> dict[str, Any]:
    """Return exact parameter counts, and operations at the model's own size and at twice that size, as JSON."""
    from features.config import AUTOENCODER_FACTOR
    from training.config import Strategy
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
                counted = count_flops(
                    model, strategy, encoder, latent_size=size, cached=cached, num_steps=sampler.num_steps,
                    num_text_tokens=NUM_TEXT_TOKENS, num_branches=num_branches,
                )  # fmt: skip
                variants[name] = counted.total
                variants.setdefault("attention", counted.attention)
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
    from orchestration.console import table

    strategies: Mapping[str, Any] = figures["strategies"]
    has_adaln = any(row["adaln_parameters"] for row in strategies.values())
    counts = [["strategy", "parameters", *(["of these adaLN"] if has_adaln else [])]]
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
    counted = f"{encoder} once" if figures["text_encoder_counted"] else f"without {encoder}, whose shape is unknown"
    return [
        f"profile {figures['profile']}: trained parameters (fuse_dit: without the shared language model)",
        *table(counts, indent="  ").splitlines(),
        "",
        f"10^12 operations of one image: {figures['num_steps']} steps, {figures['num_branches']} branches of "
        f"{figures['num_text_tokens']} text tokens, {counted}",
        *table(costs, indent="  ").splitlines(),
        "",
        "uncached: text is processed at every step, as in the released code; cached: as throughline samples.",
        "Neither includes attention products, as in Table 4 of the paper, nor the autoencoder.",
    ]
