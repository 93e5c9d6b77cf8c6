"""The inputs of training: latents and text features of the dataset's samples.

Shapes: B batch, L LLM layers, S text tokens, C channels, h and w latent height and width; K rows of prepared text, as
the model's `prepare_text` returns them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from features.templates import unconditional_template
from pipelines.core.config import ModelRef
from pipelines.core.environment import local_rank
from pipelines.core.errors import ThroughlineError
from pipelines.core.safetensors_file import SafetensorsFile
from pipelines.dataset.samples import ShardSamples
from pipelines.runner.outputs import Inputs, StageOutput
from training.config import CheckpointConfig
from training.data.online_text import OnlineText
from training.models.kernels.ragged_texts import Prepared, stack_texts

if TYPE_CHECKING:
    from features.text_encoder import TextEncoder

TRAIN, VALIDATION = "train", "validation"
_KEY_BYTES = 16


class RowIndex:
    """File and row of each sample of a split, looked up by key once."""

    def __init__(self, paths: Sequence[Path], wanted: np.ndarray, stage: str) -> None:
        """`wanted` is uint8 (n, 16). Raises ThroughlineError that names a key missing from all files of `stage`."""
        self.files = [SafetensorsFile(path) for path in paths]
        keys = [file.array("sample_keys") for file in self.files]
        file_of = np.repeat(np.arange(len(keys)), [len(part) for part in keys])
        row_of = np.concatenate([np.arange(len(part)) for part in keys]) if keys else np.zeros(0, dtype=np.int64)
        flat = _as_words(np.concatenate([np.array(part) for part in keys]) if keys else wanted[:0])
        order = np.argsort(flat, kind="stable")
        positions = np.searchsorted(flat[order], _as_words(wanted))
        is_present = positions < len(order)
        is_present[is_present] = flat[order[positions[is_present]]] == _as_words(wanted)[is_present]
        if not is_present.all():
            missing = bytes(wanted[int(np.argmin(is_present))]).hex()
            raise ThroughlineError(
                f"{stage}: {int((~is_present).sum())} of the dataset's samples are missing, the first is {missing}; "
                f"re-run {stage} for the part that holds them"
            )
        self.file_of, self.row_of = file_of[order[positions]], row_of[order[positions]]

    def __getitem__(self, index: int) -> tuple[SafetensorsFile, int]:
        return self.files[self.file_of[index]], int(self.row_of[index])


def _as_words(keys: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 -> (n,) pairs of big-endian words, which sort and compare like the keys."""
    return np.ascontiguousarray(keys).view(np.dtype([("high", ">u8"), ("low", ">u8")])).reshape(-1)


@dataclass(frozen=True)
class Split:
    """The samples of one split, sorted by key."""

    sample_keys: np.ndarray
    """uint8 (n, 16)"""
    parts: list[str]
    shards: list[str]
    rows: np.ndarray
    """int32 (n,), each sample's index in its shard."""

    def first(self, count: int) -> "Split":
        """Return the split's first samples."""
        return Split(self.sample_keys[:count], self.parts[:count], self.shards[:count], self.rows[:count])

    def __len__(self) -> int:
        return len(self.sample_keys)

    def key(self, index: int) -> str:
        return bytes(self.sample_keys[index]).hex()


def read_splits(dataset: StageOutput) -> dict[str, Split]:
    """Return the training and the validation split of a dataset."""
    import pyarrow.parquet as pq

    table = pq.read_table(
        dataset.path("samples.parquet"), columns=["sample_key", "part", "shard", "index_in_shard", "split"]
    )
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    splits = {}
    for name in (TRAIN, VALIDATION):
        rows = [row for row, split in enumerate(columns["split"]) if split == name]
        key_bytes = b"".join(_key_bytes(columns["sample_key"][row]) for row in rows)
        splits[name] = Split(
            sample_keys=np.frombuffer(key_bytes, dtype=np.uint8).reshape(-1, _KEY_BYTES),
            parts=[columns["part"][row] for row in rows],
            shards=[columns["shard"][row] for row in rows],
            rows=np.array([columns["index_in_shard"][row] for row in rows], dtype=np.int32),
        )
    if not len(splits[TRAIN]):
        raise ThroughlineError(f"dataset {dataset.data_version}: no training samples; lower its validation share")
    return splits


