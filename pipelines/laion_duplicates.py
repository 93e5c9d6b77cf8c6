"""Duplicates among rows that come in order, told by 128-bit hashes in bounded memory: the first of its kind stays.

Duplicates between parts are left to `pipelines.laion_selection`.
"""

import math

import numpy as np
import pyarrow as pa

from pipelines.row_hashes import key_words, string_hashes

_FIRST_SLOTS = 1 << 16
# LAION-400M's parts of 12.9 million rows fit into 2**24 slots.
_MAX_LOAD = 0.8


class _Table:
    """An open-addressing hash table of rows uint64 [slots, 3]: the hash's two words, and a word that belongs to it.

    A slot is empty where its first word is 0. Memory is 24 bytes a slot, for 10 million entries 403 MB.
    """

    def __init__(self, max_entries: int) -> None:
        slots = 1 << math.ceil(math.log2(max_entries / _MAX_LOAD + 1))
        self._max_slots = max(slots, _FIRST_SLOTS)
        self._slots = np.zeros((_FIRST_SLOTS, 3), np.uint64)
        self._used = 0

    def put(self, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Enter uint64 [rows, 3], the first of equal hashes first.

        Return a mask of the rows that are new, and per row the third word of the entry that the table holds.
        """
        entries[:, 0] |= entries[:, 0] == 0
        while len(self._slots) < self._max_slots and self._used + len(entries) > _MAX_LOAD * len(self._slots):
            self._grow()
        new, held = _enter(self._slots, entries)
        self._used += int(new.sum())
        return new, held

    def _grow(self) -> None:
        # Four times the slots at once: with twice, entering the old rows again cost as much as the rest of the work.
        num_slots = min(4 * len(self._slots), self._max_slots)
        old, self._slots = self._slots, np.zeros((num_slots, 3), np.uint64)
        for start in range(0, len(old), _FIRST_SLOTS):
            piece = old[start : start + _FIRST_SLOTS]
            _enter(self._slots, piece[piece[:, 0] != 0])


def _enter(slots: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    new = np.zeros(len(entries), bool)
    held = entries[:, 2].copy()
    last = len(slots) - 1
    waiting = np.arange(len(entries))
    places = (entries[:, 0] & np.uint64(last)).astype(np.int64)
    while len(waiting):
        wanted = np.take(entries, waiting, axis=0)
        found = np.take(slots, places, axis=0)
        empty = np.flatnonzero(found[:, 0] == 0)
        if len(empty):
            rows, at = waiting[empty], places[empty]
            # Rows that want one slot write their number there, the first of them last: it finds its own and stays.
            slots[at[::-1], 2] = rows[::-1]
            won = slots[at, 2] == rows
            slots[at[won]] = wanted[empty[won]]
            new[rows[won]] = True
            found[empty] = np.take(slots, at, axis=0)
        own = (found[:, 0] == wanted[:, 0]) & (found[:, 1] == wanted[:, 1])
        held[waiting[own]] = found[own, 2]
        others = np.flatnonzero(~own)
        waiting, places = waiting[others], (places[others] + 1) & last
    return new, held


class DuplicateFinder:
    """Tells which rows repeat a pair or, with `by_url`, a URL that came before.

    By URL one table serves both: a row repeats a kept pair exactly where its URL was kept with the same sample key.
    """

    def __init__(self, by_url: bool, max_rows: int) -> None:
        """Remember up to `max_rows` rows."""
        self._by_url = by_url
        self._table = _Table(max_rows)

    def find(self, keys: np.ndarray, urls: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Return two masks: rows that repeat a kept pair, and rows that repeat a kept URL with another text.

        `keys` is uint8 [rows, 16]. The rows in neither are kept, and remembered.
        """
        pairs = key_words(keys)
        entries = np.empty((len(pairs), 3), np.uint64)
        entries[:, :2] = string_hashes(urls) if self._by_url else pairs
        entries[:, 2] = pairs[:, 1]
        new, held = self._table.put(entries)
        same_pair = held == pairs[:, 1]
        return ~new & same_pair, ~new & ~same_pair
