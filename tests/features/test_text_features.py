import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

from features.checks import count_nonfinite
from features.config import TextFeaturesConfig
from features.feature_format import TextFeatureReader, TextFeatureWriter, feature_metadata
from features.text_encoder import EncodedText, TextEncoder
from features.text_features import STAGE
from pipelines.core.errors import ThroughlineError
from pipelines.dataset.feature_keys import feature_keys
from tests.features.conftest import caption_of, sample_key


@pytest.fixture
def config(models) -> TextFeaturesConfig:
    return TextFeaturesConfig(text_encoder=models["llama"], max_batch_tokens=64)


def test_stored_features_are_the_encoders_own(shards, config, tmp_path):
    output = STAGE.run(config, {"shards": [shards]}, tmp_path, "00000")
    encoder = TextEncoder.load(config.text_encoder, template_version=config.template_version)
    index = 0
    for path in output.files(".safetensors"):
        reader = TextFeatureReader(path)
        for key in reader.sample_keys:
            assert key == sample_key(index + 1)
            stored = reader.read_key(key)
            expected = encoder.encode([caption_of(index)])[0]
            assert torch.equal(stored.token_ids, expected.token_ids)
            torch.testing.assert_close(stored.hidden_states, expected.hidden_states, rtol=2**-7, atol=1e-5)
            index += 1
    assert index == 12
    assert output.manifest.summary["num_texts"] == 12
    assert output.manifest.models[0].role == "text_encoder"
    assert count_nonfinite(output) == 0


def test_files_are_read_by_the_safetensors_library_and_by_header(shards, config, tmp_path):
    output = STAGE.run(config, {"shards": [shards]}, tmp_path)
    for path in output.files(".safetensors"):
        with safe_open(path, framework="pt") as file:
            offsets = file.get_tensor("offsets")
            assert file.get_tensor("hidden_states").shape == (4, offsets[-1], 48)
            assert file.get_tensor("hidden_states").dtype == torch.bfloat16
            assert len(file.get_tensor("token_ids")) == offsets[-1]
        assert feature_keys(path) == TextFeatureReader(path).sample_keys


def test_a_killed_run_goes_on_and_gives_the_same_bytes(shards, config, tmp_path, monkeypatch):
    undisturbed = STAGE.run(config, {"shards": [shards]}, tmp_path / "a")
    written = []
    write = TextFeatureWriter.write

    def write_until_killed(self, index, text):
        if len(written) == 7:  # in the middle of the second shard
            raise KeyboardInterrupt
        written.append(index)
        write(self, index, text)

    monkeypatch.setattr(TextFeatureWriter, "write", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(config, {"shards": [shards]}, tmp_path / "b")
    monkeypatch.setattr(
        TextFeatureWriter, "write", lambda self, index, text: (written.append(index), write(self, index, text))
    )
    resumed = STAGE.run(config, {"shards": [shards]}, tmp_path / "b")
    assert len(written) == 7 + 4 + 3  # the first shard was not encoded again
    assert resumed.data_version == undisturbed.data_version


def test_nan_stops_the_stage_and_names_the_sample(shards, models, tmp_path):
    folder = tmp_path / "broken"
    model = AutoModel.from_pretrained(models["llama"].source)
    model.norm.weight.data[3] = float("nan")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(models["llama"].source) / name).read_bytes())
    broken = models["llama"].model_copy(update={"path": str(folder), "revision": "broken"})
    with pytest.raises(ThroughlineError, match=r"sample 0{20,}\w+: its text features hold NaN"):
        STAGE.run(TextFeaturesConfig(text_encoder=broken), {"shards": [shards]}, tmp_path / "out")


def test_features_of_another_encoder_or_template_are_refused(models, tmp_path):
    ref = models["llama"]
    path = tmp_path / "x.safetensors"
    text = EncodedText(
        token_ids=torch.ones(2, dtype=torch.int32), hidden_states=torch.ones(1, 2, 8, dtype=torch.bfloat16)
    )
    writer = TextFeatureWriter(path, [sample_key(1)], [2], 8, feature_metadata(ref, "plain-1", (1,)))
    writer.write(0, text)
    writer.close()
    reader = TextFeatureReader(path)
    reader.check(ref, "plain-1")
    with pytest.raises(ThroughlineError, match="template_version is 'plain-1', expected 'released-1'"):
        reader.check(ref, "released-1")
    with pytest.raises(ThroughlineError, match="encoder_revision"):
        reader.check(ref.model_copy(update={"revision": "other"}), "plain-1")
    with pytest.raises(ThroughlineError, match="no text features for sample"):
        reader.read_key(sample_key(2))


def test_count_nonfinite_finds_what_was_put_there(shards, config, tmp_path):
    output = STAGE.run(config, {"shards": [shards]}, tmp_path)
    path = output.files(".safetensors")[1]
    content = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    start = 8 + header_bytes + json.loads(content[8 : 8 + header_bytes])["hidden_states"]["data_offsets"][0]
    content[start : start + 4] = b"\xff\x7f\x80\x7f"  # NaN and infinity in bfloat16
    path.write_bytes(content)
    assert count_nonfinite(output) == 2


def test_threads_and_device_leave_the_result_alone(shards, config, tmp_path):
    one = STAGE.run(config, {"shards": [shards]}, tmp_path)
    assert (
        STAGE.fingerprint(config.model_copy(update={"num_threads": 2}), {"shards": [shards]})
        == one.manifest.fingerprint
    )


def test_unordered_layers_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        TextFeaturesConfig.model_validate({"text_encoder": {"id": "x", "revision": "1"}, "layers": [2, 1]})
