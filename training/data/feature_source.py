"""What training reads instead of words and pixels: latents and text features of the dataset, by sample.

Shapes: B batch, L LLM layers, S text tokens, C channels, h and w latent height and width; K rows of prepared text, as
the model's `prepare_text` makes them.
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
from pipelines.dataset.samples import ShardSamples
from pipelines.runner.outputs import Inputs, StageOutput
from training.config import CheckpointConfig
from training.data.encoded_text import EncodedText
from training.data.mapped_tensors import MappedTensors, to_tensor
from training.models.fusion import Prepared, stack_texts

if TYPE_CHECKING:
    from features.text_encoder import TextEncoder

TRAIN, VALIDATION = "train", "validation"
_KEY_BYTES = 16


class Rows:
    """Where each sample's row lies in a list of files: found by key, once, for a whole split."""

    def __init__(self, paths: Sequence[Path], wanted: np.ndarray, what: str) -> None:
        """`wanted` is uint8 (n, 16). Raises ThroughlineError that names a key no file holds."""
        self.files = [MappedTensors(path) for path in paths]
        keys = [file.array("sample_keys") for file in self.files]
        file_of = np.repeat(np.arange(len(keys)), [len(part) for part in keys])
        row_of = np.concatenate([np.arange(len(part)) for part in keys]) if keys else np.zeros(0, dtype=np.int64)
        flat = _as_words(np.concatenate([np.array(part) for part in keys]) if keys else wanted[:0])
        order = np.argsort(flat, kind="stable")
        places = np.searchsorted(flat[order], _as_words(wanted))
        found = places < len(order)
        found[found] = flat[order[places[found]]] == _as_words(wanted)[found]
        if not found.all():
            missing = bytes(wanted[int(np.argmin(found))]).hex()
            raise ThroughlineError(
                f"{what}: nothing for sample {missing} and {int((~found).sum())} samples in all that the dataset "
                f"names; re-run {what} for the part that holds them"
            )
        self.file_of, self.row_of = file_of[order[places]], row_of[order[places]]

    def __getitem__(self, index: int) -> tuple[MappedTensors, int]:
        return self.files[self.file_of[index]], int(self.row_of[index])


