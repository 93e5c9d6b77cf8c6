"""The score threshold of the top share of a pool: exact, over any number of files, in constant memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.core.errors import ThroughlineError
from pipelines.laion.schema import open_metadata

_HALF_BITS = 16
_BATCH_ROWS = 1 << 20


def top_share_threshold(files: Sequence[tuple[Path, dict[str, str]]], role: str, share: float) -> float:
    """Return the score t such that the rows with a score of at least t are the top `share` of all rows.

    `files` are paths with their role -> column. Scores are compared as float32; rows without a score count as rows of
    the pool. As in DataComp's code, t is the score at index int(rows x share) in descending order. The column is read
    twice: the first pass builds a histogram of the scores' high 16 bits, the second of the low 16 bits in one bin.

    Raises ThroughlineError where a file has no such column, or too few rows have a score.
    """
    for path, columns in files:
        if role not in columns:
            raise ThroughlineError(f"{path}: no column {role}, whose top {share:.0%} should be kept")
    high = np.zeros(1 << _HALF_BITS, np.int64)
    num_rows = 0
    for ranks, count in _ranks(files, role):
        num_rows += count
        high += np.bincount(ranks >> _HALF_BITS, minlength=len(high))
    place = int(num_rows * share)
    above = high[::-1].cumsum()
    if not num_rows or above[-1] <= place:
        raise ThroughlineError(f"{int(above[-1])} of {num_rows} rows have a {role}, too few for the top {share:.0%}")
    found = int(np.searchsorted(above, place, side="right"))
    bin_number = len(high) - 1 - found
    low = np.zeros(1 << _HALF_BITS, np.int64)
    for ranks, _ in _ranks(files, role):
        low += np.bincount(ranks[ranks >> _HALF_BITS == bin_number] & 0xFFFF, minlength=len(low))
    rest = place - int(above[found] - high[bin_number])
    low_bits = len(low) - 1 - int(np.searchsorted(low[::-1].cumsum(), rest, side="right"))
    return float(_score(np.uint32(bin_number << _HALF_BITS | low_bits)))


def _ranks(files: Sequence[tuple[Path, dict[str, str]]], role: str) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (ranks, rows): float32 scores as integers of the same order, without null and NaN, and the batch's rows."""
    for path, columns in files:
        with open_metadata(path) as metadata:
            for batch in metadata.iter_batches(_BATCH_ROWS, columns=[columns[role]]):
                scores = batch.column(0).cast(pa.float32(), safe=False).drop_null().to_numpy()
                bits = (scores[~np.isnan(scores)] + np.float32(0)).view(np.uint32)
                yield np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.int64), batch.num_rows


def _score(rank: np.uint32) -> np.float32:
    bits = rank & np.uint32(0x7FFFFFFF) if rank >> np.uint32(31) else ~rank
    return np.array([bits], np.uint32).view(np.float32)[0]
