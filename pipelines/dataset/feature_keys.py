"""Reads the sample keys of a feature file without a tensor library."""

import json
from pathlib import Path

from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import SAMPLE_KEY_BYTES

KEYS_TENSOR = "sample_keys"
_LENGTH_BYTES = 8


def feature_keys(path: Path) -> list[str]:
    """Return the sample keys of a safetensors file, in file order.

    Raises ThroughlineError if the file is not readable or has no ``sample_keys`` of shape (n, 16), uint8.
    """
    try:
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            entry = json.loads(stream.read(header_bytes))[KEYS_TENSOR]
            (count, width), (start, end) = entry["shape"], entry["data_offsets"]
            if entry["dtype"] != "U8" or width != SAMPLE_KEY_BYTES or end - start != count * width:
                raise ValueError(f"{KEYS_TENSOR} is {entry['dtype']} of shape {entry['shape']}")
            stream.seek(_LENGTH_BYTES + header_bytes + start)
            data = stream.read(end - start)
            if len(data) != end - start:
                raise ValueError("the file is truncated")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ThroughlineError(
            f"{path}: no readable {KEYS_TENSOR} ({error}); re-run the stage that wrote it"
        ) from error
    return [data[offset : offset + width].hex() for offset in range(0, len(data), width)]
