"""Passes over a part: which shards and rows each pass requests, and partly downloaded shards between two passes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pipelines.core.atomic import atomic_writer
from pipelines.core.progress import Progress
from pipelines.download.config import ImagesConfig
from pipelines.download.outcomes import Row, RowOutcome, ShardProgress, images_name, status_name, write_tables
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun

_PASS = "pass-"


@dataclass(frozen=True)
class ShardTask:
    """A shard to download in one pass: all its rows, or those that failed in `previous` and may succeed now."""

    name: str
    rows: list[Row]
    previous: ShardProgress | None

    def requested_rows(self) -> list[int]:
        return list(range(len(self.rows))) if self.previous is None else self.previous.retryable_rows()


class PassStore:
    """Shards that wait for another pass, in a folder that survives a kill."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def progress(self, name: str) -> ShardProgress | None:
        """Return a shard after its latest pass, or None if it is not waiting."""
        folders = [path for path in self._folder.glob(f"{_PASS}*") if (path / status_name(name)).exists()]
        latest = max((int(path.name.removeprefix(_PASS)) for path in folders), default=None)
        return None if latest is None else ShardProgress.read(self._folder / f"{_PASS}{latest}", name, latest)

    def save(self, pass_number: int, task: ShardTask, outcomes: Sequence[RowOutcome]) -> None:
        """Store a shard after `pass_number`, in place of its earlier passes."""
        folder = self._folder / f"{_PASS}{pass_number}"
        folder.mkdir(parents=True, exist_ok=True)
        # The status table is written last: if it exists, the shard is complete.
        write_tables(lambda path, _: atomic_writer(folder / path), task.name, task.rows, outcomes, task.previous)
        self._remove(task.name, keep=pass_number)

    def remove(self, name: str) -> None:
        """Delete a shard, which is finished."""
        self._remove(name, keep=None)

    def _remove(self, name: str, keep: int | None) -> None:
        for path in self._folder.glob(f"{_PASS}*"):
            if path.name != f"{_PASS}{keep}":
                (path / status_name(name)).unlink(missing_ok=True)
                (path / images_name(name)).unlink(missing_ok=True)


class PartShards:
    """All shards of a part, with the progress of each."""

    def __init__(self, run: StageRun[ImagesConfig], path: Path, num_rows: int, earlier: StageOutput | None) -> None:
        self.run = run
        self.store = PassStore(run.scratch.absolute())
        self._path = path
        self._num_rows = num_rows
        self._earlier = earlier

    def progress(self, pass_number: int) -> tuple[Progress, Counter[str]]:
        """Return the progress display for a pass, and the counts of row statuses before it."""
        config, counts = self.run.config, Counter[str]()
        num_requested, finished = 0, {unit.name: unit.notes["statuses"] for unit in self.run.finished_units()}
        for index in range(-(-self._num_rows // config.rows_per_shard)):
            name = shard_name(index)
            if name in finished:
                counts.update(finished[name])
                continue
            previous = self._previous(name)
            if previous is not None:
                counts.update(outcome.status.value for outcome in previous.outcomes)
                num_requested += len(previous.retryable_rows()) if previous.pass_number < pass_number else 0
        if pass_number == 1 and self._earlier is None:
            return self.run.progress(self._num_rows, "images", initial=counts.total()), counts
        return Progress(f"{self.run.label} pass {pass_number}", num_requested, "failed images"), counts

    def tasks(self, pass_number: int) -> Iterator[ShardTask]:
        """Yield the shards that a pass has to download."""
        for name, rows in read_shards(self._path, self.run.config.rows_per_shard):
            if self.run.is_finished(name):
                continue
            previous = self._previous(name)
            if previous is None:
                yield ShardTask(name, rows, None)
            elif previous.pass_number < pass_number:
                previous.check_rows(rows)
                yield ShardTask(name, rows, previous)

    def _previous(self, name: str) -> ShardProgress | None:
        waiting = self.store.progress(name)
        if waiting is not None or self._earlier is None:
            return waiting
        listed = {entry.path for entry in self._earlier.manifest.files}
        self._earlier.path(status_name(name))  # raises if the manifest does not list it
        self._earlier.fetch([images_name(name)] if images_name(name) in listed else [])
        return ShardProgress.read(self._earlier.folder.absolute(), name)


def shard_name(index: int) -> str:
    """Return the name of the unit made from a subset's shard."""
    return f"{index:05d}"


def read_shards(path: Path, rows_per_shard: int) -> Iterator[tuple[str, list[Row]]]:
    """Yield (unit name, rows) of a subset, independent of its row groups; the last shard may be shorter."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    pending: list[Row] = []
    with pq.ParquetFile(path) as rows:
        names = [field.name for field in fields(Row) if field.name in rows.schema_arrow.names]
        for batch in rows.iter_batches(max(rows_per_shard, 8192), columns=names):
            pending.extend(Row(**row) for row in pa.Table.from_batches([batch]).to_pylist())
            while len(pending) >= rows_per_shard:
                yield shard_name(number), pending[:rows_per_shard]
                pending = pending[rows_per_shard:]
                number += 1
    if pending:
        yield shard_name(number), pending
