"""The inputs of training: the unconditional text, online and stored features, invalid features."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from features.templates import PromptDropForm
from features.text_encoder import EncodedText, TextEncoder
from pipelines.core.errors import ThroughlineError
from pipelines.dataset.samples import ShardSamples
from tests.tiny_models import write_autoencoder
from tests.training.conftest import TinyData, publish, text_feature_file
from training.config import CheckpointConfig, Strategy
from training.data.feature_source import FeatureSource, load_text_encoder
from training.data.online_text import OnlineText
from training.loop import loop
from training.loop.checkpoint import STAGE
from training.models.build import build_model
from training.models.saved_model import ConditioningRecord, read_conditioning
from training.sampling.sampler import load_sampler


def _config(data: TinyData, **training: Any) -> CheckpointConfig:
    settings = {"steps": 2, "warmup_steps": 0, "text_dtype": "bfloat16", **training}
    return data.config(Strategy.STATIC, **settings).model_copy(update={"template_version": "released-1"})


@pytest.mark.parametrize("form", ["instruction", "empty"])
def test_training_and_sampling_use_the_same_unconditional_text(
    form: PromptDropForm, tiny_data: TinyData, tmp_path: Path
) -> None:
    config, inputs = _config(tiny_data, prompt_drop_form=form), tiny_data.without("text_features").inputs
    text = {"instruction": "Describe this image.", "empty": ""}[form]
    expected = load_text_encoder(tiny_data.llm, "plain-1").encode([text])[0].hidden_states
    assert expected.shape[1] == 1 if form == "empty" else expected.shape[1] > 3
    model = build_model(config.model, config.strategy)
    read = FeatureSource(config, inputs, model.prepare_text).unconditional
    assert torch.equal(read, model.prepare_text(expected.float()).bfloat16())

    checkpoint = STAGE.run(config, inputs, tmp_path / "out", "static")
    assert read_conditioning(checkpoint).prompt_drop_form == form
    autoencoder = write_autoencoder(tmp_path / "vae").model_copy(update={"revision": "1"})
    sampler = load_sampler(checkpoint, tiny_data.llm, autoencoder)
    no_prompt, prompt = sampler.encode(["", "a dog"])
    assert torch.equal(no_prompt, expected)
    in_template = load_text_encoder(tiny_data.llm, "released-1").encode(["a dog"])[0].hidden_states
    assert torch.equal(prompt, in_template)


def test_the_encoder_reads_a_caption_only_when_a_batch_needs_it(
    tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = TextEncoder.encode

    def noted(self: TextEncoder, captions: Sequence[str], *args: Any, **kwargs: Any) -> list[EncodedText]:
        read.extend(captions)
        return original(self, captions, *args, **kwargs)

    monkeypatch.setattr(TextEncoder, "encode", noted)
    config, inputs = tiny_data.config(Strategy.STATIC), tiny_data.without("text_features").inputs
    source = FeatureSource(config, inputs, build_model(config.model, config.strategy).prepare_text)
    assert set(read) <= {""}
    drawn = source.text("train", 3)
    assert len(read) - read.count("") == 1
    assert source.text("train", 3) is drawn, "cached, and not encoded again"
    stored = FeatureSource(config, tiny_data.inputs, build_model(config.model, config.strategy).prepare_text)
    torch.testing.assert_close(drawn, stored.text("train", 3), atol=0.05, rtol=0.05)  # stored as bfloat16, in a batch


def test_prefetched_texts_are_encoded_together(tiny_data: TinyData) -> None:
    calls: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self.encoder = load_text_encoder(tiny_data.llm, "plain-1")

        def encode(self, captions: Sequence[str], *args: Any, **kwargs: Any) -> list[EncodedText]:
            calls.append(len(captions))
            return self.encoder.encode(captions, *args, **kwargs)

    encoder = Counted()
    samples = ShardSamples.of_dataset(tiny_data.inputs["dataset"][0], tiny_data.inputs["shards"], "train")
    alone, together = (
        OnlineText(samples, lambda: encoder, device)  # type: ignore[arg-type, return-value]
        for device in (torch.device("cpu"), torch.device("meta"))
    )
    for text in (alone, together):
        text.prefetch([5, 2, 5])
    assert calls == [2], "one by one on a CPU, where rounding must not depend on the batch"
    for index in (2, 5):
        torch.testing.assert_close(together.hidden_states(index), alone.hidden_states(index), atol=0.05, rtol=0.05)
    assert calls == [2, 1, 1]


MAX_TOKENS = 12


@pytest.fixture
def short_sighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text encoder that reads few tokens, so that some captions are truncated."""

    def load(*args: Any) -> TextEncoder:
        encoder = load_text_encoder(*args)
        encoder.max_tokens = MAX_TOKENS
        return encoder

    monkeypatch.setattr("training.data.feature_source.load_text_encoder", load)


