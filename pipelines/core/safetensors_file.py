"""Reads safetensors files with numpy alone: header, metadata, and tensors as views of the mapped file."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.core.errors import ThroughlineError

NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""numpy's types by safetensors' names; bfloat16, which numpy lacks, is read as 16-bit words."""

_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000}
"""Floating types -> the exponent bits that only NaN and infinity set in full."""
_CHUNK_VALUES = 1 << 24
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it."""

    dtype: str
    """safetensors' name of the type, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""
    end: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


class SafetensorsFile:
    """One file: `metadata` and `entries` from its header, tensors as read-only arrays over the mapped file."""

    def __init__(self, path: Path) -> None:
        """Raises ThroughlineError where the file is not a safetensors file, or is truncated."""
        self.path = path
        try:
            with path.open("rb") as stream:
                header_bytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
                header = json.loads(stream.read(header_bytes))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.entries = {
                name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            }
            self._data_start = _LENGTH_BYTES + header_bytes
            size = self._data_start + max((entry.end for entry in self.entries.values()), default=0)
            if path.stat().st_size < size:
                raise ValueError(f"{path.stat().st_size} bytes, its header describes {size}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise ThroughlineError(f"{path}: not a readable safetensors file ({error}); re-run its stage") from error
        self._bytes: np.ndarray | None = None

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a mapped array; bfloat16 as its uint16 words.

        Raises ThroughlineError where the file holds no such tensor, or its type or size is not valid.
        """
        if name not in self.entries:
            raise ThroughlineError(f"{self.path}: no tensor {name!r}; it holds {', '.join(sorted(self.entries))}")
        entry = self.entries[name]
        dtype = NUMPY_TYPES.get(entry.dtype)
        if dtype is None or entry.end - entry.start != entry.num_values * np.dtype(dtype).itemsize:
            raise ThroughlineError(
                f"{self.path}: tensor {name!r} of {entry.end - entry.start} bytes is not {entry.dtype} of shape "
                f"{entry.shape}; re-run its stage"
            )
        if not entry.num_values:
            return np.zeros(entry.shape, dtype)  # nothing to map
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r", offset=self._data_start)
        return self._bytes[entry.start : entry.end].view(dtype).reshape(entry.shape)

    def is_bfloat16(self, name: str) -> bool:
        return self.entries[name].dtype == "BF16"


def count_not_finite(path: Path) -> int:
    """Return the number of NaN and infinite values in a safetensors file, reading it once in chunks."""
    file = SafetensorsFile(path)
    count = 0
    for name, entry in file.entries.items():
        exponent = _EXPONENTS.get(entry.dtype)
        if exponent is None or not entry.num_values:
            continue
        values = file.array(name).reshape(-1)
        bits = values.view(f"<u{values.itemsize}")
        for start in range(0, len(bits), _CHUNK_VALUES):
            count += int(np.count_nonzero((bits[start : start + _CHUNK_VALUES] & exponent) == exponent))
    return count
