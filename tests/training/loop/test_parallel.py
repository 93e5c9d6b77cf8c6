"""Parallelism in training: same gradients, same parameters, fp32 weights, moments and average."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from pipelines.core.errors import ThroughlineError
from tests.training.conftest import TINY_TRAINING, TinyData
from tests.training.loop.test_checkpoint import flat, metrics, run
from tests.training.models.test_dit import built
from training.config import Strategy
from training.data.feature_source import FeatureSource
from training.loop.loop import train_step
from training.loop.parallel import parallelize
from training.loop.run_state import TrainingRun
from training.models.backbone import Backbone


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def _gradients(model: Backbone) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.2, 0.7])
    prepared = torch.stack([model.prepare_text(torch.randn(4, 5, 48, generator=generator)) for _ in t], dim=1)
    model(latents, t, prepared, torch.tensor([5, 5])).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return gradients  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", [Strategy.JOINT, Strategy.FUSE_DIT])
def test_recomputed_activations_give_the_same_gradients(strategy: Strategy) -> None:
    plain, recomputing = (built(strategy).requires_grad_(True) for _ in range(2))
    training = TINY_TRAINING.model_copy(update={"checkpoint_activations": True})
    calls: list[int] = []
    parallelize(recomputing, training, torch.device("cpu"), 1)
    recomputing.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    one, two = _gradients(plain), _gradients(recomputing)
    assert len(calls) == 2  # forward, and again in backward
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bfloat16_computes_over_float32_weights_moments_and_average(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_data.config(Strategy.STATIC, precision="bfloat16")
    model = built(Strategy.STATIC).requires_grad_(True)
    source = FeatureSource(config, tiny_data.inputs, model.prepare_text)
    state = TrainingRun(config, model, source, tmp_path, Accelerator(cpu=True, mixed_precision="bf16"))
    computed: list[torch.dtype] = []
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    train_step(state, 0)
    assert set(computed) == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {average.dtype for average in state.ema.values()} == {torch.float32}
    moments = [value for values in state.optimizer.optimizer.state.values() for value in values.values()]
    assert len(moments) == 3 * len(state.ema)
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_sharding_one_process_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(ThroughlineError, match="sharded training needs several processes"):
        run(tiny_data, tmp_path, sharded=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_give_the_losses_of_plain_ones(tiny_data: TinyData, tmp_path: Path) -> None:
    settings = {"steps": 3, "checkpoint_activations": True}
    plain = run(tiny_data, tmp_path / "plain", Strategy.JOINT, **settings)
    compiled = run(tiny_data, tmp_path / "compiled", Strategy.JOINT, compile=True, **settings)
    for a, b in zip(metrics(plain), metrics(compiled), strict=True):
        assert flat(a) == pytest.approx(flat(b), rel=1e-3)
