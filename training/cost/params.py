"""Parameter counts of the models, on the meta device, without memory for weights."""

from dataclasses import dataclass

import torch

from training.config import ModelConfig, Strategy
from training.models.build import build_model


@dataclass(frozen=True)
class ParameterCount:
    """Trained parameters of one strategy; for fuse_dit without the frozen LLM."""

    total: int
    adaln: int
    """Those that `timestep_conditioning: adaln` adds; the paper has none."""


def count_parameter_groups(config: ModelConfig, strategy: Strategy) -> ParameterCount:
    """Return the number of trained parameters, and adaLN's among them."""
    with torch.device("meta"):
        model = build_model(config, strategy, seed=None)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adaln = sum(size for name, size in sizes.items() if name.startswith("time.") or ".modulation." in name)
    return ParameterCount(sum(sizes.values()), adaln)


def count_parameters(config: ModelConfig, strategy: Strategy) -> int:
    """Return the number of trained parameters; for fuse_dit without the frozen LLM."""
    return count_parameter_groups(config, strategy).total
