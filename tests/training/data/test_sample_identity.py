"""A sample depends only on (checkpoint, prompt, sample index, seed, settings)."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.core.config import ModelRef
from pipelines.runner.outputs import StageOutput
from tests.tiny_models import write_autoencoder
from tests.training.checkpoints import write_checkpoint
from training.config import SamplerConfig, Strategy
from training.sampling.sampler import Sampler, load_sampler

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
WANTED = [("a red dog", 0), ("two", 0), ("a blue house left of a red star on green", 0), ("two", 1), ("a red dog", 5)]
SEED = 11
SETTINGS = SamplerConfig(num_steps=3, guidance_scale=2.0)
STRATEGIES = [Strategy.DEPTH_WISE, Strategy.JOINT, Strategy.FUSE_DIT]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, llm: ModelRef, autoencoder: ModelRef
) -> dict[Strategy, StageOutput]:
    root = tmp_path_factory.mktemp("outputs")
    return {strategy: write_checkpoint(root, strategy, llm, autoencoder) for strategy in STRATEGIES}


@pytest.fixture(scope="module")
def samplers(
    checkpoints: dict[Strategy, StageOutput], llm: ModelRef, autoencoder: ModelRef
) -> dict[Strategy, list[Sampler]]:
    """Two of each, as two processes would have."""
    torch.set_num_threads(1)
    return {
        strategy: [load_sampler(checkpoint, llm, autoencoder) for _ in range(2)]
        for strategy, checkpoint in checkpoints.items()
    }


@pytest.fixture(scope="module")
def alone(samplers: dict[Strategy, list[Sampler]]) -> dict[Strategy, dict[tuple[str, int], Tensor]]:
    return {
        strategy: {
            (prompt, index): each[0].latents([prompt], [index], SEED, SETTINGS)[0].clone() for prompt, index in WANTED
        }
        for strategy, each in samplers.items()
    }


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(len(WANTED))),
    cuts=st.sets(st.integers(1, len(WANTED) - 1)),
    owners=st.lists(st.integers(0, 1), min_size=len(WANTED), max_size=len(WANTED)),
    noise=st.integers(0, 99),
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_order_batches_and_sampler_do_not_matter(
    strategy: Strategy,
    samplers: dict[Strategy, list[Sampler]],
    alone: dict[Strategy, dict[tuple[str, int], Tensor]],
    order: list[int],
    cuts: set[int],
    owners: list[int],
    noise: int,
) -> None:
    torch.manual_seed(noise)
    np.random.seed(noise)
    edges = [0, *sorted(cuts), len(order)]
    for place, (start, end) in enumerate(pairwise(edges)):
        batch = [WANTED[index] for index in order[start:end]]
        prompts, indices = [prompt for prompt, _ in batch], [index for _, index in batch]
        drawn = samplers[strategy][owners[place]].latents(prompts, indices, SEED, SETTINGS)
        for row, which in enumerate(batch):
            torch.testing.assert_close(drawn[row], alone[strategy][which], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_part_of_a_samples_identity_matters(
    strategy: Strategy,
    samplers: dict[Strategy, list[Sampler]],
    alone: dict[Strategy, dict[tuple[str, int], Tensor]],
) -> None:
    sampler, base = samplers[strategy][0], alone[strategy]["two", 0]

    def drawn(prompt: str = "two", index: int = 0, seed: int = SEED, **changes: object) -> Tensor:
        return sampler.latents([prompt], [index], seed, SETTINGS.model_copy(update=changes))[0]

    assert torch.equal(drawn(), base)
    others = {
        "prompt": drawn("a red dog"),
        "sample index": drawn(index=1),
        "seed": drawn(seed=SEED + 1),
        "steps": drawn(num_steps=4),
        "guidance": drawn(guidance_scale=3.0),
        "time shift": drawn(time_shift=3.0),
        "checkpoint": next(alone[other]["two", 0] for other in STRATEGIES if other is not strategy),
    }
    for what, other in others.items():
        assert (other - base).abs().max() > 1e-2, what


_DRAW = """
import sys
from pathlib import Path
import numpy, torch
from pipelines.core.config import ModelRef
from pipelines.runner.outputs import StageOutput
from training.config import SamplerConfig
from training.sampling.sampler import load_sampler

manifest, llm, autoencoder, settings, seed, out, *wanted = sys.argv[1:]
torch.set_num_threads(1)
sampler = load_sampler(
    StageOutput.load(Path(manifest)), ModelRef.model_validate_json(llm), ModelRef.model_validate_json(autoencoder)
)
chosen = [word.rsplit(":", 1) for word in wanted]
images = sampler.generate(
    [prompt for prompt, _ in chosen], [int(index) for _, index in chosen], int(seed),
    SamplerConfig.model_validate_json(settings),
)
numpy.save(out, numpy.stack([numpy.array(image) for image in images]))
"""


def test_the_number_of_processes_does_not_matter(
    checkpoints: dict[Strategy, StageOutput], llm: ModelRef, autoencoder: ModelRef, tmp_path: Path
) -> None:
    checkpoint = checkpoints[Strategy.JOINT]

    def start(name: str, wanted: list[tuple[str, int]]) -> "subprocess.Popen[bytes]":
        models = [model.model_dump_json() for model in (llm, autoencoder)]
        words = [f"{prompt}:{index}" for prompt, index in wanted]
        given = [str(checkpoint.manifest_path), *models, SETTINGS.model_dump_json(), str(SEED)]
        command = [sys.executable, "-c", _DRAW, *given, str(tmp_path / f"{name}.npy"), *words]
        return subprocess.Popen(command, cwd=ROOT)

    processes = [start(str(first), WANTED[first::2]) for first in (0, 1)]
    images = load_sampler(checkpoint, llm, autoencoder).generate(*zip(*WANTED, strict=True), SEED, SETTINGS)
    together = np.stack([np.array(image) for image in images]).astype(int)
    for first, process in enumerate(processes):
        assert process.wait(timeout=400) == 0
        assert np.abs(together[first::2] - np.load(tmp_path / f"{first}.npy").astype(int)).max() <= 1
