"""oneDNN products with weights agree with torch's, with gradients, packed or not."""

import pytest
import torch
import torch.nn.functional as F

from tests.training.conftest import TINY_MODEL
from training.config import Strategy
from training.models.build import build_model
from training.models.kernels import cpu, ops
from training.models.kernels.cpu import onednn_linear, pack_constants
from training.models.layers import Projection, SwiGLU


@pytest.fixture(autouse=True)
def _onednn_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call oneDNN on processors without AVX-512 too: it works there, it is only no faster."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("rows", [(7,), (2, 5), (0, 5), (1,)])
def test_a_product_and_its_gradients_are_those_of_torch(rows: tuple[int, ...]) -> None:
    x, weight, bias, grad = tensors((*rows, 48), (32, 48), (32,), (*rows, 32))
    ours, theirs = ([value.clone().requires_grad_() for value in (x, weight, bias)] for _ in range(2))
    y, expected = onednn_linear(*ours), F.linear(*(value.double() for value in theirs))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    y.backward(grad)
    expected.backward(grad.double())
    for value, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_strided_inputs_and_weights_need_no_copy_by_the_caller() -> None:
    x, weight = tensors((48, 10), (48, 32))
    expected = F.linear(x.t(), weight.t())
    torch.testing.assert_close(onednn_linear(x.t(), weight.t()), expected, rtol=1e-5, atol=1e-5)
    half = tensors((6, 96))[0].chunk(2, dim=-1)[1]
    torch.testing.assert_close(onednn_linear(half, weight.t()), F.linear(half, weight.t()), rtol=1e-5, atol=1e-5)


def test_only_inputs_that_require_a_gradient_get_one() -> None:
    x, weight = tensors((4, 8), (3, 8))
    requiring = x.clone().requires_grad_()
    onednn_linear(requiring, weight).sum().backward()
    torch.testing.assert_close(requiring.grad, weight.sum(0).expand_as(x))
    assert onednn_linear(x, weight.clone().requires_grad_()).requires_grad
    assert not onednn_linear(x, weight).requires_grad
    with torch.no_grad():
        assert not onednn_linear(x, weight.requires_grad_()).requires_grad


def test_autocast_decides_the_type() -> None:
    x, weight = tensors((4, 8), (3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn_linear(x, weight).dtype == torch.bfloat16


def test_training_on_avx512_calls_onednn() -> None:
    x, weight = tensors((4, 8), (3, 8))
    weight.requires_grad_()
    assert type(onednn_linear(x, weight).grad_fn).__name__ == "_LinearBackward"


def test_other_processors_and_types_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = tensors((4, 8), (3, 8))
    assert not cpu.uses_onednn(x.bfloat16(), weight.bfloat16())
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    pack_constants([weight])
    assert torch.equal(onednn_linear(x, weight), F.linear(x, weight))


@torch.no_grad()
def test_packed_weights_give_the_same_products_and_are_freed() -> None:
    model = build_model(TINY_MODEL, Strategy.DEPTH_WISE, seed=0)
    swiglu = next(module for module in model.modules() if isinstance(module, SwiGLU))
    projections = [module for module in model.modules() if isinstance(module, Projection)]
    projections = [module for module in projections if module is not swiglu.gate_up]
    inputs = [tensors((5, module.in_features))[0] for module in (swiglu.gate_up, *projections)]
    plain = [module(x) for module, x in zip((swiglu, *projections), inputs, strict=True)]
    num_packed = len(cpu._packed)
    with pytest.raises(KeyboardInterrupt), ops.packed_weights(model):
        packed = [module(x) for module, x in zip((swiglu, *projections), inputs, strict=True)]
        assert len(cpu._packed[swiglu.gate_up.weight]) == 2
        assert all(len(cpu._packed[projection.weight]) == 1 for projection in projections)
        for one, other in zip(packed, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert swiglu(inputs[0]).dtype == torch.bfloat16
        raise KeyboardInterrupt
    assert len(cpu._packed) == num_packed


@torch.no_grad()
def test_packed_constants_are_freed_with_their_weights() -> None:
    x, weight = tensors((4, 8), (3, 8))
    num_packed = len(cpu._packed)
    expected = F.linear(x, weight)
    pack_constants([weight])
    torch.testing.assert_close(onednn_linear(x, weight), expected, rtol=1e-5, atol=1e-5)
    assert len(cpu._packed) == num_packed + 1
    del weight
    assert len(cpu._packed) == num_packed
