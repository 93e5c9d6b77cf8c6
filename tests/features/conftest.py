"""A part's shards with real images, and tiny random models."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from pipelines.shards.format import ShardWriter
from tests.plain_stage import plain_stage
from tests.tiny_models import write_autoencoder, write_causal_lm, write_qwen3_vl

IMAGE_PX = 32
CAPTIONS = (
    "Two red dogs left of a blue house.",
    "",
    "A star.",
    "One dense caption that is longer than all the others, with every visible object, its number and its colour.",
    "Three yellow stars and one purple cat on a green background.",
)


class _ShardsConfig(FrozenConfig):
    samples_per_shard: tuple[int, ...] = (5, 4, 3)


def sample_key(index: int) -> str:
    return f"{index * 7919:032x}"


def caption_of(index: int) -> str:
    return CAPTIONS[index % len(CAPTIONS)] * (1 + index // len(CAPTIONS))


def image_of(index: int) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def _produce(run: StageRun[_ShardsConfig]) -> None:
    index = 0
    for number, count in enumerate(run.config.samples_per_shard):
        with run.unit(f"{number:05d}") as unit:
            name = f"shard-{number:05d}.tar"
            with unit.open(name, num_rows=count) as stream:
                writer = ShardWriter(stream, name)
                for _ in range(count):
                    key, caption = sample_key(index + 1), caption_of(index)
                    writer.add(key, image_of(index), caption, {"sample_key": key, "caption": caption})
                    index += 1
                writer.finish()
            unit.account(rows_in=count, rows_out=count)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> StageOutput:
    stage = plain_stage(name="shards", code_version="1", config_type=_ShardsConfig, produce=_produce)
    return stage.run(_ShardsConfig(), {}, tmp_path_factory.mktemp("shards"), partition="00000")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelRef]:
    """Text encoders by family: "llama", "qwen3", "qwen3_vl"."""
    folder: Path = tmp_path_factory.mktemp("models")
    return {
        "llama": write_causal_lm(folder / "llama"),
        "qwen3": write_causal_lm(folder / "qwen3", family="qwen3"),
        "qwen3_vl": write_qwen3_vl(folder / "qwen3_vl"),
    }


@pytest.fixture(scope="session")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_autoencoder(tmp_path_factory.mktemp("vae"))
