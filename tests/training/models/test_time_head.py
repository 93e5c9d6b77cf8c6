"""Gates that follow a time estimated from the latents."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.runner.outputs import StageOutput
from tests.training.conftest import TINY_MODEL, TinyData, pad_texts
from tests.training.models.test_dit import built, latents, texts
from training.config import CheckpointConfig, ModelConfig, SamplerConfig, Strategy
from training.cost.params import count_parameters
from training.data.feature_source import VALIDATION, Batch, LatentReader, Split, read_splits
from training.loop.checkpoint import STAGE
from training.loop.loop import batch_losses
from training.models.build import build_model
from training.models.dit import DiT
from training.models.flow import interpolate, sample_losses, validation_noise, velocity_target
from training.models.fusion import shift_gate_time
from training.models.layers import initialise
from training.models.saved_model import load_model
from training.models.time_head import TimeHead, time_losses
from training.sampling.sampler import sample_latents
from training.sampling.schedule import build_scheduler, euler_step, flow_time
from training.sampling.step_conditioning import TextBatch

ESTIMATED = TINY_MODEL.model_copy(update={"gate_signal": "estimated"})
GATED = [strategy for strategy in Strategy if strategy.has_time_gate]


def _estimating(strategy: Strategy) -> DiT:
    model = built(strategy, ESTIMATED)
    assert isinstance(model, DiT)
    return model


def _batch(model: DiT) -> Batch:
    data, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    prepared, lengths, mask = pad_texts(texts(model, 3, 6))
    return Batch(torch.arange(2), data, noise, torch.tensor([0.2, 0.7]), prepared, lengths, mask)


@pytest.mark.parametrize("strategy", [s for s in Strategy if not s.has_time_gate])
def test_an_estimated_time_is_refused_without_a_gate(strategy: Strategy, tiny_data: TinyData) -> None:
    with pytest.raises(ValueError, match=f"{strategy}: gate_signal = estimated needs a time gate"):
        build_model(ESTIMATED, strategy, seed=None)
    values = tiny_data.config(strategy).model_dump()
    with pytest.raises(ValueError, match="needs a time gate"):
        CheckpointConfig.model_validate({**values, "model": ESTIMATED.model_dump()})


def test_the_head_adds_few_parameters_and_none_without_it() -> None:
    wide = ESTIMATED.model_copy(update={"latent_channels": 16})
    plain = wide.model_copy(update={"gate_signal": "nominal"})
    for strategy in GATED:
        assert count_parameters(wide, strategy) - count_parameters(plain, strategy) == 5 * 16 * 32 + 32 + 32 + 1


def test_the_head_learns_the_time_of_smooth_latents_in_noise() -> None:
    head = TimeHead(4)
    initialise(head, 0)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)

    def sample(batch: int) -> tuple[Tensor, Tensor]:
        data = torch.randn(batch, 4, 1, 1, generator=generator).expand(-1, -1, 8, 8)
        t = torch.rand(batch, generator=generator)
        return interpolate(torch.randn(data.shape, generator=generator), data, t), t

    for _ in range(200):
        x_t, t = sample(64)
        time_losses(head(x_t), t).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x_t, t = sample(512)
    assert (head(x_t).sigmoid() - t).abs().mean() < 0.05


def test_time_losses_are_zero_at_the_truth_and_finite_at_the_ends() -> None:
    t = torch.tensor([0.1, 0.5, 0.99])
    torch.testing.assert_close(time_losses(t.logit(), t), torch.zeros(3), atol=1e-6, rtol=0)
    assert (time_losses(t.logit() + 1, t) > 0.001).all()
    assert time_losses(torch.zeros(2), torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("strategy", GATED)
def test_the_gate_sees_the_estimate_and_not_the_given_time(strategy: Strategy) -> None:
    model = _estimating(strategy)
    text = pad_texts(texts(model, 4))
    first, second = (model(latents(1), torch.tensor([time]), *text) for time in (0.1, 0.9))
    torch.testing.assert_close(first, second)
    velocity, logits = first
    nominal = built(strategy)
    nominal.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("time_head.")})
    torch.testing.assert_close(velocity, nominal(latents(1), logits.sigmoid(), *text))


@pytest.mark.parametrize("strategy", GATED)
def test_each_loss_reaches_only_its_own_parameters(strategy: Strategy) -> None:
    model = _estimating(strategy).requires_grad_(True)
    batch = _batch(model)
    x_t = interpolate(batch.noise, batch.latents, batch.t)
    velocity, logits = model(x_t, batch.t, batch.prepared, batch.lengths, batch.text_mask)
    flow = sample_losses(velocity, velocity_target(batch.noise, batch.latents))
    of_head = time_losses(logits, batch.t)
    names, parameters = zip(*model.named_parameters(), strict=True)
    from_flow = torch.autograd.grad(flow.mean(), parameters, retain_graph=True, allow_unused=True)
    from_head = torch.autograd.grad(of_head.mean(), parameters, retain_graph=True, allow_unused=True)
    for name, a, b in zip(names, from_flow, from_head, strict=True):
        assert (a is None) == name.startswith("time_head.")
        assert (b is None) != name.startswith("time_head.")
    losses, seen_of_head = batch_losses(model, batch)
    assert seen_of_head is not None
    assert torch.equal(losses, flow)
    torch.testing.assert_close(seen_of_head, of_head.detach())
    both = torch.autograd.grad(losses.mean(), parameters)
    for a, b, together in zip(from_flow, from_head, both, strict=True):
        torch.testing.assert_close(together, a if b is None else b)


@pytest.mark.parametrize("gate_shift", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("strategy", GATED)
def test_sampling_estimates_the_time_of_each_image_for_both_branches(
    strategy: Strategy, guidance_scale: float, gate_shift: bool
) -> None:
    model = _estimating(strategy)
    settings = SamplerConfig(num_steps=3, guidance_scale=guidance_scale, gate_shift=gate_shift)
    prompts, without = texts(model, 3, 5), texts(model, 2)
    noise = (
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(6))
        * torch.tensor([1, 0.3, 2])[:, None, None, None]
    )
    prompt_of = torch.tensor([0, 1, 0])
    drawn = sample_latents(
        model,
        TextBatch.of(prompts, torch.device("cpu")),
        TextBatch.of(without, torch.device("cpu")),
        prompt_of,
        noise,
        settings,
    )
    assert model.time_head is not None
    for row, place in enumerate(prompt_of.tolist()):
        x_t = noise[row : row + 1]
        scheduler = build_scheduler(3, 1.0)
        for timestep in scheduler.timesteps:
            gate_t = model.time_head(x_t).sigmoid()
            gate_t = shift_gate_time(gate_t) if gate_shift else gate_t
            u, c = (
                model.velocity(x_t, flow_time(timestep)[None], model.text_keys_values(prepared, gate_t), lengths)
                for prepared, lengths, _ in (pad_texts(without), pad_texts(prompts[place : place + 1]))
            )
            x_t = euler_step(scheduler, x_t, u + guidance_scale * (c - u), timestep)
        torch.testing.assert_close(drawn[row : row + 1], x_t, atol=1e-5, rtol=1e-4)


def _checkpoint(tiny_data: TinyData, root: Path, model: ModelConfig) -> StageOutput:
    config = tiny_data.config(Strategy.JOINT, steps=2, warmup_steps=0).model_copy(update={"model": model})
    return STAGE.run(config, tiny_data.inputs, root, "joint")


def _held_out(tiny_data: TinyData) -> tuple[LatentReader, Split]:
    split = read_splits(tiny_data.inputs["dataset"][0])[VALIDATION]
    return LatentReader(tiny_data.inputs["latents"], split), split


def _rows(checkpoint: StageOutput) -> list[dict[str, float]]:
    return [json.loads(line) for line in checkpoint.path("metrics.jsonl").read_text().splitlines()]


def test_a_checkpoint_with_the_head_trains_and_logs_its_loss(tiny_data: TinyData, tmp_path: Path) -> None:
    assert all(row["time_head_loss"] > 0 for row in _rows(_checkpoint(tiny_data, tmp_path, ESTIMATED)))
    plain = _checkpoint(tiny_data, tmp_path, TINY_MODEL)
    assert not any("time_head" in name for row in _rows(plain) for name in row)
    assert not any("time_head" in name for name in plain.manifest.summary)


def test_the_heads_loss_on_held_out_samples_is_that_of_the_saved_average(tiny_data: TinyData, tmp_path: Path) -> None:
    checkpoint = _checkpoint(tiny_data, tmp_path, ESTIMATED)
    logged = [row.get("validation_time_head_loss") for row in _rows(checkpoint)]
    assert logged[0] is None
    assert checkpoint.manifest.summary["validation_time_head_loss"] == logged[-1]
    model = load_model(checkpoint).model
    assert isinstance(model, DiT) and model.time_head is not None
    reader, split = _held_out(tiny_data)
    times = (torch.arange(4) + 0.5) / 4
    losses = []
    for index, t in enumerate(times):
        data = torch.from_numpy(reader.read(index, None))[None]
        noise = torch.from_numpy(validation_noise(split.key(index), reader.shape))[None]
        losses.append(time_losses(model.time_head(interpolate(noise, data, t[None])), t[None]))
    assert logged[-1] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
