import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from features.text_encoder import TextEncoder, length_sorted_batches
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError

TEXTS = ["A red dog.", "", "Three yellow stars and one purple cat on a green background, left of a house.", "No."]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_vl"])
def test_hidden_states_are_those_of_the_whole_model(models, family):
    ref = models[family]
    auto_class = AutoModelForImageTextToText if family == "qwen3_vl" else AutoModelForCausalLM
    whole = auto_class.from_pretrained(ref.source)
    tokenizer = AutoTokenizer.from_pretrained(ref.source)
    encoded = TextEncoder.load(ref, template_version="released-1").encode(TEXTS)
    for text, got in zip(TEXTS, encoded, strict=True):
        ids = tokenizer("Describe this image." + text, return_tensors="pt").input_ids
        expected = whole(input_ids=ids, output_hidden_states=True).hidden_states
        assert got.token_ids.tolist() == ids[0].tolist()
        assert got.hidden_states.shape == (len(expected) - 1, ids.shape[1], whole.config.get_text_config().hidden_size)
        for layer, states in enumerate(expected[1:]):
            torch.testing.assert_close(got.hidden_states[layer].float(), states[0], rtol=1e-2, atol=1e-4)


def test_last_entry_comes_after_the_final_norm(models):
    ref = models["llama"]
    whole = AutoModelForCausalLM.from_pretrained(ref.source)
    encoded = TextEncoder.load(ref, template_version="plain-1").encode(["A red dog."])[0]
    logits = whole.lm_head(encoded.hidden_states[-1].float())
    expected = whole(input_ids=encoded.token_ids[None].long()).logits[0]
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_vl"])
def test_a_text_does_not_depend_on_its_batch(models, family):
    encoder = TextEncoder.load(models[family], template_version="released-1")
    together = encoder.encode(TEXTS, max_batch_tokens=4096)
    for text, among_others in zip(TEXTS, together, strict=True):
        alone = encoder.encode([text])[0]
        assert torch.equal(alone.token_ids, among_others.token_ids)
        # One unit in the last place of bfloat16: another batch may order fp32 sums differently.
        torch.testing.assert_close(alone.hidden_states, among_others.hidden_states, rtol=2**-7, atol=1e-5)


def test_layers_are_numbered_as_in_transformers(models):
    everything = TextEncoder.load(models["llama"], template_version="plain-1").encode(["A red dog."])[0]
    some = TextEncoder.load(models["llama"], template_version="plain-1", layers=(1, 3)).encode(["A red dog."])[0]
    assert torch.equal(some.hidden_states, everything.hidden_states[[0, 2]])


def test_a_layer_that_the_model_lacks_is_refused(models):
    with pytest.raises(ThroughlineError, match="layers 1 to 4"):
        TextEncoder.load(models["llama"], template_version="plain-1", layers=(5,))


def test_long_texts_are_truncated_and_flagged(models):
    encoder = TextEncoder.load(models["llama"], template_version="plain-1", max_tokens=5)
    short, long = encoder.encode(["No.", "Name every visible object with its number."])
    assert (short.was_truncated, long.was_truncated) == (False, True)
    assert long.hidden_states.shape[1] == 5


def test_the_empty_text_has_one_token_where_the_template_adds_none(models):
    encoder = TextEncoder.load(models["llama"], template_version="plain-1")
    assert encoder.encode([""])[0].hidden_states.shape[1] == 1
    assert encoder.encode([]) == []


def test_a_missing_model_is_one_message(tmp_path):
    ref = ModelRef(id="nowhere", revision="1", path=str(tmp_path / "nowhere"))
    with pytest.raises(ThroughlineError, match="nowhere"):
        TextEncoder.load(ref, template_version="plain-1")


@given(st.lists(st.integers(1, 40)), st.integers(1, 120))
def test_batches_contain_every_text_once_within_the_limit(lengths, max_batch_tokens):
    batches = length_sorted_batches(lengths, max_batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_batch_tokens
