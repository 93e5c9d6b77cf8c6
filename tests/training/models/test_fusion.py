"""Every strategy against its equation, computed here in float64 from the paper's formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.config import ModelConfig, Strategy
from training.models.build import build_model
from training.models.dit import DiT
from training.models.fusion import Fusion, normalise, shift_gate_time
from training.models.kernels.ragged_texts import stack_texts
from training.models.layers import initialise

L, D = 5, 3
FUSIONS = tuple(strategy for strategy in Strategy if strategy is not Strategy.FUSE_DIT)


def _fusion(strategy: Strategy, *, seed: int | None = None, num_layers: int = L) -> Fusion:
    """A fusion at its starting values, or with learned parts moved away from them."""
    fusion = Fusion(strategy, num_layers, D, gate_width=16)
    initialise(fusion, 0)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in fusion.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return fusion


def _hidden_states(seed: int = 0, batch: int = 2, tokens: int = 4, channels: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 5.0, 0.2, 30.0, 2.0])[:L, None, None, None]
    return torch.randn(L, batch, tokens, channels, generator=generator) * scale + 0.5


def _reference(fusion: Fusion, hidden_states: Tensor, t: Tensor, block: int) -> Tensor:
    """Eq. 2, 3, 4 to 10 and 12 in float64."""
    h = hidden_states.double()
    centred = h - h.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if fusion.strategy is Strategy.PENULTIMATE:
        return normed[-2]
    if fusion.strategy is Strategy.UNIFORM:
        return normed.sum(0) / L
    if fusion.logits is not None:
        row = block if fusion.strategy is Strategy.DEPTH_WISE else 0
        z = fusion.logits[row].double()[None].expand(len(t), -1)
    else:
        gate = fusion.gate
        assert gate is not None
        row = block if fusion.strategy is Strategy.JOINT else 0
        half = 64
        angles = t.double()[:, None] * torch.tensor([10_000.0 ** (-i / half) for i in range(half)]).double()
        phi = torch.cat([angles.cos(), angles.sin()], dim=1)
        inner = phi @ gate.weight_in[row].double() + gate.bias_in[row].double()
        z = (inner / (1 + (-inner).exp())) @ gate.weight_out[row].double() + gate.bias_out[row].double()
    e = (z - z.max(1, keepdim=True).values).exp()
    alpha = e / e.sum(1, keepdim=True)
    return sum(alpha[:, layer, None, None] * normed[layer] for layer in range(L))  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", FUSIONS)
def test_fusion_equals_its_equation(strategy: Strategy) -> None:
    fusion, hidden_states, t = _fusion(strategy, seed=1), _hidden_states(), torch.tensor([0.05, 0.8])
    at_once = fusion.fuse(fusion.prepare(hidden_states), t)
    for block in range(D):
        expected = _reference(fusion, hidden_states, t, block)
        torch.testing.assert_close(fusion(hidden_states, t, block).double(), expected, atol=2e-5, rtol=2e-5)
        variant = at_once[block if fusion.num_variants > 1 else 0]
        torch.testing.assert_close(variant.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("strategy", FUSIONS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), t=st.lists(st.floats(0, 1), min_size=1, max_size=4), block=st.integers(0, D - 1))
def test_weights_sum_to_one(strategy: Strategy, seed: int, t: list[float], block: int) -> None:
    weights = _fusion(strategy, seed=seed).weights(torch.tensor(t), block)
    assert weights.shape == (len(t), L)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(t)))


@pytest.mark.parametrize("strategy", [s for s in FUSIONS if s is not Strategy.PENULTIMATE])
def test_weights_start_uniform(strategy: Strategy) -> None:
    fusion = _fusion(strategy)
    for block in range(D):
        torch.testing.assert_close(fusion.weights(torch.rand(3), block), torch.full((3, L), 1 / L))


@pytest.mark.parametrize("strategy", [s for s in FUSIONS if s.has_time_gate])
def test_gate_still_starts_at_zero_in_a_built_model(strategy: Strategy) -> None:
    config = ModelConfig(
        hidden_size=16, num_blocks=D, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16, latent_channels=4,
        latent_size=4, text_width=6, num_text_layers=L,
    )  # fmt: skip
    model = build_model(config, strategy, seed=3)
    assert isinstance(model, DiT)
    assert model.fusion.gate is not None
    assert not model.fusion.gate.weight_out.any()
    assert not model.fusion.gate.bias_out.any()
    assert model.fusion.gate.weight_in.any()
    assert not model.patch_out.weight.any()
    torch.testing.assert_close(model.fusion.weights(torch.rand(2), D - 1), torch.full((2, L), 1 / L))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_uniform_is_the_mean_of_normalised_layers(seed: int) -> None:
    hidden_states = _hidden_states(seed)
    fused = _fusion(Strategy.UNIFORM)(hidden_states, torch.zeros(2), 0)
    torch.testing.assert_close(fused, normalise(hidden_states).mean(0))


def test_penultimate_is_the_layer_before_the_last_normalised() -> None:
    hidden_states = _hidden_states()
    torch.testing.assert_close(
        _fusion(Strategy.PENULTIMATE)(hidden_states, torch.zeros(2), 1), normalise(hidden_states[-2])
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), block=st.integers(0, D - 1))
def test_static_equals_depth_wise_with_equal_logits(seed: int, block: int) -> None:
    static, depth_wise = _fusion(Strategy.STATIC, seed=seed), _fusion(Strategy.DEPTH_WISE)
    assert static.logits is not None
    assert depth_wise.logits is not None
    depth_wise.logits.data.copy_(static.logits.data.expand(D, -1))
    hidden_states, t = _hidden_states(seed), torch.rand(2)
    torch.testing.assert_close(static(hidden_states, t, block), depth_wise(hidden_states, t, block))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), block=st.integers(0, D - 1))
def test_joint_with_constant_gates_equals_depth_wise(seed: int, block: int) -> None:
    joint, depth_wise = _fusion(Strategy.JOINT), _fusion(Strategy.DEPTH_WISE, seed=seed)
    assert joint.gate is not None
    assert depth_wise.logits is not None
    joint.gate.bias_out.data[:, 0] = depth_wise.logits.data
    hidden_states, t = _hidden_states(seed), torch.rand(2)
    torch.testing.assert_close(joint(hidden_states, t, block), depth_wise(hidden_states, t, block))


def test_joint_with_equal_gates_equals_time_wise() -> None:
    joint, time_wise = _fusion(Strategy.JOINT), _fusion(Strategy.TIME_WISE, seed=4)
    joint.load_state_dict({name: value.expand(D, *value.shape[1:]) for name, value in time_wise.state_dict().items()})
    hidden_states, t = _hidden_states(), torch.rand(2)
    torch.testing.assert_close(joint(hidden_states, t, 2), time_wise(hidden_states, t, 2))


@pytest.mark.parametrize("strategy", [s for s in FUSIONS if s not in (Strategy.PENULTIMATE, Strategy.UNIFORM)])
def test_gradients_reach_everything_that_is_learned(strategy: Strategy) -> None:
    fusion, hidden_states = _fusion(strategy, seed=2), _hidden_states()
    t = torch.tensor([0.1, 0.7])
    sum(fusion(hidden_states, t, block).square().sum() for block in range(D)).backward()  # type: ignore[union-attr]
    for name, parameter in fusion.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name


@pytest.mark.parametrize("strategy", FUSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_finite_in_every_precision(strategy: Strategy, dtype: torch.dtype) -> None:
    fusion, hidden_states = _fusion(strategy, seed=2), (_hidden_states() * 1000).to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        out = fusion(hidden_states, torch.rand(2).to(dtype), 1)
        fused = fusion.fuse(fusion.prepare(hidden_states), torch.rand(2))
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert fused.isfinite().all()


@pytest.mark.parametrize("strategy", [s for s in FUSIONS if s.has_time_gate])
def test_gate_works_in_pure_bfloat16(strategy: Strategy) -> None:
    fusion = _fusion(strategy, seed=2).bfloat16()
    assert fusion.weights(torch.rand(2).bfloat16(), 0).isfinite().all()


def test_shift_follows_eq_11() -> None:
    t = torch.tensor([0.0, 0.2, 0.6, 1.0])
    expected = [0.0, 0.2, 0.6 + 0.01 * (1 - math.cos(math.pi / 2)), 1.0 + 0.02]
    torch.testing.assert_close(shift_gate_time(t), torch.tensor(expected))


def test_prepare_names_a_wrong_number_of_layers() -> None:
    with pytest.raises(ValueError, match="5 layers, the model was built for 7"):
        _fusion(Strategy.STATIC, num_layers=7).prepare(_hidden_states())


def test_weights_name_an_unknown_block() -> None:
    with pytest.raises(ValueError, match="block_index 3"):
        _fusion(Strategy.STATIC).weights(torch.zeros(1), 3)


def test_texts_are_stacked_on_the_accelerator_that_holds_any() -> None:
    unconditional, prompt = torch.ones(2, 3, 4), torch.ones(2, 5, 4, device="meta")
    stacked = stack_texts((unconditional, prompt))
    assert (stacked.device.type, stacked.shape) == ("meta", (2, 2, 5, 4))
    on_cpu = stack_texts((unconditional, torch.ones(2, 5, 4)))
    assert on_cpu[:, 0].sum() == 2 * 3 * 4 and not on_cpu[:, 0, 3:].any()
