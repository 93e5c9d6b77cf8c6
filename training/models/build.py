"""Builds the model of a strategy."""

from training.config import ModelConfig, Strategy
from training.models.backbone import Backbone
from training.models.dit import DiT
from training.models.fuse_dit import FuseDiT
from training.models.layers import initialise


def build_model(config: ModelConfig, strategy: Strategy, *, seed: int | None = 0) -> Backbone:
    """Build the model of a strategy with initial values from `seed`; None leaves them unset, for loading or counting.

    Models of different strategies start equal in every parameter they share. fuse_dit needs the encoder's weights
    (`FuseDiT.share_attention`) before it prepares text.
    """
    model: Backbone = FuseDiT(config) if strategy is Strategy.FUSE_DIT else DiT(config, strategy)
    if seed is not None:
        initialise(model, seed)
    return model
