"""Where rows went: which outputs hold them, which checkpoints drew them and when, and what was made from those.

All outputs under a root are asked, those of earlier configurations too. Up to the data set a row is looked for by its
sample key in each output's own tables; a checkpoint's ledger says what it drew; what comes after holds no rows, and
counts if it was made from an output that counts.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.nodes import GRAPH
from pipelines.dataset import SAMPLES_FILE
from pipelines.entry_lists import DomainSet, OptOuts
from pipelines.errors import ThroughlineError
from pipelines.fetch_status import FetchStatus
from pipelines.manifest import DROPPED_NAME, MANIFEST_NAME, InputRef
from pipelines.shard_format import index_path, read_index
from pipelines.stage import StageOutput
from pipelines.storage import know_outputs

if TYPE_CHECKING:
    import pyarrow as pa

SUBSET, DATASET, CHECKPOINT, CALIBRATION = "laion_subset", "dataset", "checkpoint", "judge_calibration"


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
    is_current: bool
    """Whether the profile's graph uses it; other outputs are of other configurations or of earlier rows."""
    keys: set[str] = field(default_factory=set)
    """Of the rows it holds; empty for what was made from a holder."""
    files: Counter[str] = field(default_factory=Counter)
    """File -> rows in it."""
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Sample key -> what the output says of the row: its split; its first step and how often it was drawn."""

    @property
    def stage(self) -> str:
        return self.output.manifest.stage

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.stage, self.output.manifest.partition)))


@dataclass
class Trace:
    """What became of rows."""

    rows: dict[str, TracedRow] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Entries that name no row of any output."""
    holders: list[Holder] = field(default_factory=list)
    """In the order of the graph."""
    ends: dict[str, dict[str, tuple[str, str]]] = field(default_factory=dict)
    """Sample key -> where an output dropped it -> (reason, detail)."""
    unreadable: list[str] = field(default_factory=list)
    """Outputs that could not be asked, with the reason."""

    def as_json(self) -> dict[str, Any]:
        """Return the trace as a JSON value."""
        return {
            "rows": [vars(row) for row in self.rows.values()],
            "unknown": self.unknown,
            "outputs": [
                {
                    "stage": holder.stage,
                    "partition": holder.output.manifest.partition,
                    "data_version": holder.output.data_version,
                    "current": holder.is_current,
                    "folder": str(holder.output.folder),
                    "sample_keys": sorted(holder.keys),
                    "files": dict(holder.files),
                    "notes": holder.notes,
                }
                for holder in self.holders
            ],
            "dropped": [
                {"sample_key": key, "by": label, "reason": reason, "detail": detail}
                for key, places in self.ends.items()
                for label, (reason, detail) in places.items()
            ],
            "unreadable": self.unreadable,
        }


Found = tuple[str, str, Mapping[str, Any]]
"""Sample key, the file that holds the row, what else the output says of it."""


def trace(
    output_root: Path,
    entries: Sequence[str],
    current: Collection[InputRef] = (),
    on_output: Callable[[], object] = lambda: None,
) -> Trace:
    """Return where the rows went that `entries` name: sample keys, URLs as they stand in the subset, domains.

    `current` are the outputs that a profile's graph uses now. `on_output` is called for each output that was looked at;
    `count_outputs` counts them.
    """
    found = Trace()
    outputs = {stage: sorted(_sound_outputs(output_root, stage, found), key=_place) for stage in GRAPH.nodes}
    _find_rows(OptOuts.of(entries), outputs.get(SUBSET, []), found)
    wanted = _array(found.rows)
    touched: dict[tuple[str, str], Holder] = {}
    for stage, items in outputs.items():
        for output in items:
            on_output()
            holder = Holder(output, output.ref in current)
            try:
                if stage in _READERS:
                    for key, file, note in _READERS[stage](output, wanted, touched):
                        holder.keys.add(key)
                        holder.files[file] += 1
                        if note:
                            holder.notes[key] = dict(note)
                    _find_drops(holder, wanted, found)
                    counts = bool(holder.keys)
                else:
                    counts = any(
                        (ref.stage, ref.data_version) in touched
                        for refs in output.manifest.inputs.values()
                        for ref in refs
                    )
            except (ThroughlineError, OSError, ValueError, KeyError) as error:
                found.unreadable.append(f"{holder.label} {output.data_version[:12]}: {error}")
                continue
            if counts:
                touched[stage, output.data_version] = holder
    found.holders = list(touched.values())
    held = {key for holder in found.holders for key in holder.keys} | found.ends.keys()
    nowhere = {key for key, row in found.rows.items() if not row.url and key not in held}
    for key in nowhere:
        del found.rows[key]
    found.unknown = [entry for entry in entries if entry in found.unknown or entry.lower() in nowhere]
    return found


def count_outputs(output_root: Path) -> int:
    """Return how many outputs a trace will look at."""
    for stage in GRAPH.nodes:
        know_outputs(output_root, stage)
    return sum(1 for stage in GRAPH.nodes for _ in (output_root / stage).glob(f"*/{MANIFEST_NAME}"))


