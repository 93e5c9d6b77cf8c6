"""Parameter counts of the models, on the meta device: no memory is used for weights."""

import torch

from training.config import ModelConfig, Strategy
from training.dit import build_model


def count_parameters(config: ModelConfig, strategy: Strategy) -> int:
    """Return the number of trained parameters; for fuse_dit that is the DiT's own, without the frozen LLM."""
    with torch.device("meta"):
        model = build_model(config, strategy, seed=None)
    return sum(parameter.numel() for parameter in model.parameters())
