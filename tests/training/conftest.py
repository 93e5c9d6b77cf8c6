"""A dataset of random latents and text features of a tiny random LLM, in the form of the stages before training."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from pipelines.core.config import FrozenConfig, ModelRef
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.units import StageRun
from pipelines.shards.format import ShardWriter
from tests.plain_stage import plain_stage
from tests.tiny_models import write_causal_lm
from training.config import CheckpointConfig, ModelConfig, Strategy, TrainingConfig
from training.data.feature_source import text_lengths
from training.models.kernels.ragged_texts import stack_texts

NUM_LAYERS, TEXT_WIDTH, KV_HEADS, HEAD_DIM = 4, 48, 2, 8  # of tests.tiny_models.write_causal_lm
TEMPLATE = "plain-1"

LATENT_METADATA = {
    "autoencoder_id": "tiny-vae", "autoencoder_revision": "1", "scaling_factor": "1.5", "shift_factor": "0.06",
}  # fmt: skip

TINY_MODEL = ModelConfig(
    hidden_size=24,
    num_blocks=3,
    num_heads=4,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    mlp_width=48,
    patch_size=2,
    latent_channels=4,
    latent_size=8,
    text_width=TEXT_WIDTH,
    num_text_layers=NUM_LAYERS,
    gate_width=32,
    fuse_first_layer=1,
)

TINY_TRAINING = TrainingConfig(
    steps=6,
    batch_size=8,
    learning_rate=2e-3,
    warmup_steps=2,
    ema_decay=0.9,
    validate_every=3,
    num_validation_samples=4,
    checkpoint_every=2,
    threads=1,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return write_causal_lm(tmp_path_factory.mktemp("llm"), num_layers=NUM_LAYERS)


@dataclass(frozen=True)
class TinyData:
    """Inputs of the stage `checkpoint`, and their text encoder."""

    inputs: Inputs
    llm: ModelRef
    root: Path

    def config(self, strategy: Strategy, **training: object) -> CheckpointConfig:
        return CheckpointConfig(
            strategy=strategy,
            model=TINY_MODEL,
            training=TINY_TRAINING.model_copy(update=training),
            text_encoder=self.llm,
            template_version=TEMPLATE,
        )

    def without(self, name: str) -> "TinyData":
        return TinyData({key: items for key, items in self.inputs.items() if key != name}, self.llm, self.root)

    def with_text_features(self, outputs: list[StageOutput], root: Path) -> "TinyData":
        """The same samples, with other text features."""
        samples = self.inputs["dataset"][0].path("samples.parquet").read_bytes()
        parts = {**self.inputs, "text_features": outputs}
        parts.pop("dataset")
        dataset = publish("dataset", {"samples.parquet": samples}, root, parts, None)
        return TinyData({"dataset": [dataset], **parts}, self.llm, root)


class _Files(FrozenConfig):
    text_encoder: ModelRef | None = None


def publish(
    name: str, files: dict[str, bytes], root: Path, inputs: Inputs, partition: str | None, model: ModelRef | None = None
) -> StageOutput:
    def produce(run: StageRun[_Files]) -> None:
        with run.unit("all") as unit:
            for path, data in files.items():
                unit.write(path, data)

    stage = plain_stage(name=name, code_version="1", config_type=_Files, produce=produce)
    return stage.run(_Files(text_encoder=model), inputs, root, partition)


def _captions(num: int, start: int) -> list[str]:
    words = ["red", "dog", "house", "left of", "a blue star", "two", "on green"]
    return [" ".join(words[: 1 + (start + index) % len(words)]) + f" {start + index}" for index in range(num)]


def _shard(keys: list[bytes], captions: list[str]) -> bytes:
    stream = io.BytesIO()
    writer = ShardWriter(stream, "shard-00000.tar")
    for key, caption in zip(keys, captions, strict=True):
        writer.add(key.hex(), b"no image", caption, {"sample_key": key.hex(), "caption": caption})
    writer.finish()
    return stream.getvalue()


def _with_sorted_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which the library writes in random order."""
    num_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + num_bytes])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + num_bytes :]


def _text_features(keys: list[bytes], captions: list[str], llm: ModelRef) -> bytes:
    from features.text_encoder import TextEncoder

    encoder = TextEncoder.load(llm, template_version=TEMPLATE)
    encoded = encoder.encode(captions)
    lengths = [len(text.token_ids) for text in encoded]
    tensors = {
        "sample_keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
        "offsets": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64),
        "token_ids": torch.cat([torch.as_tensor(text.token_ids) for text in encoded]).to(torch.int32),
        "hidden_states": torch.cat([text.hidden_states for text in encoded], dim=1).to(torch.bfloat16).contiguous(),
    }
    return text_feature_file(tensors, llm)


def text_feature_file(tensors: dict[str, torch.Tensor], llm: ModelRef) -> bytes:
    """Return a file of the stage `text_features` with all layers."""
    from features.feature_format import feature_metadata

    return _with_sorted_metadata(save(tensors, metadata=feature_metadata(llm, TEMPLATE, range(1, NUM_LAYERS + 1))))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, llm: ModelRef) -> TinyData:
    return write_tiny_data(tmp_path_factory.mktemp("inputs"), llm)


def write_tiny_data(root: Path, llm: ModelRef) -> TinyData:
    """Two parts of 12 and 9 samples, 4 of them held out; the same bytes every time."""
    random = np.random.default_rng(0)
    shards, latents, text_features, rows = [], [], [], []
    for part, count in (("00000", 12), ("00001", 9)):
        keys = sorted(random.bytes(16) for _ in range(count))
        captions = _captions(count, start=int(part) * 100)
        generator = torch.Generator().manual_seed(int(part))
        tensors = {
            "sample_keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8),
            "mean": torch.randn(count, 4, 1, 1, generator=generator)
            + 0.1 * torch.randn(count, 4, 8, 8, generator=generator),
            "std": torch.rand(count, 4, 8, 8, generator=generator) * 0.1,
        }
        latent_bytes = _with_sorted_metadata(save(tensors, metadata={**LATENT_METADATA}))
        shards.append(publish("shards", {"shard-00000.tar": _shard(keys, captions)}, root, {}, part))
        latents.append(publish("latents", {"latents-00000.safetensors": latent_bytes}, root, {}, part))
        features = {"text_features-00000.safetensors": _text_features(keys, captions, llm)}
        text_features.append(publish("text_features", features, root, {}, part, llm))
        rows += [(key.hex(), part, "shard-00000.tar", index) for index, key in enumerate(keys)]
    rows.sort()
    split = ["validation" if index % 5 == 0 and index < 20 else "train" for index in range(len(rows))]
    columns = dict(
        zip(("sample_key", "part", "shard", "index_in_shard"), map(list, zip(*rows, strict=True)), strict=True)
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({**columns, "split": split}), sink)
    parts = {"shards": shards, "latents": latents, "text_features": text_features}
    dataset = publish("dataset", {"samples.parquet": sink.getvalue()}, root, parts, None)
    return TinyData({"dataset": [dataset], **parts}, llm, root)


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stack prepared texts (K, S_i, C') to (K, B, S, C') fp32, with their `text_lengths`."""
    return stack_texts(tuple(texts)), *text_lengths(texts)
