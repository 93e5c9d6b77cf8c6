"""The samples of many shards as one sequence, read by index from any process: a map-style dataset for torch."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.shards.reader import Sample, Shard, shard_keys


class ShardSamples(Sequence[Sample]):
    """Samples by index. Shards are opened on demand in a least-recently-used cache; a shard in an object store is
    downloaded when it is first opened, and stays in the local folder.

    Copies in other processes, forked or spawned, are independent; within a process, use it from one thread. Raises
    BadSampleError for an inconsistent sample, ThroughlineError for a shard that cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shard_of: np.ndarray,
        row_of: np.ndarray,
        data_version: str,
        *,
        max_open_shards: int = 64,
        verify_digests: bool = False,
    ) -> None:
        """`shard_of` and `row_of`, int (n,), are each sample's index in `paths` and in that shard."""
        self.paths, self.shard_of, self.row_of = list(paths), shard_of, row_of
        self.data_version = data_version
        self._max_open, self._verify = max_open_shards, verify_digests
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._outputs: list[StageOutput] = []
        """The output of each of `paths`; empty if they are plain files."""

    @classmethod
    def of_shards(cls, paths: Sequence[Path], **options: Any) -> Self:
        """Use all samples of the shards at `paths`, in that order; the data version is a digest of their keys."""
        keys = [shard_keys(path) for path in paths]
        shard_of = np.repeat(np.arange(len(paths), dtype=np.int32), [len(part) for part in keys])
        row_of = np.concatenate([np.arange(len(part), dtype=np.int32) for part in keys] or [np.zeros(0, np.int32)])
        return cls(paths, shard_of, row_of, digest_json(keys), **options)

    @classmethod
    def of_dataset(cls, dataset: StageOutput, shards: Sequence[StageOutput], split: str, **options: Any) -> Self:
        """Use the samples of a split, in the order of the dataset's table, which is sorted by key.

        Raises ThroughlineError if `shards` are not the outputs that the dataset was made from.
        """
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        from pipelines.dataset.dataset import SAMPLES_FILE

        expected = {ref.data_version for ref in dataset.manifest.inputs.get("shards", ())}
        if (given := {output.data_version for output in shards}) != expected:
            raise ThroughlineError(
                f"dataset {dataset.data_version}: made from other shards ({len(expected - given)} missing, "
                f"{len(given - expected)} unknown); re-run dataset, or give the outputs in its manifest"
            )
        table = pq.read_table(dataset.path(SAMPLES_FILE), columns=["part", "shard", "index_in_shard", "split"])
        table = table.filter(pc.equal(table["split"], split))
        parts, names = table["part"].to_pylist(), table["shard"].to_pylist()
        rows = table["index_in_shard"].to_numpy().astype(np.int32)
        return cls.of_places(shards, parts, names, rows, dataset.data_version, **options)

    @classmethod
    def of_places(
        cls,
        shards: Sequence[StageOutput],
        parts: Sequence[str],
        names: Sequence[str],
        row_of: np.ndarray,
        data_version: str,
        **options: Any,
    ) -> Self:
        """Use samples by location: part, shard name and, int (n,), row in the shard."""
        outputs = {output.manifest.partition or "": output for output in shards}
        paths: dict[tuple[str, str], int] = {}
        locations = zip(parts, names, strict=True)
        shard_of = np.array([paths.setdefault(item, len(paths)) for item in locations], dtype=np.int32)
        samples = cls([outputs[part].folder / name for part, name in paths], shard_of, row_of, data_version, **options)
        samples._outputs = [outputs[part] for part, _ in paths]
        return samples

    def __len__(self) -> int:
        return len(self.shard_of)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._shard(int(self.shard_of[index]))[int(self.row_of[index])]

    def name(self, index: int) -> str:
        """Return a sample's key and shard, for messages."""
        shard = self._shard(int(self.shard_of[index]))
        return f"{shard.keys[self.row_of[index]]} in {shard.path.name}"

    def _shard(self, number: int) -> Shard:
        shard = self._open.get(number)
        if shard is None:
            path = self.paths[number]
            if self._outputs:
                path = self._outputs[number].path(path.name)
            shard = self._open[number] = Shard(path, verify_digests=self._verify)
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)[1].close()
        else:
            self._open.move_to_end(number)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}
