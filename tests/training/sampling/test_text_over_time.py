"""Texts at many times from few directions have the keys and values of each time alone."""

import pytest
import torch

from tests.training.conftest import TINY_MODEL
from tests.training.models.test_dit import built, texts
from training.config import Strategy
from training.models.dit import DiT
from training.models.kernels.ragged_texts import stack_texts
from training.sampling.text_over_time import TimeBasis, inverse_rms, text_over_time, time_bases

TIMES = torch.linspace(0.01, 0.99, 50)


def gated(strategy: Strategy, time_scale: float = 1.0) -> DiT:
    model = built(strategy, TINY_MODEL.model_copy(update={"gate_time_scale": time_scale, "num_text_layers": 12}))
    assert isinstance(model, DiT)
    return model


@pytest.mark.parametrize("strategy", [Strategy.TIME_WISE, Strategy.JOINT])
@pytest.mark.parametrize("time_scale", [1.0, 1000.0])
@pytest.mark.parametrize("fused_values", [0, 2**24], ids=["one gate at a time", "all gates at once"])
@torch.no_grad()
def test_keys_and_values_are_those_of_each_time(
    strategy: Strategy, time_scale: float, fused_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.sampling.text_over_time._MAX_FUSED_VALUES", fused_values)
    model = gated(strategy, time_scale)
    prepared = tuple(texts(model, 3, 5))
    timed = text_over_time(model, prepared, time_bases(model.fusion, TIMES), model.fold_text_projection())
    for place in (0, 17, 49):
        alone = model.text_keys_values(prepared, TIMES[place].expand(2))
        for block, expected in zip(timed, alone, strict=True):
            for found, value in zip(block.at(place), expected, strict=True):
                torch.testing.assert_close(found, value, rtol=0, atol=1e-5 * float(value.abs().max()))


@torch.no_grad()
def test_bf16_loses_no_more_than_at_each_time_alone() -> None:
    model = gated(Strategy.JOINT)
    exact = model.text_keys_values(tuple(texts(model, 3, 5)), TIMES[17].expand(2))
    prepared = stack_texts(tuple(texts(model, 3, 5))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        timed = text_over_time(model, prepared, time_bases(model.fusion, TIMES), model.fold_text_projection())
        alone = model.text_keys_values(prepared, TIMES[17].expand(2))
    for block, of_time, expected in zip(timed, alone, exact, strict=True):
        for found, other, value in zip(block.at(17), of_time, expected, strict=True):
            assert (found - value).square().mean() < 2 * (other.float() - value).square().mean()


@pytest.mark.parametrize("strategy", [Strategy.TIME_WISE, Strategy.JOINT])
@torch.no_grad()
def test_smooth_gates_span_few_directions(strategy: Strategy) -> None:
    fusion = gated(strategy).fusion
    for basis, alpha in zip(time_bases(fusion, TIMES), fusion.all_weights(TIMES), strict=True):
        assert len(basis.directions) < 10
        distance = (basis.coefficients @ basis.directions - alpha).norm(dim=-1)
        assert (distance / alpha.norm(dim=-1)).max() < 5e-7


def test_a_basis_is_as_small_as_its_weights_allow() -> None:
    generator = torch.Generator().manual_seed(0)
    kind = torch.float64
    two = torch.rand(9, 2, dtype=kind, generator=generator) @ torch.rand(2, 6, dtype=kind, generator=generator)
    assert len(TimeBasis.of(two).directions) == 2
    assert len(TimeBasis.of(two[:1]).directions) == 1
    independent = torch.rand(4, 6, generator=generator)
    basis = TimeBasis.of(independent)
    assert torch.equal(basis.coefficients @ basis.directions, independent)
    assert TimeBasis.of(torch.full((4, 6), torch.nan)).directions.isnan().all()
    more_times = torch.rand(9, 6, generator=generator)
    basis = TimeBasis.of(more_times)
    assert len(basis.directions) == 6
    torch.testing.assert_close(basis.coefficients @ basis.directions, more_times)


def test_the_norm_of_a_combination_comes_from_products_of_its_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    parts, coefficients = torch.randn(3, 2, 4, 16, generator=generator), torch.randn(5, 3, generator=generator)
    parts[:, 1, 2:] = 0  # padding
    combined = torch.einsum("tr,rbsc->tbsc", coefficients, parts)
    expected = (combined.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    torch.testing.assert_close(inverse_rms(parts, coefficients, 1e-3), expected)
