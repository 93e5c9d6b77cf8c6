"""Traces rows: which outputs hold them, which checkpoints consumed them and when, and what was made from those.

Searches all outputs under a root, including those of other configurations, in the order of the graph. Each stage states
how its rows are found (`pipelines.runner.rows`). Reports every output that cannot be searched, with all that depends on
it.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.graph.graph import Graph
from orchestration.graph.nodes import GRAPH
from orchestration.lineage.row_search import UNREADABLE, KeySearch, OutputId, ResolvedRows, TracedRow, id_of
from pipelines.core.errors import first_line
from pipelines.core.manifest import DROPPED_NAME, InputRef
from pipelines.laion.block_lists import OptOuts
from pipelines.runner.outputs import StageOutput, sound_outputs
from pipelines.runner.rows import DERIVED, NO_ROWS, FoundRow, Rowless, RowLookup, RowReader, SourceTable

_MAX_NOTES = 10_000
"""Rows of an output whose notes are recorded; of further rows only the keys are."""


@dataclass(frozen=True)
class Outputs:
    """All outputs under a root: sound ones by stage, in the order of the graph, and the problems of others."""

    by_stage: Mapping[str, Sequence[StageOutput]]
    broken: Mapping[OutputId, str]
    rows: Mapping[str, RowLookup]
    """Stage -> how its rows are found."""

    @classmethod
    def load(cls, output_root: Path, graph: Graph = GRAPH) -> "Outputs":
        """Read all manifests, downloading those in an object store."""
        by_stage: dict[str, list[StageOutput]] = {}
        broken: dict[OutputId, str] = {}
        for stage in graph.nodes:

            def record(version: str, problem: str, stage: str = stage) -> None:
                broken[stage, version] = problem

            found = sound_outputs(output_root, stage, record)
            by_stage[stage] = sorted(found, key=lambda output: (output.manifest.partition or "", output.data_version))
        return cls(by_stage, broken, {name: node.stage.rows for name, node in graph.nodes.items()})

    def __len__(self) -> int:
        return sum(map(len, self.by_stage.values()))

    def __iter__(self) -> Iterator[StageOutput]:
        for items in self.by_stage.values():
            yield from items

    def sources(self) -> Iterator[tuple[StageOutput, str]]:
        """Yield the outputs in which rows are given their keys, with the prefix of their tables."""
        for output in self:
            rows = self.rows[output.manifest.stage]
            if isinstance(rows, SourceTable):
                yield output, rows.prefix

    def in_use(self, ends: Iterable[InputRef]) -> set[OutputId]:
        """Return some outputs and all that they were made from."""
        found: set[OutputId] = set()
        manifests = {id_of(output): output.manifest for output in self}
        pending = deque(ends)
        while pending:
            ref = pending.popleft()
            for output_id in self._ids_of(ref):
                if output_id not in found and output_id in manifests:
                    found.add(output_id)
                    pending.extend(item for refs in manifests[output_id].inputs.values() for item in refs)
        return found

    def _ids_of(self, ref: InputRef) -> Iterator[OutputId]:
        if ref.file is None:
            yield ref.stage, ref.data_version
            return
        for output in self.by_stage.get(ref.stage, ()):
            if any(entry.path == ref.file and entry.sha256 == ref.data_version for entry in output.manifest.files):
                yield id_of(output)


@dataclass
class TracedOutput:
    """An output that holds wanted rows, or was made from one that does."""

    output: StageOutput
    is_current: bool | None
    """Whether a result of the profile depends on it; None if unknown."""
    keys: set[str] = field(default_factory=set)
    """Keys of the rows it holds; empty if it was only made from an output that holds some."""
    files: Counter[str] = field(default_factory=Counter)
    """File -> rows in it."""
    splits: Counter[str] = field(default_factory=Counter)
    """For a data set: split -> rows."""
    times_drawn: int = 0
    first_step: int | None = None
    """For a checkpoint, like `times_drawn`: over all rows."""
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sample key -> notes of the row, for the first rows."""

    @property
    def stage(self) -> str:
        return self.output.manifest.stage

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.stage, self.output.manifest.partition)))

    def add(self, sample_key: str, file: str, notes: Mapping[str, Any]) -> None:
        """Count a row that a file of the output holds."""
        self.keys.add(sample_key)
        self.files[file] += 1
        if "split" in notes:
            self.splits[notes["split"]] += 1
        if "times_seen" in notes:
            self.times_drawn += notes["times_seen"]
            step = notes["first_step"]
            self.first_step = step if self.first_step is None else min(step, self.first_step)
        if notes and len(self.notes) < _MAX_NOTES:
            self.notes[sample_key] = dict(notes)


