"""Where rows went: which outputs hold them, which checkpoints drew them and when, and what was made from those.

All outputs under a root are asked, those of other configurations too. Up to the data set a row is looked for by its
sample key in each output's own tables; a checkpoint's ledger says what it drew; what comes after holds no rows, and
counts if it was made from an output that counts. What can't be asked is named, with all that rests on it.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.graph.nodes import GRAPH
from pipelines.core.errors import ThroughlineError, first_line
from pipelines.core.manifest import DROPPED_NAME, InputRef
from pipelines.dataset.dataset import SAMPLES_FILE
from pipelines.download.status import FetchStatus
from pipelines.laion.block_lists import DomainSet, OptOuts, hash_set, hosts_of
from pipelines.runner.outputs import StageOutput, sound_outputs
from pipelines.shards.format import index_path, read_index

if TYPE_CHECKING:
    import pyarrow as pa

SUBSET, DATASET, CHECKPOINT, CALIBRATION = "laion_subset", "dataset", "checkpoint", "judge_calibration"
_ROWLESS = ("laion_index", "prompt_sets")
"""What is made from these alone has no rows; of the index, single entries are read."""
_MOST_NOTED = 10_000
"""Rows of an output of which more is kept than their keys."""
_UNREADABLE = (ThroughlineError, OSError, ValueError, KeyError)

Place = tuple[str, str]
"""Stage and data version."""
Found = tuple[str, str, Mapping[str, Any]]
"""Sample key, the file that holds the row, what else the output says of it."""


@dataclass(frozen=True)
class Outputs:
    """All outputs under a root: sound ones by stage, in the order of the graph, and what is wrong with others."""

    by_stage: Mapping[str, Sequence[StageOutput]]
    broken: Mapping[Place, str]

    @classmethod
    def load(cls, output_root: Path) -> "Outputs":
        """Read all manifests, fetching those that an object store has."""
        by_stage: dict[str, list[StageOutput]] = {}
        broken: dict[Place, str] = {}
        for stage in GRAPH.nodes:

            def note(version: str, problem: str, stage: str = stage) -> None:
                broken[stage, version] = problem

            found = sound_outputs(output_root, stage, note)
            by_stage[stage] = sorted(found, key=lambda output: (output.manifest.partition or "", output.data_version))
        return cls(by_stage, broken)

    def __len__(self) -> int:
        return sum(map(len, self.by_stage.values()))

    def in_use(self, ends: Iterable[InputRef]) -> set[Place]:
        """Return some outputs and all that they were made from."""
        found: set[Place] = set()
        manifests = {_place(output): output.manifest for items in self.by_stage.values() for output in items}
        waiting = deque(ends)
        while waiting:
            ref = waiting.popleft()
            for place in self._places(ref):
                if place not in found and place in manifests:
                    found.add(place)
                    waiting.extend(item for refs in manifests[place].inputs.values() for item in refs)
        return found

    def _places(self, ref: InputRef) -> Iterator[Place]:
        if ref.file is None:
            yield ref.stage, ref.data_version
            return
        for output in self.by_stage.get(ref.stage, ()):
            if any(entry.path == ref.file and entry.sha256 == ref.data_version for entry in output.manifest.files):
                yield _place(output)


@dataclass(frozen=True)
class TracedRow:
    """A row as the subset has it; URL and alt-text are empty where no subset holds it any more."""

    sample_key: str
    url: str = ""
    alt_text: str = ""


@dataclass
class Holder:
    """An output that holds rows that are looked for, or was made from one that does."""

    output: StageOutput
    is_current: bool | None
    """Whether a result of the profile rests on it; None where that is not known."""
    keys: set[str] = field(default_factory=set)
    """Of the rows it holds; empty for what was made from a holder."""
    files: Counter[str] = field(default_factory=Counter)
    """File -> rows in it."""
    splits: Counter[str] = field(default_factory=Counter)
    """Of a data set: split -> rows."""
    times_drawn: int = 0
    first_step: int | None = None
    """Of a checkpoint: over all rows."""
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sample key -> what the output says of the row, for the first rows: its split; its first step, times drawn."""

    @property
    def stage(self) -> str:
        return self.output.manifest.stage

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.stage, self.output.manifest.partition)))

    def add(self, sample_key: str, file: str, note: Mapping[str, Any]) -> None:
        """Count a row that a file of the output holds."""
        self.keys.add(sample_key)
        self.files[file] += 1
        if "split" in note:
            self.splits[note["split"]] += 1
        if "times_seen" in note:
            self.times_drawn += note["times_seen"]
            step = note["first_step"]
            self.first_step = step if self.first_step is None else min(step, self.first_step)
        if note and len(self.notes) < _MOST_NOTED:
            self.notes[sample_key] = dict(note)


@dataclass(frozen=True)
class Drop:
    """A row that an output dropped, and why."""

    sample_key: str
    holder: Holder
    reason: str
    detail: str


