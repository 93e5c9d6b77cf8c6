"""Models and finished upstream outputs shared by the evaluation tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.core.config import ModelRef
from pipelines.runner.outputs import StageOutput
from tests.evaluation.worlds import (
    ScriptedPool,
    plausible_answer,
    use_judge,
    write_checkpoint,
    write_data,
    write_prompt_sets,
)
from tests.tiny_models import write_autoencoder, write_causal_lm
from training.config import Strategy


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_causal_lm(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output root with data, prompts and checkpoints; tests may add to it but change nothing."""
    return tmp_path_factory.mktemp("upstream")


@pytest.fixture(scope="session")
def dataset(upstream: Path) -> StageOutput:
    return write_data(upstream)[1]


@pytest.fixture(scope="session")
def prompts(upstream: Path) -> StageOutput:
    return write_prompt_sets(upstream)


@pytest.fixture(scope="session")
def checkpoints(
    upstream: Path, dataset: StageOutput, encoder: ModelRef, autoencoder: ModelRef
) -> dict[Strategy, StageOutput]:
    inputs = {"dataset": [dataset]}
    models = {"text_encoder": encoder, "autoencoder": autoencoder}
    return {strategy: write_checkpoint(upstream, strategy, inputs, **models) for strategy in Strategy}


@pytest.fixture
def pool() -> Iterator[ScriptedPool]:
    """A judge with plausible answers; a test may replace its `_answer`."""
    with use_judge(ScriptedPool(plausible_answer)) as judge:
        yield judge
