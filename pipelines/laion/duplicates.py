"""Streaming exact deduplication by 128-bit hash; keeps the first occurrence.

`pipelines.laion.selection` deduplicates across parts.
"""

import math

import numpy as np
import pyarrow as pa

from pipelines.core.errors import ThroughlineError
from pipelines.laion.hashes import key_words, string_hashes

# LAION-400M's parts of 12.9 million rows fit into 2**24 slots.
_MAX_LOAD = 0.8
_LOW_HALF = np.uint64((1 << 32) - 1)


class _Table:
    """A hash table of rows uint64 [rows, 3]: the two words of a hash, and one word of payload.

    Rows are stored in order of arrival and indexed by an open-addressing table of 8-byte slots. A slot holds the high
    half of a row's first word and, in its low half, 1 + the row's index; 0 is empty. Nearly every lookup needs the slot
    alone; with the 24-byte rows in the slots, each probe would fetch a cache line from a table three times the size.
    Memory is 24 bytes per row and 8 per slot: at most 374 MB for 10 million rows.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows > _LOW_HALF:
            raise ThroughlineError(f"{max_rows} rows exceed the maximum of one part (2**32 - 1); split the file")
        # The pages of both arrays take up memory only once they are written.
        self._slots = np.zeros(1 << math.ceil(math.log2(max_rows / _MAX_LOAD + 1)), np.uint64)
        self._rows = np.empty((max_rows, 3), np.uint64)
        self._used = 0

    def put(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Insert rows, uint64 [rows, 3], in order.

        Return a mask of the rows whose hash is new, and per row the payload of the first row with its hash.
        """
        first, self._used = self._used, self._used + len(rows)
        self._rows[first : self._used] = rows
        new, held = np.zeros(len(rows), bool), rows[:, 2].copy()
        own = (rows[:, 0] & ~_LOW_HALF) | np.arange(first + 1, self._used + 1, dtype=np.uint64)
        last = len(self._slots) - 1
        pending, slots = np.arange(len(rows)), (rows[:, 0] & np.uint64(last)).astype(np.int64)
        while len(pending):
            found = self._slots.take(slots)
            empty = np.flatnonzero(found == 0)
            if len(empty):
                at = slots[empty]
                # Of rows that compete for a slot the first is written last, so it wins.
                self._slots[at[::-1]] = own[empty[::-1]]
                found[empty] = self._slots.take(at)
            resolved = found == own
            new[pending[resolved]] = True
            candidates = np.flatnonzero(((found ^ own) <= _LOW_HALF) & ~resolved)
            if len(candidates):
                indices = (found[candidates] & _LOW_HALF).astype(np.int64) - 1
                same = (self._rows[indices, :2] == rows[pending[candidates], :2]).all(axis=1)
                candidates, indices = candidates[same], indices[same]
                held[pending[candidates]] = self._rows[indices, 2]
                resolved[candidates] = True
            unresolved = np.flatnonzero(~resolved)
            pending, own, slots = pending[unresolved], own[unresolved], (slots[unresolved] + 1) & last
        return new, held


class DuplicateFinder:
    """Finds the rows that repeat an earlier pair or, with `by_url`, an earlier URL.

    With `by_url` one table serves both: a row repeats a pair if its URL was seen with the same sample key.
    """

    def __init__(self, by_url: bool, max_rows: int) -> None:
        """`max_rows`: capacity of the table."""
        self._by_url = by_url
        self._table = _Table(max_rows)

    def find(self, keys: np.ndarray, urls: pa.Array, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return two masks: rows that repeat an earlier pair, and rows that repeat an earlier URL with another text.

        `keys` is uint8 [n, 16]. `rows`, int64 in ascending order, selects the rows to consider, None for all; the masks
        are over these rows. Rows in neither mask are added to the table.
        """
        pairs = key_words(keys if rows is None else keys[rows])
        entries = np.empty((len(pairs), 3), np.uint64)
        entries[:, :2] = string_hashes(urls, rows) if self._by_url else pairs
        entries[:, 2] = pairs[:, 1]
        new, held = self._table.put(entries)
        same_pair = held == pairs[:, 1]
        return ~new & same_pair, ~new & ~same_pair
