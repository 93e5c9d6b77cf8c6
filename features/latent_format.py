"""The file of latents: the autoencoder's posterior (mean and std, unscaled) for the images of a shard, by sample key.

Layout (safetensors): sample_keys uint8 (n, 16); mean and std float16 or float32 (n, C, h, w).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from features.autoencoder import Autoencoder
from features.feature_format import key_array
from features.tensor_file import TensorFileWriter
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import SAMPLE_KEY_BYTES

FORMAT = "throughline-latents-1"
_KINDS = {"float16": "F16", "float32": "F32"}


def latent_metadata(model: ModelRef, autoencoder: Autoencoder) -> dict[str, str]:
    """Return the metadata of every file of one autoencoder."""
    return {
        "format": FORMAT,
        "autoencoder_id": model.id,
        "autoencoder_revision": model.revision,
        "scaling_factor": repr(autoencoder.scaling_factor),
        "shift_factor": repr(autoencoder.shift_factor),
    }


class LatentWriter:
    """Writes a file of latents, batch by batch."""

    def __init__(
        self, path: Path, sample_keys: Sequence[str], shape: tuple[int, int, int], dtype: str, metadata: dict[str, str]
    ) -> None:
        """`shape` is (C, h, w)."""
        kind = _KINDS[dtype]
        full_shape = (len(sample_keys), *shape)
        tensors = {"mean": (kind, full_shape), "std": (kind, full_shape)}
        self._sample_keys = list(sample_keys)
        self._file = TensorFileWriter(
            path, tensors | {"sample_keys": ("U8", (len(sample_keys), SAMPLE_KEY_BYTES))}, metadata
        )
        self._mean, self._std = self._file.array("mean"), self._file.array("std")
        self._file.array("sample_keys")[:] = key_array(sample_keys)

    def write(self, start: int, mean: Tensor, std: Tensor) -> None:
        """Write the latents of the samples from `start` on, (B, C, h, w) each.

        Raises ThroughlineError with the sample's key where one holds NaN or infinity, or overflows the stored type.
        """
        with np.errstate(over="ignore"):
            stored = [tensor.numpy().astype(self._mean.dtype) for tensor in (mean, std)]
        finite = np.isfinite(stored[0]).all(axis=(1, 2, 3)) & np.isfinite(stored[1]).all(axis=(1, 2, 3))
        if not finite.all():
            key = self._sample_keys[start + int(np.argmin(finite))]
            raise ThroughlineError(
                f"sample {key}: its latents hold NaN, infinity, or exceed {self._mean.dtype.name}; compute and "
                "store in float32, or check the autoencoder's weights"
            )
        self._mean[start : start + len(mean)], self._std[start : start + len(std)] = stored

    def close(self) -> None:
        """Make the file durable."""
        with self._file:
            pass
