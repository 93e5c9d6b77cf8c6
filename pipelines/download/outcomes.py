"""Outcomes of a shard's rows: in memory, and as the two tables of a finished or partly downloaded shard."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipelines.core.digest import HashingWriter
from pipelines.core.errors import ThroughlineError
from pipelines.download.status import RETRYABLE, RETRYABLE_LATER, FetchStatus

if TYPE_CHECKING:
    import pyarrow as pa

OpenFile = Callable[[str, int], AbstractContextManager[HashingWriter]]
"""Opens a table for writing, given its name and its number of rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One subset row to download."""

    sample_key: str
    url: str
    alt_text: str
    expected_sha256: str | None = None
    """SHA-256 of the image according to the source table, if it has one."""


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """Outcome of downloading one row. `image`, a row of `IMAGES_SCHEMA`, is set if this pass downloaded it."""

    status: FetchStatus
    detail: str = ""
    http_status: int | None = None
    num_passes: int = 1
    image: dict[str, Any] | None = None


@dataclass(frozen=True)
class ShardProgress:
    """A shard after an earlier pass: its tables on disk, and the outcomes of its rows."""

    folder: Path
    name: str
    pass_number: int
    """Pass of this run that wrote the tables; 0 for an earlier run."""
    sample_keys: list[str]
    outcomes: list[RowOutcome]
    """One for each row; images stay on disk."""

    @classmethod
    def read(cls, folder: Path, name: str, pass_number: int = 0) -> Self:
        from pipelines.download.tables import STATUS_SCHEMA, read_table

        statuses = read_table(folder / status_name(name), STATUS_SCHEMA).to_pylist()
        outcomes = [
            RowOutcome(FetchStatus(item["status"]), item["detail"], item["http_status"], item["num_passes"])
            for item in statuses
        ]
        return cls(folder, name, pass_number, [item["sample_key"] for item in statuses], outcomes)

    def retryable_rows(self) -> list[int]:
        """Return the indices of the rows for which another attempt is worthwhile."""
        retryable = RETRYABLE if self.pass_number else RETRYABLE_LATER
        return [index for index, outcome in enumerate(self.outcomes) if outcome.status in retryable]

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise ThroughlineError unless the shard consists of `rows`."""
        if self.sample_keys != [row.sample_key for row in rows]:
            raise ThroughlineError(
                f"{self.folder / status_name(self.name)}: rows differ from the subset's; start from a download of this "
                "subset"
            )

    def images(self, columns: Sequence[str] | None = None) -> "pa.Table":
        """Return the images downloaded so far, in the order of their rows."""
        import pyarrow as pa

        from pipelines.download.tables import IMAGES_SCHEMA, read_table

        path = self.folder / images_name(self.name)
        schema = IMAGES_SCHEMA if columns is None else pa.schema(map(IMAGES_SCHEMA.field, columns))
        return read_table(path, schema) if path.exists() else schema.empty_table()


def images_name(name: str) -> str:
    from pipelines.download.tables import PREFIX

    return f"{PREFIX}{name}.parquet"


def status_name(name: str) -> str:
    return f"status-{name}.parquet"


def write_tables(
    open_file: OpenFile,
    name: str,
    rows: Sequence[Row],
    outcomes: Sequence[RowOutcome],
    previous: ShardProgress | None,
) -> None:
    """Write a shard's tables; a table that this pass did not change is copied byte by byte."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.download.tables import STATUS_SCHEMA

    num_images = sum(outcome.status is FetchStatus.OK for outcome in outcomes)
    if previous is not None and all(outcome.image is None for outcome in outcomes):
        if num_images:
            _copy(previous, images_name(name), open_file, num_images)
    elif num_images:
        table = _images_table(outcomes, previous)
        with open_file(images_name(name), num_images) as stream:
            pq.write_table(table, stream, **_table_options(table))
    if previous is not None and previous.outcomes == list(outcomes):
        _copy(previous, status_name(name), open_file, len(rows))
        return
    statuses = [
        {
            "sample_key": row.sample_key,
            "url": row.url,
            "status": outcome.status.value,
            "http_status": outcome.http_status,
            "detail": outcome.detail,
            "num_passes": outcome.num_passes,
        }
        for row, outcome in zip(rows, outcomes, strict=True)
    ]
    with open_file(status_name(name), len(rows)) as stream:
        pq.write_table(pa.Table.from_pylist(statuses, STATUS_SCHEMA), stream, compression="zstd")


def _copy(previous: ShardProgress, path: str, open_file: OpenFile, num_rows: int) -> None:
    with (previous.folder / path).open("rb") as source, open_file(path, num_rows) as stream:
        shutil.copyfileobj(source, stream)


def _images_table(outcomes: Sequence[RowOutcome], previous: ShardProgress | None) -> "pa.Table":
    """Return the images of all rows in row order: those of this pass merged with those of earlier passes."""
    import pyarrow as pa

    from pipelines.download.tables import IMAGES_SCHEMA

    new = pa.Table.from_pylist([outcome.image for outcome in outcomes if outcome.image], IMAGES_SCHEMA)
    if previous is None:
        return new
    old = previous.images()
    indices, next_old, next_new = [], 0, old.num_rows
    for outcome in outcomes:
        if outcome.image is not None:
            indices.append(next_new)
            next_new += 1
        elif outcome.status is FetchStatus.OK:
            indices.append(next_old)
            next_old += 1
    return pa.concat_tables([old, new]).take(indices)


def _table_options(table: "pa.Table") -> dict[str, Any]:
    """Return options that leave image bytes uncompressed and without statistics, which would double the footer."""
    others = [name for name in table.column_names if name != "image"]
    codecs = dict.fromkeys(others, "zstd") | {"image": "none"}
    return {"compression": codecs, "use_dictionary": False, "write_statistics": others}
