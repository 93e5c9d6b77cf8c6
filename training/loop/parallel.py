"""How a model is laid out for training: recomputed activations, compiled blocks, parameters sharded over processes.

Sharding is PyTorch's FSDP2 (`fully_shard`): each process holds a slice of every parameter, and with it of gradients,
optimizer state and moving average. It is applied here and not by accelerate, whose FSDP knows no CPU (version 1.15
asks for it on GPUs alone and trains unsharded elsewhere), so that what is tested is what runs. Parameters stay fp32
and are gathered as such; bfloat16 comes from autocast, as without sharding.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from training.config import TrainingConfig
from training.models.dit import Backbone, DiT


def lay_out(model: Backbone, training: TrainingConfig, device: torch.device, num_processes: int) -> None:
    """Change a model in place as the configuration says; names and values of its parameters stay."""
    for block in model.blocks:
        if training.checkpoint_activations:
            inner = block.forward
            block.forward = functools.partial(checkpoint, inner, use_reentrant=False)
        if training.compile:
            # Block by block: all are one graph, and texts of other lengths compile anew once, not once a block.
            block.compile()
    if training.sharded:
        mesh = init_device_mesh(device.type, (num_processes,))
        if isinstance(model, DiT):
            model.folds_text_projection = False
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
            # Keys and values of the text are made of a block's parameters outside its forward.
            register_fsdp_forward_method(block, "text_keys_values")
        fully_shard(model, mesh=mesh)


def defer_gradients(model: nn.Module, *, defer: bool) -> None:
    """Let a sharded model keep its gradients to itself until the last part of an accumulated batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not defer)


def forget_gathered(model: nn.Module) -> None:
    """Give back what a forward pass without a backward one left gathered: parameters are slices again."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole; where it is sharded, every process must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Return whole values, which every process has, in the layout of a parameter."""
    values = values.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return values
    sharded: Any = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return cast(Tensor, sharded)
