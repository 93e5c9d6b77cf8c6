"""Training order: which samples a step consumes, as a pure function of data version, seed and position.

Positions count samples over all passes: position p is sample p mod n of pass p div n, and each pass has its own
permutation. The number of processes does not matter. The state of a run is the number of positions consumed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def pass_permutation(data_version: str, seed: int, pass_index: int, num_samples: int) -> np.ndarray:
    """Return the order of one pass over the samples: int64 (num_samples,)."""
    name = f"order:{data_version}:{seed}:{pass_index}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    # Raw Philox words are the same in every numpy version; Generator.permutation does not guarantee that.
    return np.argsort(np.random.Philox(key=key).random_raw(num_samples), kind="stable").astype(np.int64)


class SampleOrder:
    """The sample at each position. Caches the passes in use, one or two: 8 bytes per sample and pass."""

    def __init__(self, data_version: str, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError("the dataset has no samples")
        self.data_version, self.seed, self.num_samples = data_version, seed, num_samples
        self._passes: dict[int, np.ndarray] = {}

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return the sample indices, int64, of the positions from `start` up to but excluding `stop`."""
        if stop <= start:
            return np.zeros(0, dtype=np.int64)
        passes, offsets = np.divmod(np.arange(start, stop, dtype=np.int64), self.num_samples)
        needed = range(int(passes[0]), int(passes[-1]) + 1)
        self._passes = {index: self._pass(index) for index in needed}
        return np.concatenate([self._passes[index][offsets[passes == index]] for index in needed])

    def _pass(self, index: int) -> np.ndarray:
        cached = self._passes.get(index)
        return pass_permutation(self.data_version, self.seed, index, self.num_samples) if cached is None else cached

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_passes": {}}


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's positions in a step, `stop` excluded; `consumed` counts those of all ranks up to the step's end."""

    start: int
    stop: int
    consumed: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """The positions of one rank.

    A step consists of `num_ranks` consecutive batches, the first for rank 0. If `stop` cuts a step short, the last
    ranks get fewer positions or none, so that each position is consumed once and all ranks count the same steps.
    """

    batch_size: int
    rank: int = 0
    num_ranks: int = 1
    consumed: int = 0
    """Positions consumed so far by all ranks together, with any number of ranks."""
    stop: int | None = None
    """End position, excluded; None never ends. The end of pass e is (e + 1) times the number of samples."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.num_ranks or self.consumed < 0:
            raise ValueError(
                f"batch_size {self.batch_size}, rank {self.rank} of {self.num_ranks}, consumed {self.consumed}: "
                "expected at least 1, a rank below the number of ranks, and at least 0"
            )

    @property
    def num_steps(self) -> int | None:
        """Steps up to `stop`; None if there is no end."""
        if self.stop is None:
            return None
        return max(0, -(-(self.stop - self.consumed) // (self.batch_size * self.num_ranks)))

    def step(self, index: int) -> Step:
        """Return this rank's positions in step `index`, counted from `consumed`."""
        start = self.consumed + index * self.batch_size * self.num_ranks
        first = start + self.rank * self.batch_size
        ends = first + self.batch_size, start + self.batch_size * self.num_ranks
        if self.stop is None:
            return Step(first, *ends)
        return Step(min(first, self.stop), min(ends[0], self.stop), min(ends[1], self.stop))

    def steps(self, worker: int = 0, num_workers: int = 1) -> Iterator[Step]:
        """Yield the steps of one of a rank's workers, which takes every `num_workers`-th step."""
        index, end = worker, self.num_steps
        while end is None or index < end:
            yield self.step(index)
            index += num_workers


class StepIndices:
    """The batches of a rank as lists of sample indices: a `batch_sampler` for a torch `DataLoader` over samples."""

    def __init__(self, order: SampleOrder, share: Share) -> None:
        self._order, self._share = order, share

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._share.steps():
            yield self._order.take(step.start, step.stop).tolist()

    def __len__(self) -> int:
        if self._share.num_steps is None:
            raise TypeError("an endless order has no length; give its share a `stop`")
        return self._share.num_steps
