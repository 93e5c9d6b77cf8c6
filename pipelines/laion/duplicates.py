"""Duplicates among rows that come in order, told by 128-bit hashes in bounded memory: the first of its kind stays.

Duplicates between parts are left to `pipelines.laion.selection`.
"""

import math

import numpy as np
import pyarrow as pa

from pipelines.core.errors import ThroughlineError
from pipelines.laion.hashes import key_words, string_hashes

# LAION-400M's parts of 12.9 million rows fit into 2**24 slots.
_MAX_LOAD = 0.8
_NUMBER = np.uint64((1 << 32) - 1)


class _Table:
    """Rows uint64 [rows, 3], each the two words of a hash and a word that belongs to it, to be found by hash.

    The rows stand in the order they came; an open-addressing table of 8-byte slots says where. A slot holds the high
    half of a row's first word, and in its low half 1 + the row's place; 0 is empty. Nearly every row is settled by its
    slot alone: of a 24-byte row in a slot of its own, each look would fetch a cache line from a table three times the
    size. Memory is 24 bytes a row and 8 a slot, for 10 million rows 374 MB at most.
    """

    def __init__(self, max_rows: int) -> None:
        if max_rows > _NUMBER:
            raise ThroughlineError(f"{max_rows} rows are more than one part may have (2**32 - 1); split the file")
        # Pages of either array take up memory once they are written to.
        self._slots = np.zeros(1 << math.ceil(math.log2(max_rows / _MAX_LOAD + 1)), np.uint64)
        self._rows = np.empty((max_rows, 3), np.uint64)
        self._used = 0

    def put(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Enter uint64 [rows, 3], the first of equal hashes first.

        Return a mask of the rows that are new, and per row the third word of the first row with its hash.
        """
        first, self._used = self._used, self._used + len(rows)
        self._rows[first : self._used] = rows
        new, held = np.zeros(len(rows), bool), rows[:, 2].copy()
        own = (rows[:, 0] & ~_NUMBER) | np.arange(first + 1, self._used + 1, dtype=np.uint64)
        last = len(self._slots) - 1
        waiting, places = np.arange(len(rows)), (rows[:, 0] & np.uint64(last)).astype(np.int64)
        while len(waiting):
            found = self._slots.take(places)
            empty = np.flatnonzero(found == 0)
            if len(empty):
                at = places[empty]
                # Of the rows that want one slot the first is written last, finds itself there and stays.
                self._slots[at[::-1]] = own[empty[::-1]]
                found[empty] = self._slots.take(at)
            settled = found == own
            new[waiting[settled]] = True
            alike = np.flatnonzero(((found ^ own) <= _NUMBER) & ~settled)
            if len(alike):
                numbers = (found[alike] & _NUMBER).astype(np.int64) - 1
                same = (self._rows[numbers, :2] == rows[waiting[alike], :2]).all(axis=1)
                alike, numbers = alike[same], numbers[same]
                held[waiting[alike]] = self._rows[numbers, 2]
                settled[alike] = True
            others = np.flatnonzero(~settled)
            waiting, own, places = waiting[others], own[others], (places[others] + 1) & last
        return new, held


class DuplicateFinder:
    """Tells which rows repeat a pair or, with `by_url`, a URL that came before.

    By URL one table serves both: a row repeats a kept pair exactly where its URL was kept with the same sample key.
    """

    def __init__(self, by_url: bool, max_rows: int) -> None:
        """Remember up to `max_rows` rows."""
        self._by_url = by_url
        self._table = _Table(max_rows)

    def find(self, keys: np.ndarray, urls: pa.Array, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return two masks: rows that repeat a kept pair, and rows that repeat a kept URL with another text.

        `keys` is uint8 [n, 16]; `rows` are the places of the rows that count, int64 in order, None for all of them: the
        masks are over these. The rows in neither mask are kept, and remembered.
        """
        pairs = key_words(keys if rows is None else keys[rows])
        entries = np.empty((len(pairs), 3), np.uint64)
        entries[:, :2] = string_hashes(urls, rows) if self._by_url else pairs
        entries[:, 2] = pairs[:, 1]
        new, held = self._table.put(entries)
        same_pair = held == pairs[:, 1]
        return ~new & same_pair, ~new & ~same_pair