def _sound_outputs(output_root: Path, stage: str, found: Trace) -> Iterator[StageOutput]:
    know_outputs(output_root, stage)
    for path in sorted((output_root / stage).glob(f"*/{MANIFEST_NAME}")):
        try:
            yield StageOutput.load(path)
        except ThroughlineError as error:
            found.unreadable.append(str(error))


def _place(output: StageOutput) -> tuple[str, str]:
    return output.manifest.partition or "", output.data_version


def _array(keys: Iterable[str]) -> "pa.Array":
    import pyarrow as pa

    return pa.array(sorted(keys), pa.string())


def _find_rows(named: OptOuts, subsets: Iterable[StageOutput], found: Trace) -> None:
    """Fill in the rows that entries name, and the entries that name none; keys are judged when all was looked at."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found.rows.update((key, TracedRow(key)) for key in dict.fromkeys(named.keys))
    keys, urls = pa.array(named.keys, pa.string()), pa.array(named.urls, pa.string())
    domains = {domain: DomainSet((domain,)) for domain in named.domains}
    seen: set[str] = set()
    for output in subsets:
        try:
            for batch in _batches(output, _table_names(output, "rows"), ["sample_key", "url", "alt_text"]):
                mask = pc.or_(pc.is_in(batch["sample_key"], keys), pc.is_in(batch["url"], urls))
                for domain, hosts in domains.items():
                    inside = pa.array(hosts.contains(batch["url"]))
                    if pc.any(inside).as_py():
                        seen.add(domain)
                    mask = pc.or_(mask, inside)
                for row in batch.filter(mask).to_pylist():
                    found.rows[row["sample_key"]] = TracedRow(**{name: row[name] for name in row if name != "file"})
                    seen.add(row["url"])
        except (ThroughlineError, OSError, ValueError, KeyError):
            continue  # said when the output is looked at
    found.unknown += [entry for entry in (*named.urls, *named.domains) if entry not in seen]


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


def _wanted_rows(
    output: StageOutput, names: Sequence[str], columns: Sequence[str], wanted: "pa.Array"
) -> Iterator[dict[str, Any]]:
    import pyarrow.compute as pc

    for batch in _batches(output, names, ["sample_key", *columns]):
        yield from batch.filter(pc.is_in(batch["sample_key"], wanted)).to_pylist()


def _find_drops(holder: Holder, wanted: "pa.Array", found: Trace) -> None:
    if holder.stage == SUBSET:  # it drops most of what it reads, and nothing that it dropped went anywhere
        return
    names = _table_names(holder.output, DROPPED_NAME.removesuffix(".parquet"))
    for row in _wanted_rows(holder.output, names, ["reason", "detail"], wanted):
        found.ends.setdefault(row["sample_key"], {})[holder.label] = (row["reason"], row["detail"])


Touched = Mapping[tuple[str, str], Holder]


def _in_tables(prefix: str, *columns: str) -> Callable[[StageOutput, "pa.Array", Touched], Iterator[Found]]:
    """Return a reader of tables whose names begin with `prefix`; `columns` are told of each row."""

    def read(output: StageOutput, wanted: "pa.Array", _: Touched) -> Iterator[Found]:
        for row in _wanted_rows(output, _table_names(output, prefix), columns, wanted):
            yield row["sample_key"], row["file"], {name: row[name] for name in columns}

    return read


def _in_images(output: StageOutput, wanted: "pa.Array", _: Touched) -> Iterator[Found]:
    """Pictures are large, and each has a row among the statuses."""
    for row in _wanted_rows(output, _table_names(output, "status-"), ["status"], wanted):
        if row["status"] == FetchStatus.OK:
            yield row["sample_key"], row["file"].replace("status-", "images-"), {}


def _in_shards(output: StageOutput, wanted: "pa.Array", _: Touched) -> Iterator[Found]:
    keys = set(wanted.to_pylist())
    for entry in output.manifest.files:
        if entry.path.endswith(".tar"):
            index = read_index(output.path(index_path(Path(entry.path)).name))
            yield from ((key, entry.path, {}) for key in index.keys if key in keys)


def _in_features(output: StageOutput, _: "pa.Array", touched: Touched) -> Iterator[Found]:
    """Feature files are large and have their shard's keys, so their shards are asked."""
    for ref in output.manifest.inputs.get("shards", ()):
        shards = touched.get((ref.stage, ref.data_version))
        if shards is None:
            continue
        for key, file, _note in _in_shards(shards.output, _array(shards.keys), touched):
            yield key, f"{output.manifest.stage}-{Path(file).stem.removeprefix('shard-')}.safetensors", {}


_READERS: Mapping[str, Callable[[StageOutput, "pa.Array", Touched], Iterator[Found]]] = {
    SUBSET: _in_tables("rows"),
    "laion_selection": _in_tables("rows"),
    "images": _in_images,
    "captions": _in_tables("captions-"),
    "shards": _in_shards,
    "latents": _in_features,
    "text_features": _in_features,
    DATASET: _in_tables(SAMPLES_FILE.removesuffix(".parquet"), "split", "part", "shard"),
    CHECKPOINT: _in_tables("ledger", "first_step", "times_seen"),
    CALIBRATION: _in_tables("calibration"),
}
