"""The demo's autoencoder: the committed weights pass their bar, and training resumes exactly."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from demo import train_autoencoder
from demo.check_autoencoder import MIN_PSNR_DB, MODEL_DIR, describe, measure
from demo.train_autoencoder import (
    AutoencoderTraining,
    Optimizers,
    as_diffusers,
    build_model,
    draw_batch,
    normalise_latents,
    train,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small convolutions gain nothing from threads, and lose much on a busy core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_unseen_scenes_are_reconstructed_and_latents_are_standardised() -> None:
    metrics = measure(num_scenes=4)
    assert metrics.mean_psnr_db >= MIN_PSNR_DB, describe(metrics)
    assert metrics.latent_mean == pytest.approx(0.0, abs=0.25)
    assert metrics.latent_std == pytest.approx(1.0, abs=0.25)


def test_the_committed_model_is_small_and_has_sixteen_channels_at_an_eighth_of_the_size() -> None:
    weights = list(MODEL_DIR.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in weights) <= 8 << 20
    model = AutoencoderKL.from_pretrained(MODEL_DIR, local_files_only=True)
    with torch.inference_mode():
        latents = model.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
    assert latents.shape == (1, 16, 8, 8)


@torch.no_grad()
def test_the_diffusers_form_and_standardised_latents_keep_reconstructions() -> None:
    torch.manual_seed(0)
    model = build_model().eval()
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    expected = model.decode(model.encode(pixels).latent_dist.mode()).sample
    as_diffusers(model)
    torch.testing.assert_close(model.decode(model.encode(pixels).latent_dist.mode()).sample, expected)
    normalise_latents(model, pixels)
    latents = model.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(model.decode(latents).sample, expected, atol=1e-5, rtol=1e-4)
    scaled = (latents - model.config.shift_factor) * model.config.scaling_factor
    torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(16), atol=1e-3, rtol=0.0)
    torch.testing.assert_close(scaled.std(dim=(0, 2, 3)), torch.ones(16), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("name", ["encoder.mid_block.resnets.0.conv2.weight", "post_quant_conv.weight"])
def test_inner_convolutions_get_the_orthogonal_updates_of_muon(name: str) -> None:
    torch.manual_seed(0)
    model = build_model().to(memory_format=torch.channels_last)
    config = AutoencoderTraining(warmup_steps=1)
    optimizers = Optimizers(model, config)
    pixels = torch.rand(1, 3, 32, 32).to(memory_format=torch.channels_last)
    (model(pixels).sample - 1).square().mean().backward()
    weight, outer = model.get_parameter(name), model.get_parameter("encoder.conv_in.weight")
    assert weight.grad is not None
    expected = newton_schulz(weight.grad.flatten(1).double())
    before, outer_before = weight.detach().clone(), outer.detach().clone()
    optimizers.step(0)
    update = (before - weight.detach()).flatten(1).double() / config.learning_rate
    # torch iterates in bfloat16, so small singular values differ.
    assert torch.cosine_similarity(update.flatten(), expected.flatten(), dim=0) > 0.9
    assert update.norm() / expected.norm() == pytest.approx(1.0, abs=0.15)
    first_adam_step = (outer_before - outer.detach()).abs().max()
    torch.testing.assert_close(first_adam_step, torch.tensor(config.adam_learning_rate), rtol=1e-2, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix after five iterations towards orthogonality; Keller Jordan, "Muon", 2024."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_autoencoder, "STATISTICS_SCENES", 2)
    config = AutoencoderTraining(num_steps=4, scenes_per_step=1, crops_per_scene=1, crop_size_px=32)

    def run(name: str) -> bytes:
        folder = tmp_path / name
        train(config, folder / "vae", folder / "work", export_every_steps=10, checkpoint_every_steps=2)
        return (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()

    uninterrupted = run("a")
    with monkeypatch.context() as patch:
        patch.setattr(train_autoencoder, "draw_batch", _draw_until(3))
        with pytest.raises(KeyboardInterrupt):
            run("b")
    assert run("b") == uninterrupted


def _draw_until(last_step: int) -> Callable[[AutoencoderTraining, int], torch.Tensor]:
    def draw(config: AutoencoderTraining, step: int) -> torch.Tensor:
        if step == last_step:
            raise KeyboardInterrupt
        return draw_batch(config, step)

    return draw
