"""Parallelism of a model in training: activation checkpointing, compiled blocks, sharded parameters.

Sharding is PyTorch's FSDP2 (`fully_shard`): each process holds a slice of every parameter, gradient, optimizer state
and moving average. It is applied here because accelerate's FSDP (version 1.15) shards on GPUs only and silently trains
unsharded elsewhere, so tests on CPUs would not run the real code. Parameters stay fp32 and are gathered as fp32;
bfloat16 comes from autocast, as without sharding.
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
from training.models.backbone import Backbone
from training.models.dit import DiT


def parallelize(model: Backbone, training: TrainingConfig, device: torch.device, num_processes: int) -> None:
    """Apply the configured parallelism to a model in place; names and values of its parameters stay."""
    for block in model.blocks:
        if training.checkpoint_activations:
            inner = block.forward
            block.forward = functools.partial(checkpoint, inner, use_reentrant=False)
        if training.compile:
            # Blocks share one graph, so a new text length recompiles it once and not once per block.
            block.compile()
    if training.sharded:
        mesh = init_device_mesh(device.type, (num_processes,))
        if isinstance(model, DiT):
            model.can_fold_text_projection = False
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
            # It uses the block's parameters outside `forward`.
            register_fsdp_forward_method(block, "text_keys_values")
        fully_shard(model, mesh=mesh)


def set_grad_sync(model: nn.Module, *, sync: bool) -> None:
    """Reduce a sharded model's gradients over processes, or, within an accumulated batch, not yet."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward one gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, which every process must do together; return any other as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Shard full values, which every process has, like a parameter."""
    values = values.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return values
    sharded: Any = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return cast(Tensor, sharded)
