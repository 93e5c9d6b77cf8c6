"""The stage `text_features`: stored hidden states are the encoder's, whatever interrupts the run."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel

from features.config import TextFeaturesConfig
from features.feature_format import TextFeatureWriter, feature_metadata
from features.text_encoder import TextEncoder
from features.text_features import STAGE
from pipelines.core.errors import ThroughlineError
from pipelines.core.safetensors_file import SafetensorsFile, count_not_finite
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
        assert SafetensorsFile(path).metadata == feature_metadata(config.text_encoder, "released-1", (1, 2, 3, 4))
        stored = load_file(path)
        offsets = stored["offsets"].tolist()
        for key, (start, end) in zip(feature_keys(path), pairwise(offsets), strict=True):
            assert key == sample_key(index + 1)
            expected = encoder.encode([caption_of(index)])[0]
            assert torch.equal(stored["token_ids"][start:end], expected.token_ids)
            found = stored["hidden_states"][:, start:end]
            torch.testing.assert_close(found, expected.hidden_states, rtol=2**-7, atol=1e-5)
            index += 1
    assert index == 12
    assert output.manifest.summary["num_texts"] == 12
    assert output.manifest.models[0].role == "text_encoder"
    assert not any(count_not_finite(path) for path in output.files(".safetensors"))


def test_files_have_the_documented_layout(shards, config, tmp_path):
    output = STAGE.run(config, {"shards": [shards]}, tmp_path)
    for path in output.files(".safetensors"):
        with safe_open(path, framework="pt") as file:
            offsets = file.get_tensor("offsets")
            assert file.get_tensor("hidden_states").shape == (4, offsets[-1], 48)
            assert file.get_tensor("hidden_states").dtype == torch.bfloat16
            assert len(file.get_tensor("token_ids")) == offsets[-1]
            assert feature_keys(path) == [bytes(row).hex() for row in file.get_tensor("sample_keys").numpy()]


def test_a_killed_run_resumes_and_gives_the_same_bytes(shards, config, tmp_path, monkeypatch):
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


def test_threads_and_device_do_not_change_the_fingerprint(shards, config, tmp_path):
    one = STAGE.run(config, {"shards": [shards]}, tmp_path)
    assert (
        STAGE.fingerprint(config.model_copy(update={"num_threads": 2}), {"shards": [shards]})
        == one.manifest.fingerprint
    )


def test_unordered_layers_are_refused():
    with pytest.raises(ValueError, match="ascending"):
        TextFeaturesConfig.model_validate({"text_encoder": {"id": "x", "revision": "1"}, "layers": [2, 1]})
