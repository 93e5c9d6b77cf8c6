"""The file of text features: unpadded hidden states of a shard's captions, by sample key.

Layout (safetensors): sample_keys uint8 (n, 16); offsets int64 (n + 1), tokens before each text; token_ids int32 (T);
hidden_states bfloat16 (L, T, C), the texts one after the other. Shapes: n texts, T tokens of all, L layers, C channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from features.tensor_file import TensorFileWriter
from features.text_encoder import EncodedText
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import SAMPLE_KEY_BYTES

FORMAT = "throughline-text-features-1"


def feature_metadata(encoder: ModelRef, template_version: str, layers: Sequence[int]) -> dict[str, str]:
    """Return the metadata that every file of one configuration carries."""
    return {
        "format": FORMAT,
        "encoder_id": encoder.id,
        "encoder_revision": encoder.revision,
        "template_version": template_version,
        "layers": ",".join(map(str, layers)),
    }


class TextFeatureWriter:
    """A file of text features being filled, text by text in any order."""

    def __init__(
        self, path: Path, sample_keys: Sequence[str], lengths: Sequence[int], width: int, metadata: dict[str, str]
    ) -> None:
        """`lengths` are the token counts of the texts in the order of `sample_keys`."""
        num_layers = len(metadata["layers"].split(","))
        self._sample_keys = list(sample_keys)
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        num_tokens = int(self._offsets[-1])
        self._file = TensorFileWriter(
            path,
            {
                "offsets": ("I64", (len(sample_keys) + 1,)),
                "token_ids": ("I32", (num_tokens,)),
                "hidden_states": ("BF16", (num_layers, num_tokens, width)),
                "sample_keys": ("U8", (len(sample_keys), SAMPLE_KEY_BYTES)),
            },
            metadata,
        )
        self._token_ids = self._file.array("token_ids")
        self._hidden_states = self._file.array("hidden_states")
        self._file.array("offsets")[:] = self._offsets
        self._file.array("sample_keys")[:] = key_array(sample_keys)

    def write(self, index: int, text: EncodedText) -> None:
        """Put the text of sample `index` in its place; raises ThroughlineError where it holds NaN or infinity."""
        if not bool(torch.isfinite(text.hidden_states).all()):
            raise ThroughlineError(
                f"sample {self._sample_keys[index]}: its text features hold NaN or infinity; compute in float32, or "
                "check the encoder's weights"
            )
        start, end = self._offsets[index], self._offsets[index + 1]
        self._token_ids[start:end] = text.token_ids.numpy()
        self._hidden_states[:, start:end] = text.hidden_states.contiguous().view(torch.uint16).numpy()

    def close(self) -> None:
        """Make the file durable."""
        with self._file:
            pass


class TextFeatureReader:
    """A file of text features, mapped into memory: reading a text reads its bytes alone."""

    def __init__(self, path: Path) -> None:
        """Raises ThroughlineError where the file is not one of text features."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except Exception as error:
            raise ThroughlineError(f"{path}: not a readable file of text features ({error})") from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        if self.metadata.get("format") != FORMAT:
            raise ThroughlineError(f"{path}: format {self.metadata.get('format')!r}, expected {FORMAT!r}")
        self.layers = tuple(map(int, self.metadata["layers"].split(",")))
        keys = self._file.get_tensor("sample_keys").numpy()
        self.sample_keys = [bytes(row).hex() for row in keys]
        self._index_of = {key: index for index, key in enumerate(self.sample_keys)}
        self._offsets = self._file.get_tensor("offsets").tolist()
        self._hidden_states = self._file.get_slice("hidden_states")
        self._token_ids = self._file.get_slice("token_ids")
        self.width: int = self._hidden_states.get_shape()[2]

    def check(self, encoder: ModelRef, template_version: str) -> None:
        """Raise ThroughlineError where the features come from another encoder or template."""
        expected = feature_metadata(encoder, template_version, self.layers)
        for name, value in expected.items():
            if self.metadata.get(name) != value:
                raise ThroughlineError(
                    f"{self.path}: {name} is {self.metadata.get(name)!r}, expected {value!r}; re-run text_features"
                )

    def __len__(self) -> int:
        return len(self.sample_keys)

    def read(self, index: int) -> EncodedText:
        """Return the text at `index` of `sample_keys`."""
        start, end = self._offsets[index], self._offsets[index + 1]
        return EncodedText(token_ids=self._token_ids[start:end], hidden_states=self._hidden_states[:, start:end])

    def read_key(self, sample_key: str) -> EncodedText:
        """Return the text of a sample; raises ThroughlineError where the file does not hold it."""
        if sample_key not in self._index_of:
            raise ThroughlineError(f"{self.path}: no text features for sample {sample_key}")
        return self.read(self._index_of[sample_key])


def key_array(sample_keys: Sequence[str]) -> np.ndarray:
    """Return keys (32 hex digits each) as uint8 (n, 16)."""
    return np.frombuffer(bytes.fromhex("".join(sample_keys)), dtype=np.uint8).reshape(-1, SAMPLE_KEY_BYTES)
