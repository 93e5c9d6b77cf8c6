"""Reads the sample keys of a feature file without a tensor library."""

from pathlib import Path

from pipelines.core.errors import ThroughlineError
from pipelines.core.safetensors_file import SafetensorsFile
from pipelines.core.sample_key import SAMPLE_KEY_BYTES

KEYS_TENSOR = "sample_keys"


def feature_keys(path: Path) -> list[str]:
    """Return the sample keys of a safetensors file, in file order.

    Raises ThroughlineError if the file is not readable or has no ``sample_keys`` of shape (n, 16), uint8.
    """
    file = SafetensorsFile(path)
    keys = file.array(KEYS_TENSOR)
    if keys.dtype != "uint8" or keys.ndim != 2 or keys.shape[1] != SAMPLE_KEY_BYTES:
        raise ThroughlineError(
            f"{path}: {KEYS_TENSOR} is {file.entries[KEYS_TENSOR].dtype} of shape {keys.shape}, expected U8 of (n, "
            f"{SAMPLE_KEY_BYTES}); re-run the stage that wrote it"
        )
    data = keys.tobytes()
    return [data[start : start + SAMPLE_KEY_BYTES].hex() for start in range(0, len(data), SAMPLE_KEY_BYTES)]
