"""How the rows of a finished output are found by sample key.

Each stage states one of these in its `Stage`:

- `RowTable`: parquet tables with a ``sample_key`` column,
- `SourceTable`: the tables in which rows get their keys, so that a URL or a domain can be resolved to keys,
- `RowReader`: a function, for any other format,
- `Rowless.DERIVED`: no sample keys; affected if one of its inputs is,
- `Rowless.NO_ROWS`: no rows, and nothing made from it alone has any.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipelines.runner.outputs import StageOutput

if TYPE_CHECKING:
    import pyarrow as pa


class FoundRow(NamedTuple):
    """A row of an output."""

    sample_key: str
    file: str
    notes: Mapping[str, Any]
    """Further columns; `split`, `first_step` and `times_seen` are summed up by a trace."""


class RowSearch(Protocol):
    """A search for some sample keys through all outputs, upstream first."""

    @property
    def keys(self) -> Collection[str]:
        """The wanted sample keys."""

    def rows(self, output: StageOutput, prefix: str, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield the wanted rows of the tables whose names begin with `prefix`: sample_key, `columns` and file."""

    def holding_inputs(self, output: StageOutput) -> Iterator[StageOutput]:
        """Yield the inputs of an output in which wanted rows were found."""

    def may_hold(self, output: StageOutput) -> bool:
        """Return whether an output may hold wanted rows, judged by its inputs."""


@dataclass(frozen=True)
class RowTable:
    """Parquet tables whose names begin with `prefix`; `columns` are reported as notes of each row."""

    prefix: str
    columns: tuple[str, ...] = ()

    def find(self, output: StageOutput, search: RowSearch) -> Iterator[FoundRow]:
        """Yield the wanted rows."""
        for row in search.rows(output, self.prefix, self.columns):
            yield FoundRow(row["sample_key"], row["file"], {name: row[name] for name in self.columns})


@dataclass(frozen=True)
class SourceTable:
    """Parquet tables with the columns sample_key, url and alt_text, in which rows are first given their keys.

    Rows that the stage dropped went nowhere, so its drops are not searched.
    """

    prefix: str


@dataclass(frozen=True)
class RowReader:
    """A function that yields the wanted rows of an output."""

    find: Callable[[StageOutput, RowSearch], Iterator[FoundRow]]
    reads_inputs: bool = False
    """True if the rows are looked up in the output's inputs; then a missing input makes the answer unknown."""


class Rowless(Enum):
    """An output without sample keys."""

    DERIVED = "derived"
    """Counts as affected if one of its inputs is."""
    NO_ROWS = "no_rows"
    """Never affected."""


DERIVED, NO_ROWS = Rowless.DERIVED, Rowless.NO_ROWS
RowLookup = RowTable | SourceTable | RowReader | Rowless


def table_names(output: StageOutput, prefix: str) -> list[str]:
    """Return the parquet files of an output whose names begin with `prefix`."""
    names = (entry.path for entry in output.manifest.files)
    return [name for name in names if Path(name).name.startswith(prefix) and name.endswith(".parquet")]


def table_batches(output: StageOutput, names: Sequence[str], columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
    """Yield `columns` of some tables of an output, with one more column `file`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in names:
        with pq.ParquetFile(output.path(name)) as rows:
            for batch in rows.iter_batches(columns=list(columns)):
                yield batch.append_column("file", pa.repeat(name, batch.num_rows))
