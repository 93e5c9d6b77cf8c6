"""The operations of the models that have a faster form, and the switch between the two forms.

`plain` is PyTorch as the equations read. `fast`, the default, uses the kernels of `cpu` where they apply. Both give the
same values and gradients up to rounding. The environment variable THROUGHLINE_KERNELS chooses for a process, `use` for
a block of code.

Shapes: V variants of the conditioning, L LLM layers, B batch, S text tokens, C channels, I inputs and O outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.core.environment import KernelForm, kernel_form
from training.models.kernels import cpu
from training.models.kernels.ragged_texts import Prepared, stack_texts

_form: KernelForm = kernel_form()


@contextmanager
def use(form: KernelForm) -> Iterator[None]:
    """Use one form of all operations within the block."""
    global _form
    previous, _form = _form, form
    try:
        yield
    finally:
        _form = previous


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    return cpu.onednn_linear(x, weight, bias) if _form == "fast" else F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32, returned as x's type."""
    weight = None if weight is None else weight.float()
    if _form == "fast" and x.device.type == "cpu":
        return cpu.rms_norm(x.float(), weight, eps).to(x.dtype)
    return F.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """rms_norm(x, norm_weight) W^T + b.

    The fast form is rms_norm(x) (W * norm_weight)^T + b: where x needs no gradient, backward has no product with W.
    """
    if _form == "fast":
        return linear(rms_norm(x, None, eps), weight * norm_weight, bias)
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def silu_gated(x: Tensor, gate_up: Tensor) -> Tensor:
    """silu(x W_gate^T) * (x W_up^T), where gate_up (2 * O, I) is W_gate above W_up: (..., I) -> (..., O)."""
    if _form == "fast":
        gated = cpu.packed_silu_gated(x, gate_up)
        if gated is not None:
            return gated
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def sum_layers(alpha: Tensor, prepared: Prepared) -> Tensor:
    """sum_l alpha[v, b, l] * prepared[l, b]: alpha (V, B or 1, L), prepared (L, B, S, C) -> (V, B, S, C).

    Returns the stack's type; fp32 for texts given one by one.
    """
    if _form == "fast" and alpha.device.type == "cpu":
        return cpu.sum_layers(alpha, prepared)
    stacked = stack_texts(prepared)
    return torch.einsum("vbl,lbsc->vbsc", alpha.to(stacked.dtype), stacked)


def folding_pays(num_rows: int, num_tokens: int) -> bool:
    """Return whether W_d (P x) of `num_tokens` x is computed as (W_d P) x, the W_d having `num_rows` rows in all."""
    return _form == "fast" and num_rows < num_tokens


def packed_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Pack the weights of `model` for products without gradients, where this machine gains by it.

    Costs the memory of the weights again and one pass over them; they must not change within the block.
    """
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    return cpu.packed_weights(matrices) if _form == "fast" else nullcontext()


def pack_constants(weights: Sequence[Tensor]) -> None:
    """Pack weights that never change, for as long as they exist."""
    if _form == "fast":
        cpu.pack_constants(weights)
