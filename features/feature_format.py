"""The file of text features: unpadded hidden states of a shard's captions, by sample key.

Layout (safetensors): sample_keys uint8 (n, 16); offsets int64 (n + 1), tokens before each text; token_ids int32 (T);
hidden_states bfloat16 (L, T, C), text after text. Shapes: n texts, T tokens of all texts, L layers, C channels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from features.tensor_file import TensorFileWriter
from features.text_encoder import EncodedText
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import SAMPLE_KEY_BYTES

FORMAT = "throughline-text-features-1"


def feature_metadata(encoder: ModelRef, template_version: str, layers: Sequence[int]) -> dict[str, str]:
    """Return the metadata of every file of one configuration."""
    return {
        "format": FORMAT,
        "encoder_id": encoder.id,
        "encoder_revision": encoder.revision,
        "template_version": template_version,
        "layers": ",".join(map(str, layers)),
    }


class TextFeatureWriter:
    """Writes a file of text features, text by text in any order."""

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
        """Write the text of sample `index`; raises ThroughlineError where it holds NaN or infinity."""
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


def key_array(sample_keys: Sequence[str]) -> np.ndarray:
    """Return keys (32 hex digits each) as uint8 (n, 16)."""
    return np.frombuffer(bytes.fromhex("".join(sample_keys)), dtype=np.uint8).reshape(-1, SAMPLE_KEY_BYTES)
