"""The samples that each step consumes, and the record of consumed samples."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pipelines.dataset.order import SampleOrder

LEDGER_COLUMNS = ("first_step", "times_seen", "truncated")
"""The per-sample columns of a ledger."""


class DataOrder:
    """Training order as a pure function of (data version of the dataset, seed, batch size, step).

    Each pass over the samples has its own permutation; a batch may span two passes, so every sample is seen equally
    often. There is nothing to save or restore: step k of a resumed run is step k.
    """

    def __init__(self, data_version: str, seed: int, batch_size: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError("the dataset has no training samples")
        self._order = SampleOrder(data_version, seed, num_samples)
        self.batch_size, self.num_samples = batch_size, num_samples

    def indices(self, step: int) -> np.ndarray:
        """Return the sample indices (B,) int64 of a step, in the order of their positions in the global batch."""
        return self._order.take(step * self.batch_size, (step + 1) * self.batch_size)


class Ledger:
    """For each consumed sample its first step, its count, and whether its caption was truncated; one digest over all.

    digest_0 = SHA-256(data version, seed, batch size), digest_k+1 = SHA-256(digest_k, step k, keys of step k in order).
    Two runs with equal digests saw the same samples in the same order.
    """

    def __init__(self, sample_keys: np.ndarray, data_version: str, seed: int, batch_size: int) -> None:
        """`sample_keys` is uint8 (num_samples, 16)."""
        self._keys = sample_keys
        self._digest = hashlib.sha256(f"ledger:{data_version}:{seed}:{batch_size}".encode()).digest()
        self.first_step = np.full(len(sample_keys), -1, dtype=np.int64)
        self.times_seen = np.zeros(len(sample_keys), dtype=np.int64)
        self.truncated = np.zeros(len(sample_keys), dtype=bool)

    def record(self, step: int, indices: np.ndarray) -> None:
        """Record the samples of a step, in the order of their positions in the global batch."""
        first_seen = indices[self.first_step[indices] < 0]
        self.first_step[first_seen] = step
        np.add.at(self.times_seen, indices, 1)
        words = self._digest + step.to_bytes(8, "little") + np.ascontiguousarray(self._keys[indices]).tobytes()
        self._digest = hashlib.sha256(words).digest()

    def record_truncated(self, indices: np.ndarray) -> None:
        """Mark samples whose captions were truncated; repeats are fine."""
        self.truncated[indices] = True

    @property
    def num_truncated(self) -> int:
        """Distinct samples whose captions were truncated."""
        return int(self.truncated.sum())

    @property
    def consumption_digest(self) -> str:
        """The rolling digest as hex digits."""
        return self._digest.hex()

    @property
    def num_samples_seen(self) -> int:
        """Samples consumed, including repeats."""
        return int(self.times_seen.sum())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the columns for a snapshot, which also needs `consumption_digest`."""
        return {name: torch.from_numpy(getattr(self, name)) for name in LEDGER_COLUMNS}

    def load_state_dict(self, tensors: Mapping[str, Tensor], consumption_digest: str) -> None:
        """Restore the columns and the digest of a snapshot."""
        self.first_step, self.times_seen, self.truncated = (tensors[name].numpy().copy() for name in LEDGER_COLUMNS)
        self._digest = bytes.fromhex(consumption_digest)