@pytest.mark.slow
@pytest.mark.usefixtures("short_sighted")
def test_truncated_captions_are_counted_in_every_layout_and_logged_once(
    tiny_data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = tiny_data.without("text_features").inputs
    config = tiny_data.config(Strategy.STATIC, prompt_drop=0.0)
    samples = ShardSamples.of_dataset(inputs["dataset"][0], inputs["shards"], "train")
    encoder = load_text_encoder(tiny_data.llm, "plain-1")
    lengths = encoder.count_tokens([sample.caption for sample in samples])
    expected = sum(length > MAX_TOKENS for length in lengths)
    assert 0 < expected < len(lengths)
    with caplog.at_level(logging.WARNING):
        whole = STAGE.run(config, inputs, tmp_path / "whole", "static")
    assert whole.manifest.summary["num_truncated_captions"] == expected
    (message,) = [record.getMessage() for record in caplog.records if record.name == "training.loop.loop"]
    assert "in its template is longer than the text encoder reads" in message
    assert "shorten captions (captions.max_caption_tokens)" in message

    split = config.training.model_copy(update={"accumulation_steps": 2})
    summary = STAGE.run(
        config.model_copy(update={"training": split}), inputs, tmp_path / "split", "static"
    ).manifest.summary
    assert summary["num_truncated_captions"] == expected

    original = loop.train_step

    def killed(run: loop.TrainingRun, step: int) -> loop.StepResult:
        if step == 5:  # after snapshots that hold all samples as seen
            raise KeyboardInterrupt
        return original(run, step)

    monkeypatch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(config, inputs, tmp_path / "killed", "static")
    monkeypatch.setattr(loop, "train_step", original)
    caplog.clear()
    assert STAGE.run(config, inputs, tmp_path / "killed", "static").data_version == whole.data_version
    assert not [record for record in caplog.records if record.name == "training.loop.loop"], "logged before the kill"


@pytest.mark.slow
def test_truncation_of_stored_features_is_not_counted(tiny_data: TinyData, tmp_path: Path) -> None:
    config = tiny_data.config(Strategy.STATIC, steps=1, warmup_steps=0)
    whole_texts = tiny_data.without("text_features").inputs
    for inputs, expected in ((tiny_data.inputs, None), (whole_texts, 0)):
        output = STAGE.run(config, inputs, tmp_path, "static")
        assert output.manifest.summary["num_truncated_captions"] == expected


def test_a_checkpoint_without_a_drop_form_was_trained_with_the_instruction() -> None:
    known = {
        "strategy": "joint", "text_encoder_id": "e", "text_encoder_revision": "1", "template_version": "released-1",
        "autoencoder_id": "a", "autoencoder_revision": "1", "autoencoder_subfolder": None, "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }  # fmt: skip
    assert ConditioningRecord.model_validate(known).prompt_drop_form == "instruction"


def test_a_text_without_tokens_names_its_sample(tiny_data: TinyData, tmp_path: Path) -> None:
    features = tiny_data.inputs["text_features"]
    tensors = load_file(features[0].files(".safetensors")[0])
    offsets = tensors["offsets"].clone()
    offsets[4] = offsets[3]  # the fourth text of the part loses its tokens to the fifth
    key = bytes(tensors["sample_keys"][3].tolist()).hex()
    emptied = text_feature_file(tensors | {"offsets": offsets}, tiny_data.llm)
    spoiled = publish(
        "text_features", {"text_features-00000.safetensors": emptied}, tmp_path, {}, "00000", tiny_data.llm
    )
    data = tiny_data.with_text_features([spoiled, features[1]], tmp_path)
    with pytest.raises(ThroughlineError, match=f"sample {key}: a text of no tokens cannot condition an image"):
        STAGE.run(data.config(Strategy.STATIC), data.inputs, tmp_path / "out", "static")
    assert not list(tmp_path.glob("out/checkpoint/*/manifest.json"))
