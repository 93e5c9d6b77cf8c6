"""What became of a shard's rows: outcomes in memory, tables on disk, and the way from one pass over them to the next.

A shard that a later pass goes on with, in the same run or on another day, lies in the same tables as a finished one.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.atomic import atomic_writer
from pipelines.core.digest import HashingWriter
from pipelines.core.errors import ThroughlineError
from pipelines.download.status import FetchStatus

if TYPE_CHECKING:
    import pyarrow as pa

OpenFile = Callable[[str, int], AbstractContextManager[HashingWriter]]
"""Opens a table to be written, given its name and its number of rows."""
_PASS = "pass-"


@dataclass(frozen=True, slots=True)
class Row:
    """One subset row on its way."""

    sample_key: str
    url: str
    alt_text: str
    expected_sha256: str | None = None
    """What the source table says the bytes hash to, if it does."""


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of a row. `picture`, a row of `IMAGES_SCHEMA`, is there if this pass fetched it."""

    status: FetchStatus
    detail: str = ""
    http_status: int | None = None
    num_passes: int = 1
    picture: dict[str, Any] | None = None


@dataclass(frozen=True)
class Standing:
    """A shard as an earlier pass left it."""

    folder: Path
    name: str
    number: int = 0
    """The pass of this run that left it; 0 for an earlier run."""

    def outcomes(self) -> list[RowOutcome]:
        """Return what became of the rows, without pictures."""
        return [
            RowOutcome(FetchStatus(item["status"]), item["detail"], item["http_status"], item["num_passes"])
            for item in self._statuses().to_pylist()
        ]

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise ThroughlineError where it isn't of these rows."""
        if self._statuses()["sample_key"].to_pylist() != [row.sample_key for row in rows]:
            raise ThroughlineError(
                f"{self.folder / status_name(self.name)}: other rows than the subset's; start from a download of this "
                "subset"
            )

    def pictures(self) -> "pa.Table":
        from pipelines.download.tables import IMAGES_SCHEMA, read_table

        path = self.folder / images_name(self.name)
        return read_table(path, IMAGES_SCHEMA) if path.exists() else IMAGES_SCHEMA.empty_table()

    def _statuses(self) -> "pa.Table":
        from pipelines.download.tables import STATUS_SCHEMA, read_table

        return read_table(self.folder / status_name(self.name), STATUS_SCHEMA)


class Passes:
    """The shards that wait for the next pass, in a folder that a kill leaves in place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def standing(self, name: str) -> Standing | None:
        """Return a shard as the latest pass left it, or None where it doesn't wait."""
        left = [path for path in self._folder.glob(f"{_PASS}*") if (path / status_name(name)).exists()]
        numbers = [int(path.name.removeprefix(_PASS)) for path in left]
        return Standing(self._folder / f"{_PASS}{max(numbers)}", name, max(numbers)) if numbers else None

    def leave(
        self, number: int, name: str, rows: Sequence[Row], outcomes: Sequence[RowOutcome], standing: Standing | None
    ) -> None:
        """Let a shard wait for the pass after `number`."""
        folder = self._folder / f"{_PASS}{number}"
        folder.mkdir(parents=True, exist_ok=True)
        # The statuses come last: where they are, all is.
        write_tables(lambda path, _: atomic_writer(folder / path), name, rows, outcomes, standing)
        self._forget(name, number)

    def finish(self, name: str) -> None:
        """Let go of a shard that is finished."""
        self._forget(name, None)

    def _forget(self, name: str, kept: int | None) -> None:
        for path in self._folder.glob(f"{_PASS}*"):
            if path.name != f"{_PASS}{kept}":
                (path / status_name(name)).unlink(missing_ok=True)
                (path / images_name(name)).unlink(missing_ok=True)


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
    standing: Standing | None,
) -> None:
    """Write a shard's tables; one in which this pass changed nothing is taken over byte by byte."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.download.tables import STATUS_SCHEMA

    num_pictures = sum(outcome.status is FetchStatus.OK for outcome in outcomes)
    if standing is not None and all(outcome.picture is None for outcome in outcomes):
        if num_pictures:
            _copy(standing, images_name(name), open_file, num_pictures)
    elif num_pictures:
        table = _pictures(outcomes, standing)
        with open_file(images_name(name), num_pictures) as stream:
            pq.write_table(table, stream, **_table_options(table))
    if standing is not None and standing.outcomes() == list(outcomes):
        _copy(standing, status_name(name), open_file, len(rows))
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


def _copy(standing: Standing, path: str, open_file: OpenFile, num_rows: int) -> None:
    with (standing.folder / path).open("rb") as source, open_file(path, num_rows) as stream:
        shutil.copyfileobj(source, stream)


def _pictures(outcomes: Sequence[RowOutcome], standing: Standing | None) -> "pa.Table":
    """Return the pictures of all rows in their order: those that this pass fetched among those that were there."""
    import pyarrow as pa

    from pipelines.download.tables import IMAGES_SCHEMA

    fetched = pa.Table.from_pylist([outcome.picture for outcome in outcomes if outcome.picture], IMAGES_SCHEMA)
    if standing is None:
        return fetched
    there = standing.pictures()
    places, next_there, next_fetched = [], 0, there.num_rows
    for outcome in outcomes:
        if outcome.picture is not None:
            places.append(next_fetched)
            next_fetched += 1
        elif outcome.status is FetchStatus.OK:
            places.append(next_there)
            next_there += 1
    return pa.concat_tables([there, fetched]).take(places)


def _table_options(table: "pa.Table") -> dict[str, Any]:
    """Leave the pictures as they are: they don't compress, and statistics over them would double the footer."""
    others = [name for name in table.column_names if name != "image"]
    codecs = dict.fromkeys(others, "zstd") | {"image": "none"}
    return {"compression": codecs, "use_dictionary": False, "write_statistics": others}
