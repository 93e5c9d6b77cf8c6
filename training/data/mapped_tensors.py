"""Read-only views of the tensors in a safetensors file, mapped into memory, so that single rows cost single reads."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.core.errors import ThroughlineError

_NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


class MappedTensors:
    """One safetensors file: `metadata` from its header, tensors as arrays over the mapped file."""

    def __init__(self, path: Path) -> None:
        """Raises ThroughlineError where the file is no safetensors file."""
        self.path = path
        try:
            with path.open("rb") as stream:
                header_bytes = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(header_bytes))
            self._bytes = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + header_bytes)
        except (OSError, ValueError) as error:
            raise ThroughlineError(f"{path}: not a readable safetensors file ({error}); re-run its stage") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = header

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a mapped array; bfloat16 comes as its uint16 words."""
        if name not in self._entries:
            raise ThroughlineError(f"{self.path}: no tensor {name!r}; it holds {', '.join(sorted(self._entries))}")
        entry = self._entries[name]
        start, end = entry["data_offsets"]
        return self._bytes[start:end].view(_NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])

    def is_bfloat16(self, name: str) -> bool:
        return self._entries[name]["dtype"] == "BF16"


def to_tensor(array: np.ndarray, *, bfloat16: bool = False) -> Tensor:
    """Copy a mapped slice into memory as a tensor; uint16 words become bfloat16 where asked."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.view(torch.bfloat16) if bfloat16 else tensor
