"""Golden losses: twenty steps of every strategy on a tiny model and fixed data, recorded in losses.json.

They change with the numerics: initial values, order, noise, times, fusion, loss, optimizer, schedule. Where a change is
intended, `python -m tests.golden` rewrites them, and the difference belongs into the same commit.
"""

import json
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from pipelines.core.progress import Progress
from tests.training.conftest import TinyData
from training.config import Strategy
from training.data.feature_source import FeatureSource
from training.loop.loop import train
from training.models.build import build_model
from training.models.saved_model import connect_text_encoder

GOLDEN = Path(__file__).with_name("losses.json")
NUM_STEPS = 20
_LEARNING_RATE = 5e-3
"""High enough that a learned fusion differs visibly from a fixed one within the steps."""
_ORDER = "golden"
"""Replaces the dataset's version, so that the order does not depend on the manifest."""


def losses_of(strategy: Strategy, data: TinyData, folder: Path) -> list[float]:
    """Train in this process on one thread; return the loss of each step, then the validation loss."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state()
    once = {"validate_every": NUM_STEPS, "checkpoint_every": NUM_STEPS}
    config = data.config(strategy, steps=NUM_STEPS, learning_rate=_LEARNING_RATE, **once)
    model = build_model(config.model, strategy, seed=config.training.seed)
    connect_text_encoder(model, config.text_encoder)
    source = FeatureSource(config, data.inputs, model.prepare_text)
    source.data_version = _ORDER
    folder.mkdir(parents=True)
    trained = train(config, model, source, folder, lambda total, noun, initial: Progress("golden", total, noun))
    assert trained is not None
    rows = [json.loads(line) for line in trained.metrics.path.read_text().splitlines()]
    return [*(row["loss"] for row in rows), rows[-1]["validation_loss"]]
