"""Rewrites losses.json: ``python -m tests.golden``."""

import json
import tempfile
from pathlib import Path

from tests.golden.losses import GOLDEN, losses_of
from tests.tiny_models import write_causal_lm
from tests.training.conftest import NUM_LAYERS, write_tiny_data
from training.config import Strategy

with tempfile.TemporaryDirectory() as name:
    root = Path(name)
    data = write_tiny_data(root / "inputs", write_causal_lm(root / "llm", num_layers=NUM_LAYERS))
    found = {strategy.value: losses_of(strategy, data, root / strategy.value) for strategy in Strategy}
rows = ",\n".join(
    f' "{name}": {json.dumps([float(f"{loss:.8g}") for loss in losses])}' for name, losses in found.items()
)
GOLDEN.write_text("{\n" + rows + "\n}\n")
