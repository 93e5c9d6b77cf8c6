"""Looks into finished `latents` and `text_features` outputs without torch: their rows for a trace, NaN for a check."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from pipelines.runner.checks import CheckResult
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import FoundRow, RowReader, RowSearch
from pipelines.shards.shard_rows import find_shard_rows

_MAX_FILES = 64
_MAX_LISTED = 5
_BLOCK_VALUES = 1 << 24
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
"""Floating types by safetensors' name: integer type of the same width, and the exponent bits of NaN and infinity."""


def find_feature_rows(features: StageOutput, search: RowSearch) -> Iterator[FoundRow]:
    """Yield the wanted rows. A feature file has the keys of its shard, whose index is far smaller."""
    for shards in search.holding_inputs(features):
        for key, file, _ in find_shard_rows(shards, search):
            name = f"{features.manifest.stage}-{Path(file).stem.removeprefix('shard-')}.safetensors"
            yield FoundRow(key, name, {})


FEATURE_ROWS = RowReader(find_feature_rows, reads_inputs=True)


def check_finite(features: StageOutput) -> CheckResult:
    """Check that the first files of an output hold no NaN and no infinity."""
    files = features.files(".safetensors")[:_MAX_FILES]
    bad = {path.name: count for path in files if (count := count_not_finite(path))}
    listed = [f"{name}: {count} values are NaN or infinite" for name, count in list(bad.items())[:_MAX_LISTED]]
    message = "; ".join(listed) or "every value is finite"
    return CheckResult(not bad, message, {"num_files": len(files), "num_bad_files": len(bad)})


def count_not_finite(path: Path) -> int:
    """Return the number of NaN and infinite values in a safetensors file."""
    import numpy as np

    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    count = 0
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _EXPONENTS or math.prod(entry["shape"]) == 0:
            continue
        dtype, exponent = _EXPONENTS[entry["dtype"]]
        start, end = entry["data_offsets"]
        num_values = (end - start) // np.dtype(dtype).itemsize
        values = np.memmap(path, dtype=dtype, mode="r", offset=8 + header_bytes + start, shape=(num_values,))
        for begin in range(0, len(values), _BLOCK_VALUES):
            block = values[begin : begin + _BLOCK_VALUES]
            count += int(np.count_nonzero((block & exponent) == exponent))
    return count
