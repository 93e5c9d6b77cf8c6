"""Sampling: text computed once, guidance, and the inputs that an image depends on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.core.errors import ThroughlineError
from tests.tiny_models import write_autoencoder
from tests.training.conftest import TINY_MODEL, TinyData, pad_texts
from tests.training.models.test_dit import built, texts
from training.config import SamplerConfig, Strategy
from training.loop.checkpoint import STAGE
from training.models.backbone import Backbone
from training.models.dit import DiT
from training.models.flow import sampling_noise
from training.models.fusion import shift_gate_time
from training.models.kernels.ragged_texts import Prepared
from training.models.layers import KeysValues
from training.models.saved_model import ConditioningRecord, SavedModel
from training.sampling.sampler import Sampler, load_sampler, sample_latents
from training.sampling.schedule import build_scheduler, euler_step, flow_time
from training.sampling.step_conditioning import TextBatch
from training.sampling.text_over_time import TimeBasis, text_over_time

LENGTHS = {"": 1, "a red dog": 5, "two blue houses": 7, "one": 2}


def _sampler(strategy: Strategy) -> Sampler:
    model = built(strategy)
    record = ConditioningRecord(
        strategy=strategy, text_encoder_id="e", text_encoder_revision="1", template_version="plain-1",
        autoencoder_id="a", autoencoder_revision="1", autoencoder_subfolder=None, scaling_factor=2.0, shift_factor=0.1,
    )  # fmt: skip

    def encode(prompts: object) -> list[Tensor]:
        return [_hidden_states(prompt) for prompt in prompts]  # type: ignore[attr-defined]

    def decode(latents: Tensor) -> np.ndarray:
        pixels = latents[:, :3].permute(0, 2, 3, 1).clamp(-2, 2)
        return ((pixels + 2) * 63).to(torch.uint8).numpy()

    return Sampler(SavedModel(model, TINY_MODEL, record), encode, decode)


def _hidden_states(prompt: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
    return torch.randn(TINY_MODEL.num_text_layers, LENGTHS[prompt], TINY_MODEL.text_width, generator=generator)


def _sample_plainly(model: Backbone, prompt: str, index: int, seed: int, settings: SamplerConfig) -> Tensor:
    """One image without padding, both branches apart, everything computed again at every step."""
    shape = (TINY_MODEL.latent_channels, TINY_MODEL.latent_size, TINY_MODEL.latent_size)
    x_t = sampling_noise(seed, prompt, index, shape)[None]
    scheduler = build_scheduler(settings.num_steps, settings.time_shift)
    texts = {text: pad_texts([model.prepare_text(_hidden_states(text))]) for text in (prompt, "")}
    for timestep in scheduler.timesteps:
        t = flow_time(timestep)[None]
        gate_t = shift_gate_time(t) if settings.gate_shift else t

        def velocity(text: str, x_t: Tensor = x_t, t: Tensor = t, gate_t: Tensor = gate_t) -> Tensor:
            prepared, lengths, _ = texts[text]
            return model.velocity(x_t, t, model.text_keys_values(prepared, gate_t), lengths)

        u, c = velocity(""), velocity(prompt)
        x_t = euler_step(scheduler, x_t, u + settings.guidance_scale * (c - u), timestep)
    return x_t[0]


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 6.0])
def test_cached_sampling_equals_computing_everything_at_every_step(strategy: Strategy, guidance_scale: float) -> None:
    """To 1e-5 of the largest value; small values are sums of large ones and share their rounding."""
    sampler = _sampler(strategy)
    settings = SamplerConfig(num_steps=12, guidance_scale=guidance_scale, gate_shift=strategy.has_time_gate)
    prompts, indices = ["a red dog", "two blue houses", "a red dog"], [0, 0, 3]
    drawn = sampler.latents(prompts, indices, 7, settings)
    for row, (prompt, index) in enumerate(zip(prompts, indices, strict=True)):
        expected = _sample_plainly(sampler.saved.model, prompt, index, 7, settings)
        assert (drawn[row] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("max_values", [0, 2**20], ids=["one time at once", "all times at once"])
@pytest.mark.parametrize("strategy", Strategy)
def test_text_is_computed_once_per_prompt_or_once_per_time(
    strategy: Strategy, max_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.sampling.step_conditioning._MAX_PROJECTED_VALUES", max_values)
    sampler, calls = _sampler(strategy), []
    model = sampler.saved.model
    once = model.text_keys_values

    def counted(prepared: Prepared, t: Tensor, folded: object) -> object:
        calls.append((len(prepared), 1))
        return once(prepared, t, folded)  # type: ignore[arg-type]

    model.text_keys_values = counted  # type: ignore[method-assign, assignment]

    def counted_over_time(model: DiT, prepared: Prepared, bases: list[TimeBasis], folded: object) -> object:
        calls.append((len(prepared), len(bases[0].coefficients)))
        return text_over_time(model, prepared, bases, folded)  # type: ignore[arg-type]

    monkeypatch.setattr("training.sampling.step_conditioning.text_over_time", counted_over_time)
    settings = SamplerConfig(num_steps=3)
    sampler.latents(["a red dog", "one", "a red dog"], [0, 0, 1], 0, settings)
    all_steps = [1] if not strategy.has_time_gate else [3] if max_values else [1, 1, 1]
    # The unconditional text, and two distinct prompts.
    assert sorted(calls) == [(1, steps) for steps in all_steps] + [(2, steps) for steps in all_steps]
    calls.clear()
    sampler.latents(["two blue houses"], [0], 0, settings)
    assert calls == [(1, steps) for steps in all_steps]  # the unconditional text is not computed again


@pytest.mark.parametrize("strategy", [Strategy.UNIFORM, Strategy.JOINT, Strategy.FUSE_DIT])
def test_an_image_does_not_depend_on_batch_or_order(strategy: Strategy) -> None:
    sampler = _sampler(strategy)
    prompts, indices = ["a red dog", "one", "two blue houses", "one"], [0, 0, 0, 1]
    results = {}
    for batch_size in (1, 3, 4):
        settings = SamplerConfig(num_steps=2, guidance_scale=2.0, batch_size=batch_size)
        images = sampler.generate(prompts, indices, 3, settings)
        turned = sampler.generate(prompts[::-1], indices[::-1], 3, settings)[::-1]
        results[batch_size] = [np.array(image).astype(int) for image in images]
        for image, other in zip(images, turned, strict=True):
            assert np.abs(np.array(image).astype(int) - np.array(other).astype(int)).max() <= 1
    for images in results.values():
        for image, other in zip(images, results[1], strict=True):
            assert np.abs(image - other).max() <= 1
    assert np.abs(results[1][1] - results[1][3]).max() > 1  # the sample index matters


def test_eq_11_moves_samples_of_time_gates_and_is_refused_elsewhere() -> None:
    sampler = _sampler(Strategy.TIME_WISE)
    drawn = [
        sampler.latents(["one"], [0], 0, SamplerConfig(num_steps=3, gate_shift=gate_shift))
        for gate_shift in (False, True)
    ]
    assert not torch.equal(*drawn)
    with pytest.raises(ValueError, match="uniform: the shift of Eq"):
        _sampler(Strategy.UNIFORM).generate(["one"], [0], 0, SamplerConfig(gate_shift=True))


def test_steps_are_reported() -> None:
    seen: list[tuple[int, int]] = []
    sampler = _sampler(Strategy.UNIFORM)
    sampler.generate(["one"], [0], 0, SamplerConfig(num_steps=3), lambda index, total, x: seen.append((index, total)))
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_prompts_without_index_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 sample indices"):
        _sampler(Strategy.UNIFORM).generate(["one", "one"], [0], 0, SamplerConfig())


def test_unguided_sampling_omits_the_unconditional_branch() -> None:
    model, rows = built(Strategy.UNIFORM), []
    original = model.velocity

    def counted(x_t: Tensor, t: Tensor, text: list[KeysValues], *rest: Tensor | None) -> Tensor:
        velocity = original(x_t, t, text, *rest)  # type: ignore[arg-type]
        rows.append((len(x_t), len(text[0][0]), len(velocity)))
        return velocity

    model.velocity = counted  # type: ignore[method-assign, assignment]
    prepared = TextBatch.of(texts(model, 3), torch.device("cpu"))
    noise = torch.randn(2, 4, 8, 8)
    for guidance_scale in (1.0, 2.0):
        settings = SamplerConfig(num_steps=1, guidance_scale=guidance_scale)
        sample_latents(model, prepared, prepared, torch.zeros(2, dtype=torch.long), noise, settings)
    assert rows == [(2, 2, 2), (2, 4, 4)]


def test_a_trained_checkpoint_samples_images(tiny_data: TinyData, tmp_path: Path) -> None:
    autoencoder = write_autoencoder(tmp_path / "vae").model_copy(update={"revision": "1"})
    for strategy in (Strategy.DEPTH_WISE, Strategy.FUSE_DIT):
        config = tiny_data.config(strategy, steps=3, warmup_steps=0)
        checkpoint = STAGE.run(config, tiny_data.inputs, tmp_path / "out", strategy.value)
        sampler = load_sampler(checkpoint, tiny_data.llm, autoencoder)
        images = sampler.generate(["a red dog", "a blue house"], [0, 0], 0, SamplerConfig(num_steps=2))
        assert [image.size for image in images] == [(32, 32)] * 2
        assert np.array(images[0]).std() > 0
        with pytest.raises(ThroughlineError, match="trained with tiny-llama at"):
            load_sampler(checkpoint, tiny_data.llm.model_copy(update={"revision": "2"}), autoencoder)
        with pytest.raises(ThroughlineError, match="trained on latents of tiny-vae at 1, given tiny-vae at 2"):
            load_sampler(checkpoint, tiny_data.llm, autoencoder.model_copy(update={"revision": "2"}))