def _key_bytes(key: str | bytes) -> bytes:
    return key if isinstance(key, bytes) else bytes.fromhex(key)


class LatentReader:
    """Latents of one split: samples of the autoencoder's posterior, scaled for training."""

    def __init__(self, outputs: Sequence[StageOutput], split: Split) -> None:
        paths = [path for output in outputs for path in output.files(".safetensors")]
        self._rows = RowIndex(paths, split.sample_keys, "latents")
        self.metadata = _common_metadata(self._rows.files, "latents")
        self.scaling_factor = float(self.metadata.get("scaling_factor", 1.0))
        self.shift_factor = float(self.metadata.get("shift_factor") or 0.0)
        self.shape: tuple[int, ...] = tuple(self._rows.files[0].array("mean").shape[1:])

    def read(self, index: int, posterior_noise: np.ndarray | None) -> np.ndarray:
        """Return (mean + std * noise - shift) * scale as (C, h, w) fp32; without noise the posterior's mean."""
        file, row = self._rows[index]
        latents = file.array("mean")[row].astype(np.float32)
        if posterior_noise is not None:
            latents += file.array("std")[row].astype(np.float32) * posterior_noise
        return (latents - self.shift_factor) * self.scaling_factor


class StoredText:
    """Text features of one split, as the stage `text_features` stored them."""

    def __init__(self, outputs: Sequence[StageOutput], split: Split) -> None:
        paths = [path for output in outputs for path in output.files(".safetensors")]
        self._rows = RowIndex(paths, split.sample_keys, "text_features")
        self.metadata = _common_metadata(self._rows.files, "text_features")

    def prefetch(self, indices: Sequence[int]) -> None:
        """Do nothing: files are mapped."""

    def hidden_states(self, index: int) -> Tensor:
        """Return (L, S, C) as stored."""
        file, row = self._rows[index]
        start, end = (int(value) for value in file.array("offsets")[row : row + 2])
        tensor = torch.from_numpy(np.array(file.array("hidden_states")[:, start:end]))
        return tensor.view(torch.bfloat16) if file.is_bfloat16("hidden_states") else tensor


def _common_metadata(files: Sequence[SafetensorsFile], stage: str) -> dict[str, str]:
    if not files:
        raise ThroughlineError(f"{stage}: no files among the inputs")
    for file in files[1:]:
        if file.metadata != files[0].metadata:
            raise ThroughlineError(
                f"{file.path}: {stage} with {file.metadata}, {files[0].path} with {files[0].metadata}; "
                f"re-run {stage} with one configuration"
            )
    return files[0].metadata


PrepareText = Callable[[Tensor], Tensor]
"""A model's `prepare_text`: hidden states (L, S, C) -> prepared text (K, S, C')."""


class PreparedText:
    """Prepared texts of one split, computed once per caption and cached up to `memory_bytes`."""

    def __init__(
        self, source: StoredText | OnlineText, prepare: PrepareText, dtype: torch.dtype, memory_bytes: int
    ) -> None:
        self._source, self._prepare, self._dtype = source, prepare, dtype
        self._cache: dict[int, Tensor] = {}
        self._free_bytes = memory_bytes

    def is_truncated(self, index: int) -> bool:
        """True where this process encoded and truncated a sample's caption; stored features don't record it."""
        return isinstance(self._source, OnlineText) and index in self._source.truncated

    def prefetch(self, indices: Sequence[int]) -> None:
        """Encode the samples that are read next, unless they are cached or stored."""
        self._source.prefetch([index for index in indices if index not in self._cache])

    def read(self, index: int) -> Tensor:
        """Return (K, S, C'). Raises ThroughlineError for a text without tokens or with non-finite features."""
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        prepared = prepare_text(self._prepare, self._source.hidden_states(index), self._dtype)
        num_bytes = prepared.numel() * prepared.element_size()
        if num_bytes <= self._free_bytes:
            self._cache[index] = prepared
            self._free_bytes -= num_bytes
        return prepared


