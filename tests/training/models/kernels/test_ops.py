"""Plain and fast operations give the same losses, gradients, updated weights and images, for every strategy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.core.environment import KERNELS, KernelForm, kernel_form
from tests.training.conftest import TINY_MODEL, TINY_TRAINING, pad_texts
from tests.training.models.test_dit import built, latents, texts
from training.config import SamplerConfig, Strategy
from training.data.feature_source import Batch
from training.loop.loop import batch_losses
from training.loop.run_state import build_optimizer
from training.models.backbone import Backbone
from training.models.kernels import cpu, ops
from training.sampling.sampler import sample_latents
from training.sampling.step_conditioning import TextBatch

LENGTHS = (3, 20, 9)
"""Long enough that the fast form folds the text projection of blocks with their own conditioning."""


@pytest.fixture(autouse=True)
def _onednn_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call oneDNN on processors without AVX-512 too: it works there, it is only no faster."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def _both(compute: Callable[[], Any]) -> tuple[Any, Any]:
    results = []
    forms: tuple[KernelForm, KernelForm] = ("plain", "fast")
    for form in forms:
        with ops.use(form):
            results.append(compute())
    return results[0], results[1]


def _batch(model: Backbone, *, stacked: bool) -> Batch:
    data, noise = torch.randn(2, len(LENGTHS), 4, 8, 8, generator=torch.Generator().manual_seed(4))
    prepared = texts(model, *LENGTHS)
    stack, lengths, mask = pad_texts(prepared)
    t = torch.tensor([0.2, 0.7, 0.9])
    return Batch(torch.arange(3), data, noise, t, stack if stacked else tuple(prepared), lengths, mask)


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize("timestep_conditioning", ["none", "adaln"])
@pytest.mark.parametrize("strategy", Strategy)
def test_a_training_step_is_the_same(strategy: Strategy, timestep_conditioning: str, stacked: bool) -> None:
    config = TINY_MODEL.model_copy(update={"timestep_conditioning": timestep_conditioning})

    def step() -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        model = built(strategy, config).requires_grad_(True).train()
        optimizer = build_optimizer(model, TINY_TRAINING)
        losses, _ = batch_losses(model, _batch(model, stacked=stacked))
        losses.mean().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), TINY_TRAINING.gradient_clip)
        optimizer.step()
        return losses.detach(), {name: grad.clone() for name, grad in gradients.items()}, model.state_dict()

    (plain, plain_grads, plain_weights), (fast, fast_grads, fast_weights) = _both(step)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=0)
    assert list(fast_grads) == list(plain_grads)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(
            fast_grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()) + 1e-9, msg=name
        )
    for name, weight in plain_weights.items():
        # AdamW's first update has the size of the learning rate, whatever the gradient: a rounded zero may move so far.
        distance = (fast_weights[name] - weight).abs()
        assert distance.mean() < 0.02 * TINY_TRAINING.learning_rate, name


SAMPLED = [(strategy, "nominal") for strategy in Strategy]
SAMPLED += [(strategy, "estimated") for strategy in Strategy if strategy.has_time_gate]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(("strategy", "gate_signal"), SAMPLED)
def test_sampled_latents_are_the_same(strategy: Strategy, gate_signal: str, guidance_scale: float) -> None:
    model = built(strategy, TINY_MODEL.model_copy(update={"gate_signal": gate_signal}))
    settings = SamplerConfig(num_steps=4, guidance_scale=guidance_scale)

    def sample() -> Tensor:
        prompts, unconditional = texts(model, *LENGTHS), texts(model, 1)
        batches = [TextBatch.of(some, torch.device("cpu")) for some in (prompts, unconditional)]
        with torch.no_grad():
            return sample_latents(model, *batches, torch.arange(3), latents(3), settings)

    plain, fast = _both(sample)
    assert (fast - plain).abs().max() <= 2e-5 * plain.abs().max()


def test_the_switch_turns_every_fast_operation_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a fast operation was called")

    for name in ("onednn_linear", "rms_norm", "sum_layers", "packed_silu_gated", "packed_weights", "pack_constants"):
        monkeypatch.setattr(cpu, name, refuse)
    model = built(Strategy.JOINT).requires_grad_(True)
    prompts, settings = TextBatch.of(texts(model, 3), torch.device("cpu")), SamplerConfig(num_steps=2)
    with ops.use("plain"):
        batch_losses(model, _batch(model, stacked=False))[0].mean().backward()
        sample_latents(model, prompts, prompts, torch.arange(1), latents(1), settings)
        assert not ops.folding_pays(1, 100)
    with pytest.raises(AssertionError, match="a fast operation was called"):
        batch_losses(model, _batch(model, stacked=False))


def test_the_environment_chooses_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNELS, raising=False)
    assert kernel_form() == "fast"
    monkeypatch.setenv(KERNELS, "plain")
    assert kernel_form() == "plain"
    monkeypatch.setenv(KERNELS, "slow")
    with pytest.raises(ValueError, match="THROUGHLINE_KERNELS is 'slow'; set it to fast or plain"):
        kernel_form()
