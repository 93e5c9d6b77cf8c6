"""vLLM in Ray actors: answers equal those of transformers, and survive a killed engine."""

import io
import os
import signal

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipelines.core.errors import ThroughlineError
from recaption.ray_pool import engine_pool
from tests.recaption.conftest import POOL, noise_jpeg, request

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def transformers_model(vlm):
    return AutoProcessor.from_pretrained(vlm.source), AutoModelForImageTextToText.from_pretrained(vlm.source)


def _inputs(processor, seed, text):
    content = [{"type": "image", "image": Image.open(io.BytesIO(noise_jpeg(seed)))}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip


def _ask(pool, requests):
    return dict(pool.answer([("all", requests)]))["all"]


def test_answers_equal_greedy_decoding_by_transformers_in_fp32(pool, transformers_model):
    processor, model = transformers_model
    requests = [request(seed) for seed in range(8)]
    for seed, answer in enumerate(_ask(pool, requests)):
        inputs = _inputs(processor, seed, requests[seed].text)
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new_ids = output[0, inputs["input_ids"].shape[1] :]
        # vLLM omits an incomplete UTF-8 character at the end; the random model produces such.
        expected = processor.tokenizer.decode(new_ids, skip_special_tokens=True).strip().rstrip("\ufffd")
        assert answer.text.rstrip("\ufffd") == expected
        assert answer.num_prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.num_answer_tokens == len(new_ids)
        assert answer.finish_reason == ("stop" if new_ids[-1] == processor.tokenizer.eos_token_id else "length")


def test_logprobs_of_yes_and_no_equal_those_of_transformers(pool, transformers_model):
    processor, model = transformers_model
    requests = [request(seed, "Yes or No?", 1, want_logprobs_of=("Yes", "No")) for seed in range(4)]
    for seed, answer in enumerate(_ask(pool, requests)):
        with torch.no_grad():
            logits = model(**_inputs(processor, seed, "Yes or No?")).logits[0, -1]
        expected = torch.log_softmax(logits.float(), dim=-1)
        for word in ("Yes", "No"):
            token_id = processor.tokenizer.convert_tokens_to_ids(word)
            assert answer.logprobs[word] == pytest.approx(expected[token_id].item(), abs=1e-3)


def test_a_request_that_cannot_be_served_fails_alone(pool):
    good, bad = request(1), request(1).__class__(image_bytes=b"not an image", text="?", max_tokens=2)
    too_long = request(1, "Yes " * 3000)
    first, unreadable, rejected, last = _ask(pool, [good, bad, too_long, good])
    assert (unreadable.finish_reason, rejected.finish_reason) == ("error", "error")
    assert "unreadable image" in unreadable.error
    assert "512" in rejected.error
    assert first.text == last.text == _ask(pool, [good])[0].text


def test_the_same_configuration_returns_the_same_pool(pool, engine_config):
    assert engine_pool(engine_config, POOL) is pool


def test_batches_of_a_killed_engine_are_retried_and_none_is_lost_or_repeated(pool):
    batches = {number: [request(10 * number + row) for row in range(6)] for number in range(8)}
    uninterrupted = dict(pool.answer(batches.items()))
    pids = pool.engine_pids()

    def batches_with_a_kill():
        for number, requests in batches.items():
            if number == 4:
                os.kill(pool.engine_pids()[0], signal.SIGKILL)
            yield number, requests

    answered = list(pool.answer(batches_with_a_kill()))
    assert sorted(number for number, _ in answered) == sorted(batches)
    assert dict(answered) == uninterrupted
    assert pool.engine_pids() != pids


def test_a_caller_that_stops_early_leaves_the_pool_usable(pool):
    answers = pool.answer((number, [request(number)]) for number in range(6))
    next(answers)
    answers.close()
    assert len(dict(pool.answer((number, [request(number)]) for number in range(6)))) == 6


def test_a_missing_model_is_reported_in_one_sentence(pool, engine_config, tmp_path):
    missing = engine_config.model.model_copy(update={"id": "nowhere", "path": str(tmp_path)})
    from recaption.ray_pool import RayPool

    # It needs no CPU of its own: the only one is in use.
    other = RayPool(
        engine_config.model_copy(update={"model": missing}), POOL.model_copy(update={"num_cpus_per_actor": 0.0})
    )
    with pytest.raises(ThroughlineError, match="nowhere: no model at"):
        other.start()
    other.close()