@torch.no_grad()
def prepare_text(prepare: PrepareText, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply a model's `prepare_text` in fp32 and return the result as `dtype`.

    Raises ThroughlineError where the text has no tokens, its layers are not the model's, or values are not finite.
    """
    if hidden_states.shape[1] == 0:
        raise ThroughlineError("a text of no tokens cannot condition an image; give it a caption or a template")
    try:
        prepared = prepare(hidden_states.float()).to(dtype)
    except ValueError as error:
        raise ThroughlineError(str(error)) from error
    if not math.isfinite(prepared.sum(dtype=torch.float32)):  # one pass; isfinite().all() takes four
        raise ThroughlineError(f"text features hold NaN or exceed the range of {dtype}; encode the text again")
    return prepared


def text_lengths(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Lengths (B,) of prepared texts (K, S_i, C'), and a mask (B, S), True for real tokens.

    The mask is None where all texts are equally long.
    """
    lengths = torch.tensor([text.shape[1] for text in texts])
    longest = int(lengths.max())
    padded = bool((lengths < longest).any())
    return lengths, torch.arange(longest) < lengths[:, None] if padded else None


@dataclass
class Batch:
    """The input of one training step of one process."""

    sample_indices: Tensor
    """(B,) int64, into the training split."""
    latents: Tensor
    """(B, C, h, w) fp32, scaled."""
    noise: Tensor
    t: Tensor
    """(B,) fp32"""
    prepared: Prepared
    lengths: Tensor
    text_mask: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """Move to a device, stacking the texts for an accelerator."""
        return Batch(
            sample_indices=self.sample_indices.to(device),
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            t=self.t.to(device),
            prepared=self.prepared if device.type == "cpu" else stack_texts(self.prepared).to(device),
            lengths=self.lengths.to(device),
            text_mask=None if self.text_mask is None else self.text_mask.to(device),
        )


class FeatureSource:
    """Latents and prepared texts of both splits, and the prepared unconditional text."""

    def __init__(self, config: CheckpointConfig, inputs: Inputs, prepare: PrepareText) -> None:
        """Map the files and encode the unconditional text.

        Raises ThroughlineError where the inputs are not the dataset's, or come from another encoder or template than
        the configuration names.
        """
        dataset = inputs["dataset"][0]
        check_inputs(dataset, inputs)
        self.data_version = dataset.data_version
        self.splits = read_splits(dataset)
        self.latents = {
            name: LatentReader(inputs["latents"], split) for name, split in self.splits.items() if len(split)
        }
        self._check_latents(config)
        dtype = getattr(torch, config.training.text_dtype)
        texts = TextSource(config, inputs)
        self.encodes_captions = texts.encodes_captions
        """True where captions are encoded during training, which is when truncated ones are known here."""
        self.text_metadata = texts.metadata
        self.unconditional = prepare_text(prepare, texts.unconditional(), dtype)
        self._text = {
            name: PreparedText(texts.of_split(split), prepare, dtype, config.training.text_memory_bytes)
            for name, split in self.splits.items()
            if len(split)
        }

    def prefetch_texts(self, split: str, indices: Sequence[int]) -> None:
        """Encode the texts that are read next, together on an accelerator, where none are stored."""
        self._text[split].prefetch(indices)

    def truncated(self, split: str, indices: Sequence[int]) -> list[bool]:
        """Return for each sample whether this process encoded and truncated its caption."""
        return [self._text[split].is_truncated(index) for index in indices]

    def text(self, split: str, index: int) -> Tensor:
        """Return the prepared text (K, S, C') of a sample; errors name its key."""
        try:
            return self._text[split].read(index)
        except ThroughlineError as error:
            raise ThroughlineError(f"sample {self.splits[split].key(index)}: {error}") from error

    def _check_latents(self, config: CheckpointConfig) -> None:
        shape = self.latents[TRAIN].shape
        expected = (config.model.latent_channels, config.model.latent_size, config.model.latent_size)
        if shape != expected:
            raise ThroughlineError(
                f"latents are {shape}, the model was configured for {expected} (channels, height, width); "
                "set latent_channels and latent_size, or re-run latents"
            )


class TextSource:
    """Hidden states of captions: stored ones, or from the encoder, which then runs on the training device."""

    def __init__(self, config: CheckpointConfig, inputs: Inputs) -> None:
        self._config, self._inputs = config, inputs
        self._stored = list(inputs.get("text_features", ()))
        self._device = process_device(config.training.device)
        self._encoder: TextEncoder | None = None
        self.metadata: dict[str, str] = {}
        if self._stored:
            self._check_stored()

    @property
    def encodes_captions(self) -> bool:
        """True where no text features are stored."""
        return not self._stored

    def of_split(self, split: Split) -> StoredText | OnlineText:
        """Return the hidden states (L, S, C) of the split's samples, by index."""
        if self._stored:
            return StoredText(self._stored, split)
        samples = ShardSamples.of_places(self._inputs["shards"], split.parts, split.shards, split.rows, "")
        return OnlineText(samples, self._load_encoder, self._device)

    def unconditional(self) -> Tensor:
        """Return the hidden states (L, S, C) of the unconditional text."""
        config = self._config
        template = unconditional_template(config.template_version, config.training.prompt_drop_form)
        return unconditional_hidden_states(config.text_encoder, template)

    def _load_encoder(self) -> "TextEncoder":
        if self._encoder is None:
            config = self._config
            self._encoder = load_text_encoder(config.text_encoder, config.template_version, str(self._device))
        return self._encoder

    def _check_stored(self) -> None:
        config = self._config
        paths = [path for output in self._stored for path in output.files(".safetensors")]
        self.metadata = _common_metadata([SafetensorsFile(path) for path in paths], "text_features")
        for name, expected in (
            ("encoder_revision", config.text_encoder.revision),
            ("template_version", config.template_version),
        ):
            stored = self.metadata.get(name)
            if stored != expected:
                raise ThroughlineError(
                    f"text_features {self._stored[0].data_version}: {name} is {stored!r}, training is configured for "
                    f"{expected!r}; re-run text_features, or configure training for the stored ones"
                )


def process_device(device: str) -> torch.device:
    """Return the device of this process: with several GPUs the one that its launcher assigned."""
    return torch.device(device, local_rank()) if device == "cuda" else torch.device(device)


def load_text_encoder(model: ModelRef, template_version: str, device: str = "cpu") -> "TextEncoder":
    """Load the frozen text encoder in fp32, with the hidden states of every layer."""
    from features.text_encoder import TextEncoder

    return TextEncoder.load(model, template_version=template_version, device=device)


@lru_cache(maxsize=4)
def unconditional_hidden_states(model: ModelRef, template_version: str) -> Tensor:
    """Return the hidden states (L, S, C) of the empty caption in a template, encoded once per process."""
    return load_text_encoder(model, template_version).encode([""])[0].hidden_states.clone()


def check_inputs(dataset: StageOutput, inputs: Inputs) -> None:
    """Check that the dataset was built from these latents, text features and shards."""
    known: Mapping[str, set[str]] = {
        name: {item.data_version for item in items} for name, items in dataset.manifest.inputs.items()
    }
    for name in ("latents", "text_features", "shards"):
        given = {item.data_version for item in inputs.get(name, ())}
        if name in known and given and given != known[name]:
            raise ThroughlineError(
                f"{name}: the inputs are not the outputs that dataset {dataset.data_version} was built from "
                f"({len(known[name] - given)} missing, {len(given - known[name])} unknown); re-run dataset, or pass "
                "the outputs it names"
            )
