"""FuseDiT against its LLM, run jointly over [text; image] in one sequence."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from tests.tiny_models import write_causal_lm
from tests.training.conftest import HEAD_DIM, KV_HEADS, NUM_LAYERS, TINY_MODEL, pad_texts
from training.config import Strategy
from training.models.build import build_model
from training.models.fuse_dit import FuseDiT
from training.models.layers import rotary_tables, rotate
from training.models.shared_attention import load_shared_attention, shared_attention_of


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def llm_ref(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_causal_lm(tmp_path_factory.mktemp("llm"), family=request.param, num_layers=NUM_LAYERS)


def _load(ref: ModelRef) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ref.source, dtype=torch.float32).eval().requires_grad_(False)


def _model(ref: ModelRef) -> FuseDiT:
    model = build_model(TINY_MODEL, Strategy.FUSE_DIT, seed=0)
    assert isinstance(model, FuseDiT)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.share_attention(load_shared_attention(ref, TINY_MODEL.shared_layers))
    return model.requires_grad_(False)


def _text_projections(layer: Any, h: Tensor, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (S, heads, E) of an LLM layer, rotated."""
    attention, x = layer.self_attn, layer.input_layernorm(h)
    q, k, v = (
        part.unflatten(-1, (-1, HEAD_DIM)) for part in (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    frequencies = theta ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = (torch.arange(len(h))[:, None] * frequencies)[:, None]
    return rotate(q, *rotary_tables(angles)), rotate(k, *rotary_tables(angles)), v


def _joint_attention(q: Tensor, k: Tensor, v: Tensor, num_text: int) -> Tensor:
    """Text rows causal, image rows see everything; heads (T, heads, E) with repeated key and value heads."""
    total = len(q)
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    visible[num_text:] = True
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / HEAD_DIM**0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v).flatten(1)


def _run_jointly(llm: Any, model: FuseDiT, token_ids: Tensor, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Velocity and the text rows that enter each LLM layer, of one sequence [text; image] through both networks."""
    decoder, config = llm.model, model.config
    theta = llm.config.rope_parameters["rope_theta"]
    h = decoder.embed_tokens(token_ids)
    num_text, size = len(token_ids), config.latent_size // config.patch_size
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    frequencies = config.rope_theta ** -(torch.arange(0, HEAD_DIM // 2, 2) / (HEAD_DIM // 2))
    places = [(axis.flatten() + num_text)[:, None] * frequencies for axis in (rows, columns)]
    angles = torch.cat(places, dim=1)[:, None]
    x = model.patch_in(model._to_patches(latents))[0]
    entering = []
    for index, layer in enumerate(decoder.layers):
        entering.append(h)
        text_q, text_k, text_v = _text_projections(layer, h, theta)
        if index in config.shared_layers:
            block = model.blocks[config.shared_layers.index(index)]
            attention = block.attention
            heads = (attention.heads, attention.kv_heads, attention.kv_heads)
            parts = attention.qkv(block.attention_norm(x)).unflatten(-1, (-1, HEAD_DIM)).split(heads, dim=1)
            q = rotate(attention.q_norm(parts[0]), *rotary_tables(angles))
            k = rotate(attention.k_norm(parts[1]), *rotary_tables(angles))
            # The two networks may have different numbers of query heads: attend twice over the same keys and values.
            k, v = torch.cat([text_k, k]), torch.cat([text_v, parts[2]])
            no_text = torch.zeros(num_text, attention.heads, HEAD_DIM)
            no_image = torch.zeros(len(x), text_q.shape[1], HEAD_DIM)
            from_image = _joint_attention(torch.cat([no_text, q]), k, v, num_text)[num_text:]
            from_text = _joint_attention(torch.cat([text_q, no_image]), k, v, num_text)[:num_text]
            x = x + attention.out(from_image)
            x = x + block.mlp(block.mlp_norm(x))
        else:
            from_text = _joint_attention(text_q, text_k, text_v, num_text)
        h = h + layer.self_attn.o_proj(from_text)
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    out = model.patch_out(F.rms_norm(x, (config.hidden_size,), model.norm_out.weight, config.norm_eps))
    return model._to_latents(out[None], config.latent_size, config.latent_size), entering


def test_cached_keys_and_values_equal_running_the_llm_jointly(llm_ref: ModelRef) -> None:
    llm, model = _load(llm_ref), _model(llm_ref)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for num_tokens in (1, 6):
        token_ids = torch.arange(20, 20 + num_tokens)
        expected, entering = _run_jointly(llm, model, token_ids, latents)
        hidden_states = llm(token_ids[None], output_hidden_states=True).hidden_states
        for index, h in enumerate(entering):
            torch.testing.assert_close(h, hidden_states[index][0], atol=1e-5, rtol=1e-4)
        stored = torch.cat(hidden_states[1:])
        assert len(stored) == NUM_LAYERS
        velocity = model(latents, torch.tensor([0.5]), *pad_texts([model.prepare_text(stored)]))
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-4)


def test_weights_from_files_equal_those_of_the_loaded_model(llm_ref: ModelRef) -> None:
    from_files = load_shared_attention(llm_ref, TINY_MODEL.shared_layers)
    from_model = shared_attention_of(_load(llm_ref), TINY_MODEL.shared_layers)
    h = torch.randn(5, TINY_MODEL.text_width, generator=torch.Generator().manual_seed(0))
    for layer in TINY_MODEL.shared_layers:
        for a, b in zip(from_files.keys_values(layer, h), from_model.keys_values(layer, h), strict=True):
            assert a.shape == (KV_HEADS, 5, HEAD_DIM)
            torch.testing.assert_close(a, b)


def test_a_layer_the_encoder_does_not_have_is_named(llm_ref: ModelRef) -> None:
    with pytest.raises(ThroughlineError, match="no decoder layer 9"):
        load_shared_attention(llm_ref, (9,))


def test_other_rotary_positions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}')
    with pytest.raises(ThroughlineError, match="type 'yarn'"):
        load_shared_attention(ModelRef(id="scaled", revision="1", path=str(tmp_path)), (1,))