def _as_words(keys: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 -> (n,) of two big-endian words, which sort and compare as the keys do."""
    return np.ascontiguousarray(keys).view(np.dtype([("high", ">u8"), ("low", ">u8")])).reshape(-1)


@dataclass(frozen=True)
class Split:
    """The samples of one split, sorted by key."""

    sample_keys: np.ndarray
    """uint8 (n, 16)"""
    parts: list[str]
    shards: list[str]
    rows: np.ndarray
    """int32 (n,), each sample's place in its shard."""

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
        raise ThroughlineError(f"dataset {dataset.data_version}: no training samples; lower its share of validation")
    return splits


def _key_bytes(key: str | bytes) -> bytes:
    return key if isinstance(key, bytes) else bytes.fromhex(key)


class LatentReader:
    """Latents of one split: draws from the autoencoder's posterior, scaled for training."""

    def __init__(self, outputs: Sequence[StageOutput], split: Split) -> None:
        paths = [path for output in outputs for path in output.files(".safetensors")]
        self._rows = Rows(paths, split.sample_keys, "latents")
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


class CachedText:
    """Text features of one split from the stage `text_features`."""

    def __init__(self, outputs: Sequence[StageOutput], split: Split) -> None:
        paths = [path for output in outputs for path in output.files(".safetensors")]
        self._rows = Rows(paths, split.sample_keys, "text_features")
        self.metadata = _common_metadata(self._rows.files, "text_features")

    def ask_for(self, indices: Sequence[int]) -> None:
        """Nothing to do: files are mapped."""

    def hidden_states(self, index: int) -> Tensor:
        """Return (L, S, C) as stored."""
        file, row = self._rows[index]
        start, end = (int(value) for value in file.array("offsets")[row : row + 2])
        return to_tensor(file.array("hidden_states")[:, start:end], bfloat16=file.is_bfloat16("hidden_states"))


def _common_metadata(files: Sequence[MappedTensors], what: str) -> dict[str, str]:
    if not files:
        raise ThroughlineError(f"{what}: no files among the inputs")
    for file in files[1:]:
        if file.metadata != files[0].metadata:
            raise ThroughlineError(
                f"{file.path}: {what} were made as {file.metadata}, those of {files[0].path} as {files[0].metadata}; "
                f"re-run {what} with one configuration"
            )
    return files[0].metadata


PrepareText = Callable[[Tensor], Tensor]
"""A model's `prepare_text`: hidden states (L, S, C) -> prepared text (K, S, C')."""


class PreparedText:
    """Prepared text of one split, made once per caption and kept as far as memory goes."""

    def __init__(
        self, source: CachedText | EncodedText, prepare: PrepareText, dtype: torch.dtype, memory_bytes: int
    ) -> None:
        self._source, self._prepare, self._dtype = source, prepare, dtype
        self._kept: dict[int, Tensor] = {}
        self._free_bytes = memory_bytes

    def is_truncated(self, index: int) -> bool:
        """Whether a sample's caption was read by this process and cut; False for stored features, which don't say."""
        return isinstance(self._source, EncodedText) and index in self._source.truncated

    def ask_for(self, indices: Sequence[int]) -> None:
        """Say which samples are read next."""
        self._source.ask_for([index for index in indices if index not in self._kept])

    def read(self, index: int) -> Tensor:
        """Return (K, S, C'). Raises ThroughlineError for a text without tokens or with non-finite features."""
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        prepared = prepare_text(self._prepare, self._source.hidden_states(index), self._dtype)
        num_bytes = prepared.numel() * prepared.element_size()
        if num_bytes <= self._free_bytes:
            self._kept[index] = prepared
            self._free_bytes -= num_bytes
        return prepared


@torch.no_grad()
def prepare_text(prepare: PrepareText, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply a model's `prepare_text` in fp32 and keep the result as `dtype`.

    Raises ThroughlineError where the text has no tokens, its layers are not the model's, or values are not finite.
    """
    if hidden_states.shape[1] == 0:
        raise ThroughlineError("a text of no tokens cannot condition an image; give it a caption or a template")
    try:
        prepared = prepare(hidden_states.float()).to(dtype)
    except ValueError as error:
        raise ThroughlineError(str(error)) from error
    if not math.isfinite(prepared.sum(dtype=torch.float32)):  # one pass, where isfinite().all() makes four
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
        """Move to a device; texts are stacked on the way to an accelerator."""
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
    """Latents and prepared text of both splits, and the prepared unconditional text."""

    def __init__(self, config: CheckpointConfig, inputs: Inputs, prepare: PrepareText) -> None:
        """Maps the files, and encodes the unconditional text.

        Raises ThroughlineError where inputs are not those that the dataset was rolled up from, or were made with
        another encoder or template than the configuration says.
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
        encoder = TextSource(config, inputs)
        self.encodes_captions = encoder.encodes_captions
        """Whether captions are encoded as they are drawn, which is when those that are cut are known here."""
        self.text_metadata = encoder.metadata
        self.unconditional = prepare_text(prepare, encoder.unconditional(), dtype)
        self._text = {
            name: PreparedText(encoder.of_split(split), prepare, dtype, config.training.text_memory_bytes)
            for name, split in self.splits.items()
            if len(split)
        }

    def ask_for_texts(self, split: str, indices: Sequence[int]) -> None:
        """Say which texts are read next; where none are stored an accelerator encodes them together."""
        self._text[split].ask_for(indices)

    def truncated(self, split: str, indices: Sequence[int]) -> list[bool]:
        """Say of each sample whether its caption was encoded by this process and cut."""
        return [self._text[split].is_truncated(index) for index in indices]

    def text(self, split: str, index: int) -> Tensor:
        """Return the prepared text (K, S, C') of a sample; errors name its key."""
        try:
            return self._text[split].read(index)
        except ThroughlineError as error:
            raise ThroughlineError(f"sample {self.splits[split].key(index)}: {error}") from error

    def _check_latents(self, config: CheckpointConfig) -> None:
        found = self.latents[TRAIN].shape
        expected = (config.model.latent_channels, config.model.latent_size, config.model.latent_size)
        if found != expected:
            raise ThroughlineError(
                f"latents are {found}, the model was configured for {expected} (channels, height, width); "
                "set latent_channels and latent_size, or re-run latents"
            )


class TextSource:
    """Hidden states of captions: from the cache, or from the encoder on the device of training, as they are drawn."""

    def __init__(self, config: CheckpointConfig, inputs: Inputs) -> None:
        self._config, self._inputs = config, inputs
        self._cached = list(inputs.get("text_features", ()))
        self._device = process_device(config.training.device)
        self._encoder: TextEncoder | None = None
        self.metadata: dict[str, str] = {}
        if self._cached:
            self._check_cached()

    @property
    def encodes_captions(self) -> bool:
        """Whether no text features are stored."""
        return not self._cached

    def of_split(self, split: Split) -> CachedText | EncodedText:
        """Return what gives the hidden states (L, S, C) of the split's samples by index."""
        if self._cached:
            return CachedText(self._cached, split)
        samples = ShardSamples.of_places(self._inputs["shards"], split.parts, split.shards, split.rows, "")
        return EncodedText(samples, self._load_encoder, self._device)

    def unconditional(self) -> Tensor:
        """Return the hidden states (L, S, C) of the text that stands for "no prompt"."""
        config = self._config
        template = unconditional_template(config.template_version, config.training.prompt_drop_form)
        return unconditional_hidden_states(config.text_encoder, template)

    def _load_encoder(self) -> "TextEncoder":
        if self._encoder is None:
            config = self._config
            self._encoder = load_text_encoder(config.text_encoder, config.template_version, str(self._device))
        return self._encoder

    def _check_cached(self) -> None:
        config = self._config
        paths = [path for output in self._cached for path in output.files(".safetensors")]
        self.metadata = _common_metadata([MappedTensors(path) for path in paths], "text_features")
        for name, expected in (
            ("encoder_revision", config.text_encoder.revision),
            ("template_version", config.template_version),
        ):
            found = self.metadata.get(name)
            if found != expected:
                raise ThroughlineError(
                    f"text_features {self._cached[0].data_version}: made with {name} {found!r}, training is configured "
                    f"for {expected!r}; re-run text_features, or configure training for what is cached"
                )


def process_device(device: str) -> torch.device:
    """Return the device of this process: of several GPUs the one that its launcher gave it."""
    return torch.device(device, local_rank()) if device == "cuda" else torch.device(device)


def load_text_encoder(model: ModelRef, template_version: str, device: str = "cpu") -> "TextEncoder":
    """Load the frozen text encoder in fp32, giving every layer."""
    from features.text_encoder import TextEncoder

    return TextEncoder.load(model, template_version=template_version, device=device)


@lru_cache(maxsize=4)
def unconditional_hidden_states(model: ModelRef, template_version: str) -> Tensor:
    """Return the hidden states (L, S, C) of the empty caption in a template, encoded once for all of a process."""
    return load_text_encoder(model, template_version).encode([""])[0].hidden_states.clone()


def check_inputs(dataset: StageOutput, inputs: Inputs) -> None:
    """Check that latents, text features and shards are those that the dataset was rolled up from."""
    known: Mapping[str, set[str]] = {
        name: {item.data_version for item in items} for name, items in dataset.manifest.inputs.items()
    }
    for name in ("latents", "text_features", "shards"):
        given = {item.data_version for item in inputs.get(name, ())}
        if name in known and given and given != known[name]:
            raise ThroughlineError(
                f"{name}: the outputs given are not those of dataset {dataset.data_version} "
                f"({len(known[name] - given)} missing, {len(given - known[name])} unknown to it); "
                "re-run dataset, or give the outputs it names"
            )