@dataclass(frozen=True)
class Drop:
    """A row that an output dropped, and why."""

    sample_key: str
    holder: TracedOutput
    reason: str
    detail: str


@dataclass
class Trace:
    """The result of a trace."""

    rows: dict[str, TracedRow] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Entries that match no row of any output."""
    holders: list[TracedOutput] = field(default_factory=list)
    """In the order of the graph."""
    drops: list[Drop] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """Outputs that could not be searched, with the reason: they may hold rows that are not reported."""

    def as_json(self) -> dict[str, Any]:
        """Return the trace as a JSON value."""
        return {
            "rows": [vars(row) for row in self.rows.values()],
            "unknown": self.unknown,
            "outputs": [
                {
                    **_identity(holder),
                    "folder": str(holder.output.folder),
                    "sample_keys": sorted(holder.keys),
                    "files": dict(holder.files),
                    "splits": dict(holder.splits),
                    "times_drawn": holder.times_drawn,
                    "first_step": holder.first_step,
                    "notes": holder.notes,
                }
                for holder in self.holders
            ],
            "dropped": [
                {
                    **_identity(drop.holder),
                    "sample_key": drop.sample_key,
                    "reason": drop.reason,
                    "detail": drop.detail,
                }
                for drop in self.drops
            ],
            "unreadable": self.unreadable,
        }


def _identity(holder: TracedOutput) -> dict[str, Any]:
    return {
        "stage": holder.stage,
        "partition": holder.output.manifest.partition,
        "data_version": holder.output.data_version,
        "current": holder.is_current,
    }


def trace(
    outputs: Outputs,
    entries: Sequence[str],
    current: Collection[OutputId] | None = None,
    on_output: Callable[[], object] = lambda: None,
) -> Trace:
    """Return where the rows of `entries` went: sample keys, URLs exactly as in the subset, or domains.

    `current` are the outputs that results of a profile depend on (`Outputs.in_use`), None if unknown. `on_output` is
    called after each output.
    """
    resolved = ResolvedRows(OptOuts.of(entries), outputs.sources())
    found = Trace(rows=resolved.rows, unreadable=list(outputs.broken.values()))
    rowless = (stage for stage, rows in outputs.rows.items() if rows is NO_ROWS)
    search = KeySearch(resolved.rows, outputs, outputs.broken, rowless)
    for output in outputs:
        holder = TracedOutput(output, None if current is None else id_of(output) in current)
        rows = outputs.rows[holder.stage]
        problems = _search_output(holder, rows, search, resolved)
        is_affected = bool(holder.keys) or (rows is DERIVED and next(search.holding_inputs(output), None) is not None)
        if is_affected:
            search.holding[id_of(output)] = output
            found.holders.append(holder)
        if not isinstance(rows, SourceTable):
            try:
                found.drops += _drops(holder, search)
            except UNREADABLE as error:
                problems.append(first_line(error))
        if problems:
            search.unsearchable.add(id_of(output))
            found.unreadable += [f"{holder.label} {output.data_version[:12]}: {problem}" for problem in problems]
        on_output()
    held = {key for holder in found.holders for key in holder.keys} | {drop.sample_key for drop in found.drops}
    for key in {key for key, row in found.rows.items() if not row.url and key not in held}:
        del found.rows[key]
    found.unknown = [item for item in entries if item not in resolved.matched and item.lower() not in found.rows]
    return found


def _search_output(holder: TracedOutput, rows: RowLookup, search: KeySearch, resolved: ResolvedRows) -> list[str]:
    """Add the wanted rows of one output to `holder`; return the problems that prevented a complete search."""
    output, problems = holder.output, []
    try:
        for key, file, notes in _found_rows(output, rows, search, resolved):
            holder.add(search.keys[key], file, notes)
    except UNREADABLE as error:
        problems.append(first_line(error))
    depends_on_inputs = rows is DERIVED and next(search.holding_inputs(output), None) is None
    depends_on_inputs |= isinstance(rows, RowReader) and rows.reads_inputs
    if depends_on_inputs and (lost := search.lost_inputs(output)):
        stage, version = lost[0]
        problems.append(f"made from {stage} {version[:12]}, which is gone or could not be searched")
    return problems


def _found_rows(output: StageOutput, rows: RowLookup, search: KeySearch, resolved: ResolvedRows) -> Iterable[FoundRow]:
    if isinstance(rows, SourceTable):
        return resolved.find(output)
    return () if isinstance(rows, Rowless) else rows.find(output, search)


def _drops(holder: TracedOutput, search: KeySearch) -> Iterator[Drop]:
    for row in search.rows(holder.output, Path(DROPPED_NAME).stem, ["reason", "detail"]):
        yield Drop(search.keys[row["sample_key"]], holder, row["reason"], row["detail"])
