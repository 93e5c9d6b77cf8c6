"""The stage `latents`: stored posteriors are the autoencoder's, whatever interrupts the run."""

import io

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from features.autoencoder import Autoencoder
from features.config import LatentsConfig
from features.latent_format import LatentWriter
from features.latents import STAGE
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.core.safetensors_file import SafetensorsFile, count_not_finite
from pipelines.dataset.feature_keys import feature_keys
from tests.features.conftest import IMAGE_PX, image_of, sample_key


@pytest.fixture
def config(autoencoder) -> LatentsConfig:
    return LatentsConfig(autoencoder=autoencoder, image_px=IMAGE_PX, batch_size=3)


def test_stored_latents_are_the_posterior_of_the_images(shards, config, tmp_path):
    output = STAGE.run(config, {"shards": [shards]}, tmp_path)
    model = AutoencoderKL.from_pretrained(config.autoencoder.source)
    index = 0
    for path in output.files(".safetensors"):
        stored, metadata = load_file(path), SafetensorsFile(path).metadata
        assert (metadata["scaling_factor"], metadata["shift_factor"]) == ("1.5", "0.06")
        for row, key in enumerate(feature_keys(path)):
            assert key == sample_key(index + 1)
            pixels = np.asarray(Image.open(io.BytesIO(image_of(index))), dtype=np.float32) / 127.5 - 1
            with torch.no_grad():
                expected = model.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None]).latent_dist
            mean, std = stored["mean"][row], stored["std"][row]
            torch.testing.assert_close(mean.float(), expected.mean[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(std.float(), expected.std[0], rtol=1e-3, atol=1e-3)
            index += 1
    assert index == 12
    assert output.manifest.summary == {
        "num_images": 12, "shape": [4, 8, 8], "scaling_factor": 1.5, "shift_factor": 0.06,
    }  # fmt: skip
    assert not any(count_not_finite(path) for path in output.files(".safetensors"))


def test_a_killed_run_resumes_and_gives_the_same_bytes(shards, config, tmp_path, monkeypatch):
    undisturbed = STAGE.run(config, {"shards": [shards]}, tmp_path / "a")
    starts = []
    write = LatentWriter.write

    def write_until_killed(self, start, mean, std):
        starts.append(start)
        if len(starts) == 4:  # in the middle of the second shard
            raise KeyboardInterrupt
        write(self, start, mean, std)

    monkeypatch.setattr(LatentWriter, "write", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(config, {"shards": [shards]}, tmp_path / "b")
    monkeypatch.undo()
    resumed = STAGE.run(config, {"shards": [shards]}, tmp_path / "b")
    assert resumed.data_version == undisturbed.data_version


def test_scale_and_unscale_are_inverse_and_follow_the_models_factors(autoencoder):
    model = Autoencoder.load(autoencoder)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.scale(latents), (latents - 0.06) * 1.5)
    torch.testing.assert_close(model.unscale(model.scale(latents)), latents)


def test_decode_gives_images_of_the_original_size(autoencoder):
    model = Autoencoder.load(autoencoder)
    images = np.random.default_rng(0).integers(0, 256, (2, IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    mean, std = model.encode(images)
    assert (
        mean.shape == std.shape == (2, model.latent_channels, IMAGE_PX // model.downscale, IMAGE_PX // model.downscale)
    )
    decoded = model.decode(mean)
    assert decoded.shape == images.shape
    assert decoded.dtype == np.uint8


def test_images_of_another_size_are_refused(shards, config, tmp_path):
    with pytest.raises(ThroughlineError, match=rf"image of {IMAGE_PX} x {IMAGE_PX} px, expected 64 square"):
        STAGE.run(config.model_copy(update={"image_px": 64}), {"shards": [shards]}, tmp_path)


def test_overflow_of_the_stored_type_names_the_sample(tmp_path):
    writer = LatentWriter(tmp_path / "x", [sample_key(1), sample_key(2)], (1, 1, 1), "float16", {})
    mean = torch.tensor([1.0, 1e5]).reshape(2, 1, 1, 1)
    with pytest.raises(ThroughlineError, match=sample_key(2)):
        writer.write(0, mean, torch.ones_like(mean))


def test_a_part_without_shards_gives_an_empty_output(shards, config, tmp_path):
    empty = shards.__class__(shards.folder, shards.manifest.model_copy(update={"files": ()}))
    output = STAGE.run(config, {"shards": [empty]}, tmp_path)
    assert output.manifest.files == ()
    assert output.manifest.conservation is not None and output.manifest.conservation.rows_in == 0


def test_a_missing_model_is_one_message(shards, tmp_path):
    ref = ModelRef(id="nowhere", revision="1", path=str(tmp_path))
    with pytest.raises(ThroughlineError, match="autoencoder nowhere: cannot be loaded"):
        STAGE.run(LatentsConfig(autoencoder=ref), {"shards": [shards]}, tmp_path / "out")
