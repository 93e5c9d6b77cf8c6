"""Operation counts agree with the published figures and with torch's counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.training.conftest import TINY_MODEL
from training.config import ModelConfig, Strategy
from training.cost.flops import KNOWN_TEXT_ENCODERS, TextEncoderShape, count_flops
from training.models.build import build_model
from training.models.dit import DiT
from training.sampling.text_over_time import text_over_time, time_bases

QWEN = KNOWN_TEXT_ENCODERS["Qwen/Qwen3-VL-4B-Instruct"]


def _tera(strategy: Strategy, size_px: int, *, cached: bool) -> float:
    flops = count_flops(ModelConfig(), strategy, QWEN, latent_size=size_px // 8, cached=cached)
    return round(flops.total / 1e12, 2)


def test_figures_of_table_4() -> None:
    found = {strategy: _tera(strategy, 512, cached=False) for strategy in Strategy}
    assert found == {
        Strategy.PENULTIMATE: 453.98,
        Strategy.UNIFORM: 453.98,
        Strategy.STATIC: 453.99,
        Strategy.TIME_WISE: 453.99,
        Strategy.DEPTH_WISE: 469.64,
        Strategy.JOINT: 469.65,
        Strategy.FUSE_DIT: 356.72,
    }
    assert QWEN.flops(1024) == pytest.approx(7.44e12, rel=1e-3)


def test_figures_at_256_px() -> None:
    rounded = {strategy: round(_tera(strategy, 256, cached=False), 1) for strategy in Strategy}
    assert {rounded[s] for s in (Strategy.PENULTIMATE, Strategy.UNIFORM)} == {129.2}
    assert {rounded[s] for s in (Strategy.DEPTH_WISE, Strategy.JOINT)} == {144.9}
    assert rounded[Strategy.FUSE_DIT] == 93.8


def test_caching_makes_depth_wise_cheaper_than_the_uncached_baseline() -> None:
    assert _tera(Strategy.DEPTH_WISE, 512, cached=True) == 438.85
    assert _tera(Strategy.PENULTIMATE, 512, cached=True) == 438.54
    # A time gate's text is computed for each direction of its weights, not for each of 50 steps.
    assert _tera(Strategy.JOINT, 512, cached=True) < 1.01 * _tera(Strategy.DEPTH_WISE, 512, cached=True)


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("timestep_conditioning", ["none", "adaln"])
def test_formulae_agree_with_torchs_counter(strategy: Strategy, timestep_conditioning: str) -> None:
    config = TINY_MODEL.model_copy(update={"timestep_conditioning": timestep_conditioning})
    model = build_model(config, strategy)
    branches, tokens, latent_size = 2, 5, 12
    if strategy is Strategy.FUSE_DIT:
        prepared = torch.zeros(2 * config.num_blocks, branches, tokens, config.num_kv_heads * config.head_dim)
    else:
        one = model.prepare_text(torch.zeros(config.num_text_layers, tokens, config.text_width))
        prepared = torch.stack([one] * branches, dim=1)
    t = torch.full((branches,), 0.5)
    expected = count_flops(
        config, strategy, None, latent_size=latent_size, cached=False, num_steps=1, num_text_tokens=tokens
    )
    # The plain attention, because the counter has no formula for the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as text_counter:
        text = model.text_keys_values(prepared, t)
    assert text_counter.get_total_flops() == expected.total - expected.backbone
    latents = torch.zeros(branches, config.latent_channels, latent_size, latent_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as image_counter:
        model.velocity(latents, t, text, torch.full((branches,), tokens))
    assert image_counter.get_total_flops() == expected.backbone + expected.attention
    cached = count_flops(
        config, strategy, None, latent_size=latent_size, cached=True, num_steps=1, num_text_tokens=tokens
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as guided_counter:
        model.velocity(latents[:1], t[:1], text, torch.full((branches,), tokens))
    assert guided_counter.get_total_flops() == cached.backbone + cached.attention


@pytest.mark.parametrize("strategy", [Strategy.TIME_WISE, Strategy.JOINT])
@torch.no_grad()
def test_text_over_time_agrees_with_its_formula(strategy: Strategy) -> None:
    tokens, num_steps = 5, 20
    config = TINY_MODEL.model_copy(update={"num_text_layers": 12})
    model = build_model(config, strategy)
    assert isinstance(model, DiT)
    assert model.fusion.gate is not None
    # All gates alike, so that all have as many directions.
    model.fusion.gate.weight_out += torch.randn(model.fusion.gate.weight_out.shape[1:])
    text = model.prepare_text(torch.zeros(config.num_text_layers, tokens, config.text_width))
    with FlopCounterMode(display=False) as counter:
        bases = time_bases(model.fusion, torch.linspace(0, 1, num_steps))
        text_over_time(model, (text, text), bases, model.fold_text_projection())
    (num_directions,) = {len(basis.directions) for basis in bases}
    assert 1 < num_directions < config.num_text_layers
    expected = count_flops(
        config, strategy, None, latent_size=12, cached=True,
        num_steps=num_steps, num_text_tokens=tokens, num_directions=num_directions,
    )  # fmt: skip
    assert counter.get_total_flops() == expected.total - expected.backbone


def test_fuse_dit_stops_the_encoder_at_its_last_shared_layer_as_released() -> None:
    shape = TextEncoderShape(num_layers=8, hidden_size=4, query_width=4, key_value_width=2, mlp_width=8)
    sizes = {"latent_size": 8, "num_text_tokens": 3, "num_steps": 2}
    released = count_flops(TINY_MODEL, Strategy.FUSE_DIT, shape, cached=False, **sizes)  # type: ignore[arg-type]
    ours = count_flops(TINY_MODEL, Strategy.FUSE_DIT, shape, cached=True, **sizes)  # type: ignore[arg-type]
    assert released.text_encoder == shape.flops(6, TINY_MODEL.shared_layers[-1] + 1) == ours.text_encoder // 2
    assert (released.text_keys_values, ours.text_keys_values > 0) == (0, True)


def test_latents_not_divisible_by_the_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="latents of 7 are not divisible by the patch size 2"):
        count_flops(TINY_MODEL, Strategy.UNIFORM, None, latent_size=7, cached=True)
