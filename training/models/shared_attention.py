"""The keys and values of a frozen LLM's own layers, computed from its hidden states without running the LLM again.

Text rows of the joint attention are causal and never see the image, so a layer's keys and values depend on the text
alone: k_proj(input_norm(h)) and v_proj(input_norm(h)) of the hidden states h that enter the layer.

Shapes: S text tokens, C channels, G key and value heads, E channels of a head.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from training.models.layers import KeysValues


@dataclass(frozen=True)
class SharedLayer:
    """Weights of one decoder layer that turn its input into keys and values."""

    input_norm: Tensor
    k_proj: Tensor
    v_proj: Tensor
    k_norm: Tensor | None
    """Per-head RMSNorm of keys (Qwen3); None where the LLM has none (Llama)."""

    def to(self, device: torch.device) -> "SharedLayer":
        k_norm = None if self.k_norm is None else self.k_norm.to(device)
        return SharedLayer(self.input_norm.to(device), self.k_proj.to(device), self.v_proj.to(device), k_norm)


@dataclass(frozen=True)
class SharedAttention:
    """Key and value weights of some decoder layers, counted from 0, of a frozen LLM."""

    layers: Mapping[int, SharedLayer]
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).k_proj.device

    def to(self, device: torch.device) -> "SharedAttention":
        """Return it on a device; itself where it is there already."""
        if device == self.device:
            return self
        return replace(self, layers={index: layer.to(device) for index, layer in self.layers.items()})

    def keys_values(self, layer_index: int, hidden_states: Tensor) -> KeysValues:
        """Keys (rotated) and values of a layer from its input (S, C): each (G, S, E), in fp32."""
        layer = self.layers[layer_index]
        h = F.rms_norm(hidden_states.float(), layer.input_norm.shape, layer.input_norm, self.norm_eps)
        k = F.linear(h, layer.k_proj).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(0, 1)
        v = F.linear(h, layer.v_proj).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(0, 1)
        if layer.k_norm is not None:
            k = F.rms_norm(k, layer.k_norm.shape, layer.k_norm, self.norm_eps)
        return self._rotate(k), v.contiguous()

    def _rotate(self, k: Tensor) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=k.device) / self.head_dim
        positions = torch.arange(k.shape[1], dtype=torch.float32, device=k.device)
        angles = positions[:, None] * self.rope_theta**-exponents
        first, second = k.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def load_shared_attention(model: ModelRef, layers: Sequence[int]) -> SharedAttention:
    """Read only the key and value weights of `layers` from a model's safetensors.

    Raises ThroughlineError where the model has no such layer, or an unsupported scaling of rotary positions.
    """
    folder = _folder(model)
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise ThroughlineError(
            f"{model.id}: rotary positions of type {rope_type!r}; fuse_dit supports only the default type"
        )
    tensors = _read_tensors(folder, {f"layers.{index}." for index in layers})
    return SharedAttention(
        layers={index: _layer(model, tensors, index) for index in layers},
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        rope_theta=float(rope.get("rope_theta") or config["rope_theta"]),
        norm_eps=config["rms_norm_eps"],
    )


def _layer(model: ModelRef, tensors: Mapping[str, Tensor], index: int) -> SharedLayer:
    def find(name: str) -> Tensor | None:
        return tensors.get(f"layers.{index}.{name}.weight")

    input_norm, k_proj, v_proj = find("input_layernorm"), find("self_attn.k_proj"), find("self_attn.v_proj")
    if input_norm is None or k_proj is None or v_proj is None:
        raise ThroughlineError(
            f"{model.id}: no decoder layer {index} with input_layernorm, k_proj and v_proj; "
            "lower fuse_first_layer or fuse_layer_stride, or use another encoder"
        )
    if f"layers.{index}.self_attn.k_proj.bias" in tensors:
        raise ThroughlineError(f"{model.id}: layer {index} has biased key projections, which fuse_dit does not support")
    return SharedLayer(input_norm, k_proj, v_proj, find("self_attn.k_norm"))


def _folder(model: ModelRef) -> Path:
    if model.path is not None:
        return Path(model.path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model.id, revision=model.revision, allow_patterns=["*.json", "*.safetensors"]))


def _read_tensors(folder: Path, prefixes: Iterable[str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    wanted = tuple(prefixes)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not iterable
                if "visual" in name or "vision" in name:
                    continue
                start = name.find("layers.")
                if start >= 0 and name[start:].startswith(wanted):
                    tensors[name[start:]] = file.get_tensor(name).float()
    return tensors


def shared_attention_of(model: Any, layers: Sequence[int]) -> SharedAttention:
    """Take the weights from a loaded transformers decoder (its `model.layers`) instead of files."""
    decoder, config = getattr(model, "model", model), model.config
    rope = config.rope_parameters

    def layer(index: int) -> SharedLayer:
        source = decoder.layers[index]
        k_norm = getattr(source.self_attn, "k_norm", None)
        return SharedLayer(
            input_norm=source.input_layernorm.weight.detach().float(),
            k_proj=source.self_attn.k_proj.weight.detach().float(),
            v_proj=source.self_attn.v_proj.weight.detach().float(),
            k_norm=None if k_norm is None else k_norm.weight.detach().float(),
        )

    return SharedAttention(
        layers={index: layer(index) for index in layers},
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
    )
