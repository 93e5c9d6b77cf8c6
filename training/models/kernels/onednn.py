"""Products with weight matrices in fp32 on a CPU: oneDNN's where they are faster than those of the BLAS torch calls.

On AVX-512 (measured on a Zen 4 core, 512 to 4,096 rows, widths from 256 to 3,072) oneDNN is 3 to 13 % faster backward
to the input, between 3 % slower and 13 % faster forward, and 7 to 19 % faster where the weight was packed before;
for gradients of weights it is 2 to 7 % faster where they are wider than high, else as fast or slower, and they stay
with BLAS. On AVX2 the two are alike.

Shapes: M rows, I inputs, O outputs of a product.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Tensor | None = None) -> Tensor:
    """F.linear, the same up to rounding: x (..., I), weight (O, I), bias (O,) -> (..., O).

    `packed` is what `pack` made of the weight, used where no gradient is asked for.
    """
    if not is_served(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _Linear.apply(x, weight)
        return y if bias is None else y + bias
    return _product(x, weight if packed is None else packed, bias)


def pack(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Lay weights (O, I) out as their products read them; none where `linear` does not call oneDNN."""
    if not all(is_served(weight, weight) for weight in weights):
        return ()
    return tuple(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None) for weight in weights)


def is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` calls oneDNN for these two."""
    return (
        not torch.compiler.is_compiling()  # inductor chooses for itself
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


@register_flop_formula(torch.ops.mkldnn._linear_pointwise)
def _operations(x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """What FlopCounterMode counts for a product, as it does for those of torch."""
    return 2 * math.prod(x_shape) * weight_shape[0]


def silu_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate(x)) * up(x) of two packed weights (O, I), without gradients: (..., I) -> (..., O)."""
    return _product(x, gate, activation="swish").mul_(_product(x, up))


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
        grad_weight = _of_weight(grad, x.reshape(-1, weight.shape[1])) if needs_weight else None
        return grad_x, grad_weight


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (O, I) of a weight, from those of M outputs (M, O) and the inputs (M, I)."""
    wide = x.shape[1] > grad.shape[1] and len(x) > 0  # oneDNN makes no sum of nothing
    return _product(grad.t(), x.t()) if wide else grad.t() @ x
