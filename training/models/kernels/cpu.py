"""The fast forms of `ops` on a CPU: oneDNN products, an RMS norm and a sum over layers with gradients of their own.

oneDNN in fp32 against the BLAS that torch calls, on AVX-512 (Zen 4 core, 512 to 4,096 rows, widths from 256 to 3,072):
3 to 13 % faster backward to the input, between 3 % slower and 13 % faster forward, 7 to 19 % faster with a packed
weight. Gradients of weights are 2 to 7 % faster where the weight is wider than high, else as fast or slower, and stay
with BLAS. On AVX2 the two are alike.

Shapes: M rows, I inputs, O outputs of a product; V variants, L LLM layers, B batch, S text tokens, C channels.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from training.models.kernels.ragged_texts import Prepared

_packed = WeakTensorKeyDictionary()
"""Weights that may be packed -> their packed parts, empty until the first product needs them."""


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether `onednn_linear` calls oneDNN for these two."""
    return bool(
        not torch.compiler.is_compiling()  # inductor chooses for itself
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear up to rounding: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    if not uses_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = cast(Tensor, _Linear.apply(x, weight))
        return y if bias is None else y + bias
    parts = _packed_parts(weight, 1)
    return _product(x, parts[0] if parts else weight, bias)


def packed_silu_gated(x: Tensor, gate_up: Tensor) -> Tensor | None:
    """`ops.silu_gated` on packed halves of gate_up (2 * O, I), or None where they are not packed or need gradients."""
    if torch.is_grad_enabled() or not uses_onednn(x, gate_up):
        return None
    parts = _packed_parts(gate_up, 2)
    if not parts:
        return None
    return _product(x, parts[0], activation="swish").mul_(_product(x, parts[1]))


@contextmanager
def packed_weights(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let products without gradients pack these weights, each at its first use; drop the packed ones at the end."""
    pack_constants(weights)
    try:
        yield
    finally:
        for weight in weights:
            _packed.pop(weight, None)


def pack_constants(weights: Sequence[Tensor]) -> None:
    """Let products without gradients pack these weights, each at its first use, for as long as they exist."""
    for weight in weights:
        _packed[weight] = ()


def _packed_parts(weight: Tensor, num_parts: int) -> tuple[Tensor, ...] | None:
    """Return the packed `num_parts` parts of a weight's rows, or None where it may not be packed."""
    parts = _packed.get(weight)
    if parts is None or len(parts) == num_parts:
        return parts
    parts = tuple(
        torch.ops.mkldnn._reorder_linear_weight(part.detach(), None) for part in weight.detach().chunk(num_parts)
    )
    _packed[weight] = parts
    return parts


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _product_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """Count a product for FlopCounterMode, which has no formula for oneDNN's."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad = grads[0].reshape(-1, weight.shape[0])
        grad_x = _product(grad, weight.t()).view(x.shape) if needs_x else None
        grad_weight = _weight_gradient(grad, x.reshape(-1, weight.shape[1])) if needs_weight else None
        return grad_x, grad_weight


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (O, I) of a weight, from those of the outputs (M, O) and the inputs (M, I)."""
    is_wide = x.shape[1] > grad.shape[1] and len(x) > 0  # oneDNN refuses an empty sum
    return _product(grad.t(), x.t()) if is_wide else grad.t() @ x


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`ops.rms_norm` in fp32."""
    return cast(Tensor, _RmsNorm.apply(x, weight, eps))


class _RmsNorm(torch.autograd.Function):
    """F.rms_norm has no CPU kernel of its own: its backward takes 1.5 ms for 512 x 384 values, this one 0.3 ms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return x * scale if weight is None else (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Layer norm's backward at mean zero, plus the term it subtracts for the mean: scale * mean(grad * weight)."""
        x, scale, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        with torch.autocast("cpu", enabled=False):
            grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
                grad, x, x.shape[-1:], torch.zeros_like(scale), scale, weight, None, [needs_x, needs_weight, False]
            )
            if needs_x:
                sums = grad.sum(-1) if weight is None else torch.mv(grad.flatten(0, -2), weight)
                grad_x.add_(sums.view_as(scale).div_(x.shape[-1]).mul_(scale))
        return grad_x, grad_weight, None


def sum_layers(alpha: Tensor, prepared: Prepared) -> Tensor:
    """`ops.sum_layers`, sample by sample."""
    texts = prepared.unbind(1) if isinstance(prepared, Tensor) else prepared
    dtype = prepared.dtype if isinstance(prepared, Tensor) else torch.float32
    return cast(Tensor, _LayerSum.apply(alpha.to(dtype), *texts))


class _LayerSum(torch.autograd.Function):
    """sum_l alpha (V, B or 1, L) * text (L, S_i, C), each sample written in place into (V, B, S, C).

    A batched product would put samples before variants, and every later operation would copy. Prepared texts are
    constants and get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, *texts: Tensor) -> Tensor:
        ctx.save_for_backward(*texts)
        ctx.is_shared = alpha.shape[1] == 1
        longest, channels = max(text.shape[1] for text in texts), texts[0].shape[2]
        fused = alpha.new_empty(alpha.shape[0], len(texts), longest, channels)
        for sample, text in enumerate(texts):
            weights, length = alpha[:, 0 if ctx.is_shared else sample], text.shape[1]
            torch.mm(weights, text.to(alpha.dtype).flatten(1), out=fused[:, sample, :length].flatten(1))
            fused[:, sample, length:] = 0
        return fused

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        texts, grad = ctx.saved_tensors, grads[0]
        per_sample = [
            onednn_linear(grad[:, sample, : text.shape[1]].flatten(1), text.to(grad.dtype).flatten(1))
            for sample, text in enumerate(texts)
        ]
        grad_alpha = torch.stack(per_sample, dim=1)
        return grad_alpha.sum(1, keepdim=True) if ctx.is_shared else grad_alpha, *(None for _ in texts)