@dataclass
class Trace:
    """What became of rows."""

    rows: dict[str, TracedRow] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Entries that name no row of any output."""
    holders: list[Holder] = field(default_factory=list)
    """In the order of the graph."""
    drops: list[Drop] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    """What could not be asked, with the reason: rows may be there that are not told."""

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


def _identity(holder: Holder) -> dict[str, Any]:
    return {
        "stage": holder.stage,
        "partition": holder.output.manifest.partition,
        "data_version": holder.output.data_version,
        "current": holder.is_current,
    }


def _place(output: StageOutput) -> Place:
    return output.manifest.stage, output.data_version


class _Search:
    """What is looked for, and what was found so far."""

    def __init__(self, named: "_NamedRows", outputs: Outputs) -> None:
        self.named = named
        self.keys = {key: key for key in named.rows}
        """Each key once, however many outputs hold it."""
        self._wanted = hash_set(named.rows)
        self.touched: dict[Place, Holder] = {}
        self.unasked = set(outputs.broken)
        """Outputs of which it is not known whether they hold rows."""
        self._known = {_place(output) for items in outputs.by_stage.values() for output in items}

    def rows(self, output: StageOutput, names: Sequence[str], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the wanted rows of tables of an output, with the name of the file."""
        for batch in _batches(output, names, ["sample_key", *columns]):
            yield from _masked(batch, self._wanted.contains(batch["sample_key"]))

    def inputs(self, output: StageOutput) -> list[Place]:
        """Return what an output was made from, as far as that may have rows."""
        refs = (ref for refs in output.manifest.inputs.values() for ref in refs)
        return [(ref.stage, ref.data_version) for ref in refs if ref.file is None and ref.stage not in _ROWLESS]

    def lost(self, output: StageOutput) -> list[Place]:
        """Return the inputs of an output that can't be asked, or are gone."""
        return [place for place in self.inputs(output) if place in self.unasked or place not in self._known]

    def may_hold(self, output: StageOutput) -> bool:
        """Return whether an output may hold rows, judged by what it was made from."""
        return bool(self.lost(output)) or any(place in self.touched for place in self.inputs(output))


def trace(
    outputs: Outputs,
    entries: Sequence[str],
    current: Collection[Place] | None = None,
    on_output: Callable[[], object] = lambda: None,
) -> Trace:
    """Return where the rows went that `entries` name: sample keys, URLs as they stand in the subset, domains.

    `current` are the outputs that results of a profile rest on (`Outputs.in_use`), None where that is not known.
    `on_output` is called for each output when it was asked.
    """
    named = _NamedRows(OptOuts.of(entries), outputs.by_stage[SUBSET])
    found = Trace(rows=named.rows, unreadable=list(outputs.broken.values()))
    search = _Search(named, outputs)
    for items in outputs.by_stage.values():
        for output in items:
            holder = Holder(output, None if current is None else _place(output) in current)
            problems = _ask(holder, search, found)
            if problems:
                search.unasked.add(_place(output))
                found.unreadable += [f"{holder.label} {output.data_version[:12]}: {problem}" for problem in problems]
            on_output()
    found.holders = list(search.touched.values())
    held = {key for holder in found.holders for key in holder.keys} | {drop.sample_key for drop in found.drops}
    nowhere = {key for key, row in found.rows.items() if not row.url and key not in held}
    for key in nowhere:
        del found.rows[key]
    found.unknown = [item for item in entries if item not in named.seen and item.lower() not in found.rows]
    return found


def _ask(holder: Holder, search: _Search, found: Trace) -> list[str]:
    """Ask one output for the wanted rows; return what stood in the way."""
    output, problems, counts = holder.output, [], False
    reader = _READERS.get(holder.stage)
    if reader is None:
        counts = any(place in search.touched for place in search.inputs(output))
    else:
        try:
            for key, file, note in reader(output, search):
                holder.add(search.keys[key], file, note)
        except _UNREADABLE as error:
            problems.append(first_line(error))
    if (reader is None or reader is _in_features) and not counts and (lost := search.lost(output)):
        stage, version = lost[0]
        problems.append(f"made from {stage} {version[:12]}, which is gone or could not be asked")
    if holder.keys or counts:
        search.touched[_place(output)] = holder
    try:
        found.drops += _drops(holder, search)
    except _UNREADABLE as error:
        problems.append(first_line(error))
    return problems


