"""The backbones: padding, positions, caching, initial values, timestep conditioning."""

import pytest
import torch
from torch import Tensor

from pipelines.core.config import ModelRef
from tests.training.conftest import HEAD_DIM, KV_HEADS, NUM_LAYERS, TEXT_WIDTH, TINY_MODEL, pad_texts
from training.config import ModelConfig, Strategy
from training.data.feature_source import prepare_text
from training.models.backbone import Backbone
from training.models.build import build_model
from training.models.dit import DiT
from training.models.kernels.ops import rms_norm
from training.models.layers import attend, grid_angles, rotary_tables, rotate
from training.models.shared_attention import SharedAttention, SharedLayer


def _random_shared(config: ModelConfig) -> SharedAttention:
    generator = torch.Generator().manual_seed(0)
    kv = config.num_kv_heads * config.head_dim

    def layer() -> SharedLayer:
        weights = [torch.randn(kv, config.text_width, generator=generator) * 0.1 for _ in range(2)]
        return SharedLayer(torch.ones(config.text_width), weights[0], weights[1], None)

    layers = {index: layer() for index in config.shared_layers}
    return SharedAttention(layers, config.num_kv_heads, config.head_dim, 1e4, 1e-5)


def built(strategy: Strategy, config: ModelConfig = TINY_MODEL) -> Backbone:
    """A model with every parameter moved away from its initial value, so that no zero hides an error."""
    from training.models.fuse_dit import FuseDiT

    model = build_model(config, strategy, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if isinstance(model, FuseDiT):
        model.share_attention(_random_shared(config))
    return model.eval().requires_grad_(False)


def texts(model: Backbone, *lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    config = model.config
    hidden_states = [
        torch.randn(config.num_text_layers, length, config.text_width, generator=generator) for length in lengths
    ]
    return [prepare_text(model.prepare_text, item, torch.float32) for item in hidden_states]


def latents(batch: int, size: int = 8) -> Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("strategy", Strategy)
def test_padding_does_not_change_the_output(strategy: Strategy) -> None:
    model = built(strategy)
    prepared = texts(model, 3, 7)
    stacked, lengths, mask = pad_texts(prepared)
    x, t = latents(2), torch.tensor([0.3, 0.8])
    together = model(x, t, stacked, lengths, mask)
    for row in range(2):
        alone, length, no_mask = pad_texts(prepared[row : row + 1])
        assert no_mask is None
        expected = model(x[row : row + 1], t[row : row + 1], alone, length, no_mask)
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", Strategy)
def test_texts_one_by_one_give_the_result_of_a_stack(strategy: Strategy) -> None:
    model = built(strategy).requires_grad_(True)
    prepared = texts(model, 3, 7, 5)
    stacked, lengths, mask = pad_texts(prepared)
    x, t = latents(3), torch.tensor([0.2, 0.5, 0.9])
    outputs = [model(x, t, texts_of_batch, lengths, mask) for texts_of_batch in (tuple(prepared), stacked)]
    torch.testing.assert_close(outputs[0], outputs[1])
    learned = list(model.parameters())
    grads = [torch.autograd.grad(output.square().sum(), learned, allow_unused=True) for output in outputs]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("timestep_conditioning", ["none", "adaln"])
@pytest.mark.parametrize("strategy", Strategy)
def test_several_texts_for_an_image_give_the_result_of_each(strategy: Strategy, timestep_conditioning: str) -> None:
    config = TINY_MODEL.model_copy(update={"timestep_conditioning": timestep_conditioning})
    model = built(strategy, config)
    stacked, lengths, mask = pad_texts(texts(model, 4, 6, 3, 6))
    x, t = latents(2), torch.tensor([0.4])
    keys_values = model.text_keys_values(stacked, t.expand(4))
    together = model.velocity(x, t, keys_values, lengths, mask)
    apart = model.velocity(x.repeat(2, 1, 1, 1), t.expand(4), keys_values, lengths, mask)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", Strategy)
def test_velocity_from_cached_text_equals_forward(strategy: Strategy) -> None:
    model = built(strategy)
    stacked, lengths, mask = pad_texts(texts(model, 5, 5))
    x = latents(2)
    cached = model.text_keys_values(stacked, torch.zeros(2))
    for time in (0.1, 0.9):
        t = torch.full((2,), time)
        if model.text_depends_on_time:
            cached = model.text_keys_values(stacked, t)
        torch.testing.assert_close(model.velocity(x, t, cached, lengths, mask), model(x, t, stacked, lengths, mask))


@pytest.mark.parametrize("strategy", [s for s in Strategy if s is not Strategy.FUSE_DIT])
def test_keys_and_values_follow_the_text_path_in_either_order_of_products(strategy: Strategy) -> None:
    model = built(strategy).requires_grad_(True)
    assert isinstance(model, DiT)
    t = torch.tensor([0.2, 0.7])
    orders = set()
    for length in (3, 20):
        prepared, _, _ = pad_texts(texts(model, length, length))
        found = model.text_keys_values(prepared, t)
        tokens = model.fusion.num_variants * 2 * length
        orders.add(tokens > 2 * KV_HEADS * HEAD_DIM * model.config.num_blocks)
        conditioning = model.text_projection(model.text_norm(model.fusion.fuse(prepared, t)))
        for index, (block, (k, v)) in enumerate(zip(model.blocks, found, strict=True)):
            variant = conditioning[index if len(conditioning) > 1 else 0]
            expected = block.cross_attention.text_kv(variant).unflatten(-1, (2, KV_HEADS, HEAD_DIM)).movedim(2, 0)
            torch.testing.assert_close(k.transpose(1, 2), block.cross_attention.k_norm(expected[0]))
            torch.testing.assert_close(v.transpose(1, 2), expected[1])
        weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(5))
        learned = [model.text_norm.weight, model.text_projection.weight, model.text_projection.bias]
        grads = torch.autograd.grad((v * weight).sum(), learned, retain_graph=True)
        expected_grads = torch.autograd.grad((expected[1] * weight.transpose(1, 2)).sum(), learned)
        torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)
    assert orders == ({False, True} if model.fusion.num_variants > 1 else {False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("timestep_conditioning", ["none", "adaln"])
@pytest.mark.parametrize("strategy", Strategy)
def test_outputs_and_gradients_are_finite_in_every_precision(
    strategy: Strategy, timestep_conditioning: str, dtype: torch.dtype
) -> None:
    """With hidden states as large as an LLM's outliers, whose squares overflow float16."""
    model = built(strategy, TINY_MODEL.model_copy(update={"timestep_conditioning": timestep_conditioning}))
    generator = torch.Generator().manual_seed(4)
    shapes = [(NUM_LAYERS, length, TEXT_WIDTH) for length in (3, 7)]
    hidden_states = [torch.randn(shape, generator=generator) * 1000 for shape in shapes]
    stacked, lengths, mask = pad_texts([prepare_text(model.prepare_text, item, dtype) for item in hidden_states])
    x, t = latents(2), torch.tensor([0.0, 0.9])
    exact = model(x, t, stacked, lengths, mask)
    model.requires_grad_(True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        forward = model(x, t, stacked, lengths, mask)
        cached = model.velocity(x, t, model.text_keys_values(stacked, t), lengths, mask)
    for output in (forward, cached):
        assert output.isfinite().all()
        assert (output.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    forward.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("strategy", Strategy)
def test_text_reaches_the_output(strategy: Strategy) -> None:
    model = built(strategy)
    first, second = texts(model, 4, 4)
    x, t = latents(1), torch.tensor([0.5])
    outputs = [model(x, t, *pad_texts([text])) for text in (first, second)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("strategy", [s for s in Strategy if not s.has_time_gate])
def test_without_timestep_conditioning_the_backbone_does_not_see_time(strategy: Strategy) -> None:
    model = built(strategy)
    text = pad_texts(texts(model, 4))
    outputs = [model(latents(1), torch.tensor([time]), *text) for time in (0.001, 0.999)]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("strategy", Strategy)
def test_adaln_starts_as_the_same_function_and_then_sees_time(strategy: Strategy) -> None:
    config = TINY_MODEL.model_copy(update={"timestep_conditioning": "adaln"})
    plain, adaln = built(strategy), build_model(config, strategy, seed=0)
    adaln.load_state_dict(plain.state_dict(), strict=False)
    if strategy is Strategy.FUSE_DIT:
        adaln.share_attention(_random_shared(config))  # type: ignore[operator]
    text = pad_texts(texts(plain, 4))
    x, t = latents(1), torch.tensor([0.4])
    torch.testing.assert_close(adaln(x, t, *text), plain(x, t, *text))
    moved = built(strategy, config)
    outputs = [moved(x, torch.tensor([time]), *text) for time in (0.1, 0.9)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_strategies_start_equal_where_they_share_parameters() -> None:
    states = {strategy: build_model(TINY_MODEL, strategy, seed=5).state_dict() for strategy in Strategy}
    reference = states[Strategy.PENULTIMATE]
    for strategy, state in states.items():
        shared = [name for name in state if name in reference]
        assert len(shared) >= 0.6 * len(reference)
        for name in shared:
            assert torch.equal(state[name], reference[name]), (strategy, name)
    other = build_model(TINY_MODEL, Strategy.PENULTIMATE, seed=6).state_dict()
    assert not torch.equal(other["patch_in.weight"], reference["patch_in.weight"])


def test_a_model_starts_by_predicting_zero() -> None:
    model = build_model(TINY_MODEL, Strategy.JOINT, seed=0)
    assert not model(latents(1), torch.tensor([0.5]), *pad_texts(texts(model, 3))).any()


def test_patches_return_to_their_positions() -> None:
    model = built(Strategy.UNIFORM)
    x = latents(2)
    assert torch.equal(model._to_latents(model._to_patches(x), 8, 8), x)


def test_rotary_attention_depends_only_on_relative_positions() -> None:
    angles = grid_angles(6, 6, HEAD_DIM, 100.0, torch.device("cpu"))[:, None]
    q, k = (torch.randn(1, 1, 1, HEAD_DIM, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def score(query_place: tuple[int, int], key_place: tuple[int, int]) -> Tensor:
        rotated = []
        for x, (row, column) in ((q, query_place), (k, key_place)):
            place = angles[row * 6 + column][None]
            rotated.append(rotate(x, *rotary_tables(place)))
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score((1, 2), (3, 5)), score((2, 0), (4, 3)))
    assert (score((1, 2), (3, 5)) - score((1, 2), (5, 3))).abs() > 1e-4


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_and_its_gradients_follow_the_equation(weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2, 3, 4, 24, generator=generator)
    x, weight = (x[..., 4:20] * 3 + 1).requires_grad_(), torch.randn(16, generator=generator).requires_grad_()
    grad = grad[..., :16]
    rms_norm(x, weight if weighted else None, 1e-3).backward(grad)
    exact_x, exact_weight = (value.detach().double().requires_grad_() for value in (x, weight))
    expected = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (exact_weight if weighted else 1)
    expected.backward(grad.double())
    found = rms_norm(x, weight if weighted else None, 1e-3).double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for value, exact in ((x, exact_x), (weight, exact_weight)) if weighted else ((x, exact_x),):
        assert value.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(value.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)


def test_grouped_attention_equals_repeated_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 5, 8, generator=generator)
    k, v = torch.randn(2, 2, 2, 7, 8, generator=generator)
    scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 8**0.5
    expected = (scores.softmax(-1) @ v.repeat_interleave(3, 1)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, (k, v), None), expected)


def test_latents_not_divisible_by_the_patch_are_named() -> None:
    model = built(Strategy.UNIFORM)
    with pytest.raises(ValueError, match="9 x 9 are not divisible by the patch size 2"):
        model(latents(1, size=9), torch.tensor([0.5]), *pad_texts(texts(model, 3)))


def test_fuse_dit_names_layers_the_encoder_does_not_have() -> None:
    config = TINY_MODEL.model_copy(update={"fuse_layer_stride": 3})
    with pytest.raises(ValueError, match="block 2 would share layer 7"):
        build_model(config, Strategy.FUSE_DIT)


def test_fuse_dit_names_heads_unlike_the_encoders() -> None:
    model = build_model(TINY_MODEL, Strategy.FUSE_DIT)
    other = _random_shared(TINY_MODEL.model_copy(update={"num_kv_heads": 4}))
    with pytest.raises(ValueError, match=f"4 key and value heads of 8 channels, the model {KV_HEADS} of {HEAD_DIM}"):
        model.share_attention(other)  # type: ignore[operator]


def test_gradients_reach_every_parameter() -> None:
    for strategy in Strategy:
        model = built(strategy).requires_grad_(True)
        model(latents(2), torch.tensor([0.2, 0.7]), *pad_texts(texts(model, 3, 5))).square().sum().backward()
        silent = [
            name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
        ]
        assert not silent, (strategy, silent)


def test_sizes_of_the_tiny_model_are_those_of_the_tiny_llm(llm: ModelRef) -> None:
    from training.models.shared_attention import load_shared_attention

    shared = load_shared_attention(llm, TINY_MODEL.shared_layers)
    assert (shared.num_kv_heads, shared.head_dim) == (KV_HEADS, HEAD_DIM)
    assert shared.layers[1].k_proj.shape == (KV_HEADS * HEAD_DIM, TEXT_WIDTH)
    assert TINY_MODEL.num_text_layers == NUM_LAYERS
    assert isinstance(built(Strategy.STATIC), DiT)


def test_patches_start_orthogonal_and_residual_scale_shrinks_residual_branches() -> None:
    config = TINY_MODEL.model_copy(update={"residual_scale": 0.5})
    plain, scaled = (build_model(item, Strategy.UNIFORM).state_dict() for item in (TINY_MODEL, config))
    weight = plain["patch_in.weight"]
    gram = weight.T @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(len(gram)) * gram[0, 0], atol=1e-5, rtol=0)
    assert float(weight.var()) == pytest.approx(2 / sum(weight.shape), rel=0.1)
    for name, value in scaled.items():
        added = name.endswith(("attention.out.weight", "mlp.down.weight"))
        torch.testing.assert_close(value, plain[name] * (0.5 if added else 1.0))
