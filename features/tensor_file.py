"""Writes safetensors files tensor by tensor, without holding them in memory; equal content gives equal bytes.

The safetensors library writes its metadata in random order and needs all tensors at once. It reads these files.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pipelines.core.safetensors_file import NUMPY_TYPES


class TensorFileWriter:
    """A safetensors file being filled: `array(name)` is a tensor as a writable array over the mapped file.

    bfloat16 ("BF16") arrays hold the 16-bit words. The file is complete, and durable, when the block ends.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """`tensors` is name -> (safetensors type, shape), in the order of the file."""
        self.path = path
        self._tensors = dict(tensors)
        header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
        self._offsets = {}
        end = 0
        for name, (kind, shape) in self._tensors.items():
            # Readers may demand aligned tensors, so callers put the widest types first.
            start, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(NUMPY_TYPES[kind]).itemsize
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
            self._offsets[name] = start
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            self._data_start = stream.tell()
            _reserve(stream.fileno(), self._data_start + end)

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.path.open("rb+") as stream:
            os.fsync(stream.fileno())

    def array(self, name: str) -> np.ndarray:
        """Return the tensor as a writable array over the mapped file."""
        kind, shape = self._tensors[name]
        if not int(np.prod(shape, dtype=np.int64)):
            return np.zeros(shape, NUMPY_TYPES[kind])  # nothing to map
        offset = self._data_start + self._offsets[name]
        return np.memmap(self.path, NUMPY_TYPES[kind], mode="r+", offset=offset, shape=shape)


def _reserve(descriptor: int, num_bytes: int) -> None:
    """Allocate the disk space now: a mapped write to a full disk would kill the process instead of raising OSError."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        import errno

        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, num_bytes)