class _NamedRows:
    """The rows that entries name, found in the subsets: a subset is read once, for URLs, domains and keys alike."""

    def __init__(self, named: OptOuts, subsets: Iterable[StageOutput]) -> None:
        self.rows = {key: TracedRow(key) for key in named.keys}
        self.seen: set[str] = set()
        """URLs and domains that name some."""
        self.held: dict[str, list[Found]] = {}
        """Data version of a subset -> what it holds."""
        self.problems: dict[str, Exception] = {}
        self._keys, self._urls = hash_set(named.keys), hash_set(named.urls)
        self._domains = DomainSet(named.domains) if named.domains else None
        for output in subsets:
            self.held[output.data_version] = []
            try:
                self._look(output)
            except _UNREADABLE as error:
                self.problems[output.data_version] = error

    def _look(self, output: StageOutput) -> None:
        for batch in _batches(output, _table_names(output, "rows"), ["sample_key", "url", "alt_text"]):
            mask = self._keys.contains(batch["sample_key"]) | self._urls.contains(batch["url"])
            if self._domains is not None:
                hosts = hosts_of(batch["url"])
                mask |= self._domains.contains_hosts(hosts)
                self.seen.update(
                    entry for host in hosts.dictionary.to_pylist() for entry in self._domains.entries_with(host)
                )
            for row in _masked(batch, mask):
                self.rows[row["sample_key"]] = TracedRow(row["sample_key"], row["url"], row["alt_text"])
                self.seen.add(row["url"])
                self.held[output.data_version].append((row["sample_key"], row["file"], {}))


def _table_names(output: StageOutput, prefix: str) -> list[str]:
    names = (entry.path for entry in output.manifest.files)
    return [name for name in names if Path(name).name.startswith(prefix) and name.endswith(".parquet")]


def _batches(output: StageOutput, names: Sequence[str], columns: Sequence[str]) -> "Iterator[pa.RecordBatch]":
    """Yield the rows of some tables of an output with one more column, the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in names:
        with pq.ParquetFile(output.path(name)) as rows:
            for batch in rows.iter_batches(columns=list(columns)):
                yield batch.append_column("file", pa.repeat(name, batch.num_rows))


def _masked(batch: "pa.RecordBatch", mask: Any) -> list[dict[str, Any]]:
    import pyarrow as pa

    return batch.filter(pa.array(mask)).to_pylist() if mask.any() else []


def _drops(holder: Holder, search: _Search) -> Iterator[Drop]:
    if holder.stage == SUBSET:  # it drops most of what it reads, and nothing that it dropped went anywhere
        return
    for row in search.rows(holder.output, _table_names(holder.output, Path(DROPPED_NAME).stem), ["reason", "detail"]):
        yield Drop(search.keys[row["sample_key"]], holder, row["reason"], row["detail"])


_Reader = Callable[[StageOutput, _Search], Iterator[Found]]


def _in_tables(prefix: str, *columns: str) -> _Reader:
    """Return a reader of tables whose names begin with `prefix`; `columns` are told of each row."""

    def read(output: StageOutput, search: _Search) -> Iterator[Found]:
        for row in search.rows(output, _table_names(output, prefix), columns):
            yield row["sample_key"], row["file"], {name: row[name] for name in columns}

    return read


def _in_subset(output: StageOutput, search: _Search) -> Iterator[Found]:
    yield from search.named.held[output.data_version]
    if output.data_version in search.named.problems:
        raise search.named.problems[output.data_version]


def _in_images(output: StageOutput, search: _Search) -> Iterator[Found]:
    """Pictures are large, and each has a row among the statuses."""
    for row in search.rows(output, _table_names(output, "status-"), ["status"]):
        if row["status"] == FetchStatus.OK:
            yield row["sample_key"], row["file"].replace("status-", "images-"), {}


def _in_shards(output: StageOutput, search: _Search) -> Iterator[Found]:
    if not search.may_hold(output):
        return
    for entry in output.manifest.files:
        if entry.path.endswith(".tar"):
            index = read_index(output.path(index_path(Path(entry.path)).name, alone=True))
            yield from ((key, entry.path, {}) for key in index.keys if key in search.keys)


def _in_features(output: StageOutput, search: _Search) -> Iterator[Found]:
    """Feature files are large and have their shard's keys, so their shards are asked."""
    for place in search.inputs(output):
        shards = search.touched.get(place)
        for key, file, _ in _in_shards(shards.output, search) if shards is not None else ():
            yield key, f"{output.manifest.stage}-{Path(file).stem.removeprefix('shard-')}.safetensors", {}


def _in_calibration(output: StageOutput, search: _Search) -> Iterator[Found]:
    """A row stands there by its picture, or by its caption beside another's picture; unread answers are drops."""
    import pyarrow.parquet as pq

    for name in _table_names(output, "calibration"):
        for row in pq.read_table(output.path(name), columns=["sample_key", "statement_key"]).to_pylist():
            yield from ((key, name, {}) for key in {*row.values()} if key in search.keys)
    for name in _table_names(output, Path(DROPPED_NAME).stem):
        for text in pq.read_table(output.path(name), columns=["sample_key"])["sample_key"].to_pylist():
            key = text.partition("|")[0]
            if key in search.keys:
                yield key, name, {}


_READERS: Mapping[str, _Reader] = {
    SUBSET: _in_subset,
    "laion_selection": _in_tables("rows"),
    "images": _in_images,
    "captions": _in_tables("captions-"),
    "shards": _in_shards,
    "latents": _in_features,
    "text_features": _in_features,
    DATASET: _in_tables(Path(SAMPLES_FILE).stem, "split", "part", "shard"),
    CHECKPOINT: _in_tables("ledger", "first_step", "times_seen"),
    CALIBRATION: _in_calibration,
}
