"""Sample batches for a torch `DataLoader`, in a deterministic order that resumes exactly in any layout of processes.

The state of a run is one number, the positions consumed by all ranks; every batch carries it. `pipelines.dataset.order`
maps positions to samples, and `pipelines.dataset.samples` reads them.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from pipelines.core.errors import ThroughlineError
from pipelines.dataset.order import SampleOrder, Share, Step
from pipelines.dataset.samples import ShardSamples
from pipelines.shards.reader import BadSampleError, Sample

_NAMES_SHOWN = 20
# Raised by Pillow and parsers on malformed bytes.
_DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, TypeError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that was skipped: `name` is its key and shard."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """One rank's share of a step. Skipped samples make it shorter, so that the positions of others do not change."""

    items: list[Any]
    """Results of `decode`."""
    indices: np.ndarray
    """int64: the samples' indices in `ShardSamples`."""
    consumed: int
    """Positions consumed by all ranks at the end of this step; start here to resume after it."""
    skipped: tuple[Skipped, ...]


def decode_image(sample: Sample) -> tuple[np.ndarray, str]:
    """Return the image as uint8 (H, W, 3) and the caption."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(sample.image_bytes)).convert("RGB")), sample.caption


class ShardStream(IterableDataset[SampleBatch]):
    """Batches of one rank. Use it as ``DataLoader(stream, batch_size=None, num_workers=...)``.

    Batches and their order do not depend on the number of workers: worker w of W makes every W-th batch, and the loader
    takes them in turn. A sample that is inconsistent or cannot be decoded is skipped and listed in its batch;
    `max_bad_run` consecutive ones in one process raise ThroughlineError with their names. A damaged shard raises it at
    once.
    """

    def __init__(
        self,
        samples: ShardSamples,
        share: Share,
        *,
        seed: int,
        decode: Callable[[Sample], Any] = decode_image,
        max_bad_run: int = 10,
    ) -> None:
        if max_bad_run < 1:
            raise ValueError(f"max_bad_run is {max_bad_run}, expected at least 1")
        self.samples, self.share = samples, share
        self.order = SampleOrder(samples.data_version, seed, len(samples))
        self._decode, self._max_bad_run = decode, max_bad_run

    def __iter__(self) -> Iterator[SampleBatch]:
        worker = get_worker_info()
        bad_run: list[Skipped] = []
        for step in self.share.steps(worker.id, worker.num_workers) if worker else self.share.steps():
            yield self._batch(step, bad_run)

    def _batch(self, step: Step, bad_run: list[Skipped]) -> SampleBatch:
        items, indices, skipped = [], [], []
        for index in self.order.take(step.start, step.stop).tolist():
            try:
                items.append(self._item(index))
            except BadSampleError as error:
                bad = Skipped(self.samples.name(index), str(error))
                skipped.append(bad)
                bad_run.append(bad)
                if len(bad_run) >= self._max_bad_run:
                    raise ThroughlineError(_bad_run_message(bad_run)) from error
            else:
                indices.append(index)
                bad_run.clear()
        return SampleBatch(items, np.array(indices, dtype=np.int64), step.consumed, tuple(skipped))

    def _item(self, index: int) -> Any:
        sample = self.samples[index]
        try:
            return self._decode(sample)
        except _DECODE_ERRORS as error:
            raise BadSampleError(f"not decodable: {type(error).__name__}: {error}") from error


def _bad_run_message(bad_run: list[Skipped]) -> str:
    shown = ", ".join(map(str, bad_run[:_NAMES_SHOWN]))
    more = f" and {len(bad_run) - _NAMES_SHOWN} more" if len(bad_run) > _NAMES_SHOWN else ""
    return f"{len(bad_run)} consecutive bad samples: {shown}{more}; check these shards with `throughline lint --decode`"
