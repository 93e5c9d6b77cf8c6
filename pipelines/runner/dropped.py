"""Streams a unit's dropped rows to disk, so they need not fit in memory."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Self

from pipelines.core.atomic import atomic_writer, sync_folder
from pipelines.core.manifest import FileEntry

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_BATCH_ROWS = 65_536
_COPY_BYTES = 1 << 20
_COLUMNS = ("sample_key", "reason", "detail")


class DropWriter:
    """Writes one unit's drops to a file, which appears when the context ends without an error."""

    def __init__(self, path: Path, unit: str) -> None:
        self.counts = Counter[str]()
        """Reason -> rows."""
        self._path = path
        self._unit = unit
        self._temporary = path.with_name(path.name + ".tmp")
        self._buffer: tuple[list[str], list[str], list[str]] = ([], [], [])
        self._batches: list[pa.RecordBatch] = []
        self._as_arrays = False
        self._num_pending = 0
        self._stream: IO[bytes] | None = None
        self._writer: pq.ParquetWriter | None = None

    def extend(self, sample_keys: Sequence[str], reasons: Sequence[str], details: Sequence[str]) -> None:
        """Record rows; the three sequences have equal length."""
        for column, values in zip(self._buffer, (sample_keys, reasons, details), strict=True):
            column.extend(values)
        self.counts.update(reasons)
        self._num_pending += len(reasons)
        if self._num_pending >= _BATCH_ROWS:
            self._flush()

    def extend_arrays(self, sample_keys: "pa.Array", reasons: "pa.DictionaryArray", details: "pa.Array") -> None:
        """Record rows from string arrays; `reasons` is dictionary-encoded."""
        import pyarrow as pa
        import pyarrow.compute as pc

        assert self._as_arrays or not self.counts, "a unit drops rows either one by one or as arrays"
        self._as_arrays = True
        for item in pc.value_counts(reasons).to_pylist():
            self.counts[item["values"]] += item["counts"]
        columns = [sample_keys, reasons.dictionary_decode(), details]
        self._batches.append(pa.RecordBatch.from_arrays(columns, list(_COLUMNS)))
        self._num_pending += len(reasons)
        if self._num_pending >= _BATCH_ROWS:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.counts:
                self._finish()
        finally:
            if self._stream is not None:
                self._stream.close()
                self._temporary.unlink(missing_ok=True)

    def _pack(self) -> None:
        """Turn the buffered Python strings into a batch, in their order."""
        import pyarrow as pa

        if self._buffer[0]:
            arrays = [pa.array(column, pa.string()) for column in self._buffer]
            self._batches.append(pa.RecordBatch.from_arrays(arrays, list(_COLUMNS)))
            for column in self._buffer:
                column.clear()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pack()
        table = pa.Table.from_batches(self._batches)
        self._batches.clear()
        self._num_pending = 0
        if self._as_arrays:
            table = table.append_column("unit", pa.repeat(self._unit, table.num_rows))
        if self._writer is None:
            self._stream = self._temporary.open("wb")
            # Keys are unique: a dictionary of them would only be built and discarded.
            dictionaries: bool | list[str] = ["reason", "unit"] if self._as_arrays else True
            self._writer = pq.ParquetWriter(self._stream, table.schema, compression="zstd", use_dictionary=dictionaries)
        self._writer.write_table(table, row_group_size=_BATCH_ROWS)

    def _finish(self) -> None:
        if self._num_pending:
            self._flush()
        assert self._writer is not None and self._stream is not None
        self._writer.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._temporary.replace(self._path)
        sync_folder(self._path.parent)


def gather_drops(units: Sequence[tuple[str, Path]], target: Path) -> FileEntry:
    """Concatenate the drops of several units, (name, file) in order, into one table with a column `unit`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, pa.string()) for name in (*_COLUMNS, "unit")])
    num_rows = 0
    with atomic_writer(target) as stream:
        if len(units) == 1 and pq.read_schema(units[0][1]).names == schema.names:
            # The one file already is the table: copy it instead of rewriting millions of rows.
            with units[0][1].open("rb") as source:
                num_rows = pq.read_metadata(source).num_rows
                source.seek(0)
                shutil.copyfileobj(source, stream, _COPY_BYTES)
        else:
            with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                pending: list[pa.RecordBatch] = []
                for name, path in units:
                    with pq.ParquetFile(path) as rows:
                        for batch in rows.iter_batches(_BATCH_ROWS, columns=list(_COLUMNS)):
                            pending.append(batch.append_column("unit", pa.repeat(name, batch.num_rows)))
                            if sum(item.num_rows for item in pending) >= _BATCH_ROWS:
                                num_rows += _write(writer, pending)
                num_rows += _write(writer, pending)
    return FileEntry(path=target.name, sha256=stream.sha256, num_bytes=stream.num_bytes, num_rows=num_rows)


def _write(writer: "pq.ParquetWriter", pending: "list[pa.RecordBatch]") -> int:
    """Write the pending batches of any number of units as few row groups; return the number of rows."""
    import pyarrow as pa

    if not pending:
        return 0
    table = pa.Table.from_batches(pending)
    pending.clear()
    writer.write_table(table, row_group_size=_BATCH_ROWS)
    return table.num_rows
