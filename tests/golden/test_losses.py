"""Training reproduces the recorded losses."""

import json
from pathlib import Path

import pytest

from tests.golden.losses import GOLDEN, NUM_STEPS, losses_of
from tests.training.conftest import TinyData
from training.config import Strategy

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
"""Relative. Measured: kernels for a CPU without AVX change the losses by at most 7e-6, a learning rate 0.1 % higher by
4e-4, static weights that don't learn by 4e-4."""


@pytest.mark.parametrize("strategy", list(Strategy))
def test_losses_are_those_recorded(strategy: Strategy, tiny_data: TinyData, tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())[strategy.value]
    assert len(expected) == NUM_STEPS + 1
    found = losses_of(strategy, tiny_data, tmp_path / "run")
    assert found == pytest.approx(expected, rel=TOLERANCE), "numerics changed; if intended: python -m tests.golden"
