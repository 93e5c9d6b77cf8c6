"""The interface of a stage's function: its run, its units of work with their journal, and its result."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipelines.core.atomic import atomic_writer, sync_folder, write_bytes
from pipelines.core.config import FrozenConfig
from pipelines.core.digest import HashingWriter, file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import DROPPED_NAME, Conservation, FileEntry, SourceFile
from pipelines.core.progress import Progress
from pipelines.runner.dropped import DropWriter, gather_drops
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.publication import OUT

if TYPE_CHECKING:
    import pyarrow as pa

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of a stage's function, besides its files.

    `conservation` is summed over the units unless given here. `summary` and `seeds` must be the same on every run of
    the same fingerprint; rates, seconds and memory belong in `measurements`.
    """

    summary: Mapping[str, Any] = field(default_factory=dict)
    measurements: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    sources: Sequence[SourceFile] = ()
    conservation: Conservation | None = None


class Unit:
    """One piece of a stage's work, such as a shard: its files, row counts, dropped keys and notes."""

    def __init__(self, name: str, out_folder: Path, drops: DropWriter) -> None:
        self.name = name
        self._out_folder = out_folder
        self._files: list[FileEntry] = []
        self._drops = drops
        self._rows: tuple[int, int] | None = None
        self.notes: dict[str, Any] = {}
        """Deterministic JSON values that the stage reads back when it summarises its units."""

    @contextmanager
    def open(self, path: str, *, num_rows: int | None = None) -> Iterator[HashingWriter]:
        """Yield a stream for the output file `path` (relative), which is hashed while it is written."""
        target = self._out_folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(target) as stream:
            yield stream
        self._files.append(FileEntry(path=path, sha256=stream.sha256, num_bytes=stream.num_bytes, num_rows=num_rows))

    def write(self, path: str, data: bytes, *, num_rows: int | None = None) -> None:
        """Write the output file `path` in one call."""
        with self.open(path, num_rows=num_rows) as stream:
            stream.write(data)

    def adopt(self, source: Path, path: str, *, num_rows: int | None = None) -> None:
        """Move a file that another library wrote into the output; reads it once to hash it."""
        target = self._out_folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        entry = FileEntry(path=path, sha256=file_sha256(source), num_bytes=source.stat().st_size, num_rows=num_rows)
        source.replace(target)
        sync_folder(target.parent)
        self._files.append(entry)

    def count_rows(self, path: str, num_rows: int) -> None:
        """Set the number of rows of a file that was opened before it was known."""
        self._files = [
            entry.model_copy(update={"num_rows": num_rows}) if entry.path == path else entry for entry in self._files
        ]

    def drop(self, sample_key: str, reason: str, detail: str = "") -> None:
        """Record a dropped row: `reason` is a short snake_case word, `detail` is free text."""
        self._drops.extend([sample_key], [reason], [detail])

    def drop_many(self, sample_keys: Sequence[str], reasons: Sequence[str], details: Sequence[str]) -> None:
        """Record many dropped rows, without keeping them in memory."""
        self._drops.extend(sample_keys, reasons, details)

    def drop_arrays(self, sample_keys: "pa.Array", reasons: "pa.DictionaryArray", details: "pa.Array") -> None:
        """Record many dropped rows, without a Python object for each."""
        self._drops.extend_arrays(sample_keys, reasons, details)

    def account(self, *, rows_in: int, rows_out: int) -> None:
        """Set the rows that entered and left the unit.

        Raises ThroughlineError unless rows in = rows out + dropped rows.
        """
        num_dropped = self._drops.counts.total()
        if rows_in != rows_out + num_dropped:
            raise ThroughlineError(
                f"unit {self.name}: {rows_in} rows in, but {rows_out} out and {num_dropped} dropped; "
                "every lost row needs a reason"
            )
        self._rows = (rows_in, rows_out)

    def journal(self) -> dict[str, Any]:
        """Return the unit's journal entry as a JSON value."""
        return {
            "files": [entry.model_dump() for entry in self._files],
            "rows": self._rows,
            "dropped": dict(sorted(self._drops.counts.items())),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class FinishedUnit:
    """A unit's journal entry."""

    name: str
    files: tuple[FileEntry, ...]
    rows: tuple[int, int] | None
    dropped: dict[str, int]
    """Reason -> rows; their keys are in the output's dropped.parquet once the stage is finished."""
    notes: dict[str, Any]


class StageRun(Generic[ConfigT]):
    """The argument of a stage's function: configuration, inputs, and methods to write the output."""

    def __init__(
        self, stage_name: str, config: ConfigT, partition: str | None, inputs: Inputs, work_folder: Path
    ) -> None:
        self.stage_name = stage_name
        self.config = config
        self.partition = partition
        self.inputs = inputs
        self._out = work_folder / OUT
        self._units = work_folder / "units"
        self.scratch = work_folder / "scratch"
        """A folder for checkpoints of unfinished work; survives a kill, removed when the stage finishes."""
        self.logs = work_folder.parent.parent / "logs" / f"{partition or stage_name}-{work_folder.name[:8]}"
        """A folder for logs and curves that are not part of the output; not created here, never removed."""
        for folder in (self._out, self._units, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self._discard_incomplete_units()

    def _discard_incomplete_units(self) -> None:
        """Delete the journal entry of each unit whose files are incomplete, so that it is computed again."""
        for unit in self.finished_units():
            paths = [(self.out_path(entry.path), entry.num_bytes) for entry in unit.files]
            is_complete = all(path.is_file() and path.stat().st_size == num_bytes for path, num_bytes in paths)
            if not is_complete or (unit.dropped and not self._drops_path(unit.name).is_file()):
                (self._units / f"{unit.name}.json").unlink()

    def input(self, name: str) -> StageOutput:
        """Return the input of that name; raises ThroughlineError unless there is exactly one."""
        outputs = self.inputs.get(name, ())
        if len(outputs) != 1:
            raise ThroughlineError(f"stage {self.stage_name}: expected one input {name!r}, got {len(outputs)}")
        return outputs[0]

    @property
    def label(self) -> str:
        return f"{self.stage_name} {self.partition}" if self.partition else self.stage_name

    def progress(self, total: int | None, noun: str, *, initial: int = 0) -> Progress:
        return Progress(self.label, total, noun, initial=initial)

    def is_finished(self, unit_name: str) -> bool:
        """Return whether an interrupted run has already finished this unit."""
        return (self._units / f"{unit_name}.json").exists()

    @contextmanager
    def unit(self, name: str) -> Iterator[Unit]:
        """Yield a unit to fill; it is journalled as finished when the block ends without an error."""
        with DropWriter(self._drops_path(name), name) as drops:
            unit = Unit(name, self._out, drops)
            yield unit
        write_bytes(self._units / f"{name}.json", json.dumps(unit.journal(), allow_nan=False).encode())

    def _drops_path(self, unit_name: str) -> Path:
        return self._units / f"{unit_name}.dropped"

    def write_dropped(self) -> FileEntry | None:
        """Concatenate the drops of all units, sorted by unit name, into one table; None if no row was dropped."""
        drops = [(unit.name, self._drops_path(unit.name)) for unit in self.finished_units() if unit.dropped]
        return gather_drops(drops, self.out_path(DROPPED_NAME)) if drops else None

    def finished_units(self) -> list[FinishedUnit]:
        """Return the journal of all finished units, sorted by name."""
        return [_read_journal(path) for path in sorted(self._units.glob("*.json"))]

    def finished_unit(self, name: str) -> FinishedUnit:
        """Return the journal of one finished unit."""
        return _read_journal(self._units / f"{name}.json")

    def adopt(self, name: str, work_folder: Path) -> FinishedUnit:
        """Take over a unit that another process finished in its own work folder on the same file system."""
        journal = work_folder / "units" / f"{name}.json"
        unit = _read_journal(journal)
        moves = [(work_folder / "out" / entry.path, self.out_path(entry.path)) for entry in unit.files]
        if unit.dropped:
            moves.append((journal.with_suffix(".dropped"), self._drops_path(name)))
        for source, target in [*moves, (journal, self._units / journal.name)]:  # the journal entry comes last
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            sync_folder(target.parent)
        shutil.rmtree(work_folder, ignore_errors=True)
        return unit

    def out_path(self, path: str) -> Path:
        """Return the path of a written output file while the stage runs."""
        return self._out / path


def _read_journal(path: Path) -> FinishedUnit:
    entry = json.loads(path.read_bytes())
    return FinishedUnit(
        name=path.stem,
        files=tuple(FileEntry(**item) for item in entry["files"]),
        rows=tuple(entry["rows"]) if entry["rows"] else None,
        dropped=entry["dropped"],
        notes=entry["notes"],
    )
