"""Near-duplicates among 64-bit hashes: finds every pair within a Hamming distance without comparing all pairs.

Two hashes that differ in at most d of 64 bits agree in at least b - d of b blocks of bits. So for each choice of b - d
blocks, the hashes are sorted by these bits, and only those that agree in them are compared. This is exact, and nearly
linear as long as blocks are wide (Manku, Jain and Das Sarma, "Detecting near-duplicates for web crawling", 2007).
"""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipelines.cluster.units import RayTasks

_BITS = 64
_MAX_TABLES = 2_000
_SORT_COST = 15.0
"""Time to sort one hash relative to the time to compare one pair, measured at 10^6 hashes; used to choose blocks."""


def near_pairs(hashes: np.ndarray, distance: int, tasks: "RayTasks | None" = None) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs (i, j), i < j, int64, of distinct hashes (uint64, (n,)) that differ in at most `distance` bits.

    Sorted by i, then j. The hashes must be distinct: equal ones would give too many pairs. With `tasks`, the choices of
    blocks are distributed over the cluster.
    """
    masks = list(_masks(len(hashes), distance)) if len(hashes) > 1 and distance > 0 else []
    found = [np.zeros(0, dtype=np.uint64)]
    if tasks is None:
        found += [_matching_pairs((hashes, distance), mask) for mask in masks]
    else:
        named = ((f"blocks {mask:016x}", mask) for mask in masks)
        found += [pairs for _, pairs in tasks.map(_matching_pairs, (hashes, distance), named)]
    pairs = np.unique(np.concatenate(found))
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _matching_pairs(hashes_and_distance: tuple[np.ndarray, int], mask: np.uint64) -> np.ndarray:
    """Return i << 32 | j, uint64, for the near pairs that agree in all bits of the mask."""
    hashes, distance = hashes_and_distance
    found = [np.zeros(0, dtype=np.uint64)]
    masked = hashes & mask
    order = np.argsort(masked)
    masked, ordered = masked[order], hashes[order]
    starts, offset = np.arange(len(hashes) - 1), 1
    while len(starts := starts[: np.searchsorted(starts, len(hashes) - offset)]):
        starts = starts[masked[starts] == masked[starts + offset]]
        near = starts[np.bitwise_count(ordered[starts] ^ ordered[starts + offset]) <= distance]
        pair = np.sort(np.stack([order[near], order[near + offset]]), axis=0).astype(np.uint64)
        found.append(pair[0] << np.uint64(32) | pair[1])
        offset += 1
    return np.concatenate(found)


def _masks(num_hashes: int, distance: int) -> Iterator[np.uint64]:
    """Yield the bit mask of each choice of blocks, with the cheapest number of blocks."""

    def cost(num_blocks: int) -> float:
        num_tables = math.comb(num_blocks, distance)
        candidates = num_hashes / 2 / 2 ** min(_BITS * (num_blocks - distance) // num_blocks, 63)
        return num_tables * (_SORT_COST + candidates)

    possible = [number for number in range(distance + 1, _BITS) if math.comb(number, distance) <= _MAX_TABLES]
    num_blocks = min(possible, key=cost)
    edges = [round(_BITS * number / num_blocks) for number in range(num_blocks + 1)]
    blocks = [((1 << end) - 1) ^ ((1 << start) - 1) for start, end in itertools.pairwise(edges)]
    for chosen in itertools.combinations(blocks, num_blocks - distance):
        yield np.uint64(sum(chosen))


def winners(hashes: np.ndarray, distance: int, tasks: "RayTasks | None" = None) -> np.ndarray:
    """Return the index of each hash's winner, int64 (n,), for hashes (uint64, (n,)) sorted best first.

    Forms stars, not chains: from the best hash on, each one not yet claimed becomes its own winner and claims all
    unclaimed hashes within `distance`. So each hash is within `distance` of its winner, and no two winners are.
    """
    distinct, first, of_hash = np.unique(hashes, return_index=True, return_inverse=True)
    best_first = np.argsort(first)
    rank = np.empty(len(distinct), dtype=np.int64)
    rank[best_first] = np.arange(len(distinct))
    better, worse = near_pairs(distinct[best_first], distance, tasks)
    centre = np.arange(len(distinct))
    starts = np.searchsorted(better, np.arange(len(distinct) + 1))
    for index in np.unique(better).tolist():
        if centre[index] == index:
            near = worse[starts[index] : starts[index + 1]]
            unclaimed = near[centre[near] == near]
            centre[unclaimed] = index
    return first[best_first][centre[rank[of_hash]]]
