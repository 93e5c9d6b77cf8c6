"""Weight decay shrinks only matrices, in every strategy's model."""

import re

import pytest
import torch

from tests.training.conftest import TINY_MODEL, TINY_TRAINING
from training.config import ModelConfig, Strategy
from training.loop.run_state import build_optimizer
from training.models.backbone import Backbone
from training.models.build import build_model

MATRICES = {
    "patch_in.weight", "patch_out.weight", "blocks.*.attention.qkv.weight", "blocks.*.attention.out.weight",
    "blocks.*.mlp.gate_up.weight", "blocks.*.mlp.down.weight",
}  # fmt: skip
OTHERS = {
    "patch_in.bias", "patch_out.bias", "norm_out.weight", "blocks.*.attention_norm.weight", "blocks.*.mlp_norm.weight",
    "blocks.*.attention.q_norm.weight", "blocks.*.attention.k_norm.weight",
}  # fmt: skip
CROSS_MATRICES = {
    "text_projection.weight", "blocks.*.cross_attention.q.weight", "blocks.*.cross_attention.text_kv.weight",
    "blocks.*.cross_attention.out.weight",
}  # fmt: skip
CROSS_OTHERS = {
    "text_norm.weight", "text_projection.bias", "blocks.*.cross_attention.q_norm.weight",
    "blocks.*.cross_attention.k_norm.weight",
}  # fmt: skip
TIME_MATRICES = {"time.inner.weight", "time.outer.weight", "time.modulations.weight"}
TIME_OTHERS = {"time.inner.bias", "time.outer.bias", "time.modulations.bias", "blocks.*.modulation.values"}
GATE_MATRICES, GATE_BIASES = ({f"fusion.gate.{kind}_{end}" for end in ("in", "out")} for kind in ("weight", "bias"))

BACKBONES = [TINY_MODEL, TINY_MODEL.model_copy(update={"timestep_conditioning": "adaln"})]


def _model(config: ModelConfig, strategy: Strategy) -> Backbone:
    """A model without zeros, which would hide whether a parameter shrinks."""
    model = build_model(config, strategy, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def _general(name: str) -> str:
    return re.sub(r"^blocks\.\d+", "blocks.*", name)


def _expected(config: ModelConfig, strategy: Strategy) -> tuple[set[str], set[str]]:
    """Names with and without decay, the same for all blocks."""
    matrices, others = set(MATRICES), set(OTHERS)
    if strategy is not Strategy.FUSE_DIT:
        matrices |= CROSS_MATRICES
        others |= CROSS_OTHERS
    if strategy in (Strategy.STATIC, Strategy.DEPTH_WISE):
        others.add("fusion.logits")
    if strategy.has_time_gate:
        matrices |= GATE_MATRICES
        others |= GATE_BIASES
    if config.timestep_conditioning == "adaln":
        matrices |= TIME_MATRICES
        others |= TIME_OTHERS
    return matrices, others


@pytest.mark.parametrize("config", BACKBONES, ids=lambda config: config.timestep_conditioning)
@pytest.mark.parametrize("strategy", Strategy)
def test_only_matrices_are_in_the_group_with_decay(strategy: Strategy, config: ModelConfig) -> None:
    model = _model(config, strategy)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, TINY_TRAINING.model_copy(update={"weight_decay": 0.1})).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    found = [[names[parameter] for parameter in group["params"]] for group in groups]
    assert tuple({_general(name) for name in group} for group in found) == _expected(config, strategy)
    assert sorted(found[0] + found[1]) == sorted(names.values())  # each once


@pytest.mark.parametrize("config", BACKBONES, ids=lambda config: config.timestep_conditioning)
@pytest.mark.parametrize("strategy", Strategy)
def test_a_step_without_gradient_shrinks_only_matrices(strategy: Strategy, config: ModelConfig) -> None:
    model = _model(config, strategy)
    optimizer = build_optimizer(model, TINY_TRAINING.model_copy(update={"weight_decay": 0.1, "learning_rate": 0.2}))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrices, _ = _expected(config, strategy)
    for name, parameter in model.named_parameters():
        factor = 1 - 0.2 * 0.1 if _general(name) in matrices else 1.0
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5 * factor), msg=name)


def test_the_time_head_decays_like_the_rest() -> None:
    model = _model(TINY_MODEL.model_copy(update={"gate_signal": "estimated"}), Strategy.JOINT)
    decayed, kept = (set(map(id, group["params"])) for group in build_optimizer(model, TINY_TRAINING).param_groups)
    head = {name: parameter for name, parameter in model.named_parameters() if name.startswith("time_head.")}
    assert head
    for name, parameter in head.items():
        assert id(parameter) in (kept if name.endswith("bias") else decayed), name
