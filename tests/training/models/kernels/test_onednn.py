"""Products with weights through oneDNN give what torch's own give, with gradients, packed or not."""

import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import TINY_MODEL
from training.config import Strategy
from training.models.dit import build_model
from training.models.kernels.onednn import linear, pack
from training.models.layers import Projection, SwiGLU, packed_weights

serves = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN is called on AVX-512 alone"
)


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("rows", [(7,), (2, 5), (0, 5), (1,)])
def test_a_product_and_its_gradients_are_those_of_torch(rows: tuple[int, ...]) -> None:
    x, weight, bias, grad = tensors((*rows, 48), (32, 48), (32,), (*rows, 32))
    ours, theirs = ([value.clone().requires_grad_() for value in (x, weight, bias)] for _ in range(2))
    y, expected = linear(*ours), F.linear(*(value.double() for value in theirs))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.backward(grad)
    expected.backward(grad.double())
    for value, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_weights_are_taken_as_they_are() -> None:
    x, weight = tensors((48, 10), (48, 32))
    torch.testing.assert_close(linear(x.t(), weight.t()), F.linear(x.t(), weight.t()), rtol=1e-5, atol=1e-5)
    halves = tensors((6, 96))[0].chunk(2, dim=-1)
    torch.testing.assert_close(linear(halves[1], weight.t()), F.linear(halves[1], weight.t()), rtol=1e-5, atol=1e-5)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    x, weight = tensors((4, 8), (3, 8))
    asks = x.clone().requires_grad_()
    y = linear(asks, weight)
    y.sum().backward()
    torch.testing.assert_close(asks.grad, weight.sum(0).expand_as(x))
    constant = linear(x, weight.clone().requires_grad_())
    assert constant.requires_grad
    assert not linear(x, weight).requires_grad
    with torch.no_grad():
        assert not linear(x, weight.requires_grad_()).requires_grad


def test_autocast_decides_the_type() -> None:
    x, weight = tensors((4, 8), (3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@serves
def test_training_on_avx512_calls_onednn() -> None:
    x, weight = tensors((4, 8), (3, 8))
    weight.requires_grad_()
    assert "Linear" in type(linear(x, weight).grad_fn).__name__


def test_other_processors_and_types_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = tensors((4, 8), (3, 8))
    assert pack([weight.bfloat16()]) == ()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert pack([weight]) == ()
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@serves
@torch.no_grad()
def test_packed_weights_give_the_same_products_and_are_let_go() -> None:
    model = build_model(TINY_MODEL, Strategy.DEPTH_WISE, seed=0)
    swiglu = next(module for module in model.modules() if isinstance(module, SwiGLU))
    projections = [module for module in model.modules() if isinstance(module, Projection)]
    inputs = [tensors((5, module.in_features))[0] for module in (swiglu.gate_up, *projections)]
    plain = [module(x) for module, x in zip((swiglu, *projections), inputs, strict=True)]
    with pytest.raises(KeyboardInterrupt), packed_weights(model):
        assert all(projection.packed for projection in projections)
        packed = [module(x) for module, x in zip((swiglu, *projections), inputs, strict=True)]
        for one, other in zip(packed, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert swiglu(inputs[0]).dtype == torch.bfloat16
        raise KeyboardInterrupt
    assert not any(projection.packed for projection in projections)
