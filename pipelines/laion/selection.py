"""Stage ``laion_selection``: deduplicates across parts and, with a limit, draws a sample of the rows of all parts.

`laion_subset` filters each part by itself; decisions that depend on all parts are made here. Of rows with the same URL
the one with the smallest sample key is kept, of rows with the same sample key the first by part and row, so the kept
keys don't depend on the order of the rows or on how they are spread over files.

Rows are partitioned into buckets by 128-bit hash, and one bucket at a time is deduplicated in memory.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cluster.units import RayTasks, fresh_folder, ray_tasks, run_units
from pipelines.core.errors import ThroughlineError
from pipelines.core.progress import Progress
from pipelines.laion.config import LaionSelectionConfig
from pipelines.laion.subset import ROWS_FILE
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import RowTable
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun, Unit

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

REASONS = ("duplicate_pair", "duplicate_url", "not_sampled")
PART_ROWS_FILE = "rows-{partition}.parquet"
"""Name of a part's rows in the output; the stage `images` reads this file alone."""
_BATCH_ROWS = 65_536
_HASH_BITS = 64
# A row in a bucket: hash of its URL or pair, sample key, index of its part, row in the part's file.
_ENTRY = [("hash", "u8", 2), ("key", "u8", 2), ("part", "u4"), ("row", "u4")]
_DUPLICATE = [("row", "u4"), ("reason", "u1")]
_UNIQUE_KEYS = "unique-keys"
_READ_BYTES = 1 << 28
# The sample's last row is found from a histogram of the ranks' high 16 bits, and then among the rows of one bin.
_LOW_BITS = 48
_TASKS_PER_PLACE = 4


def rows_name(part: str) -> str:
    """Return the name of the file that holds a part's rows in this stage's output."""
    return PART_ROWS_FILE.format(partition=part)


@dataclass(frozen=True)
class _SelectionWork:
    """What every task needs, on any node."""

    config: LaionSelectionConfig
    bits: int
    """Number of leading bits of a hash that select its bucket."""
    num_parts: int
    folder: Path
    """Scratch folder; tasks on other nodes create their own folders in it."""
    partitions: tuple[Path, ...] = ()
    """Folders that together hold the entries of all parts, one file per bucket."""


@dataclass(frozen=True)
class _Resolution:
    """The decisions about all rows, before any part is written."""

    duplicates: tuple[Path, ...]
    """Folders that together hold all duplicates, one file per part."""
    threshold: "np.ndarray | None"
    """(rank, key words) of the last row in the sample; None if all rows are in it."""


def produce(run: StageRun[LaionSelectionConfig]) -> StageResult:
    subsets = _in_order(run)
    if not subsets:
        raise ThroughlineError("laion_selection: no subsets among its inputs; run laion_subset for at least one part")
    parts = [item.manifest.partition or "" for item in subsets]
    counts = [item.manifest.file(ROWS_FILE).num_rows or 0 for item in subsets]
    if not all(run.is_finished(part) for part in parts):
        shutil.rmtree(run.scratch, ignore_errors=True)
        run.scratch.mkdir(parents=True)
        bits = max((-(-sum(counts) // run.config.bucket_rows) - 1).bit_length(), 0)
        work = _SelectionWork(run.config, bits, len(parts), run.scratch.absolute())
        with ray_tasks(run, run.config.workers) as tasks, run.progress(2 * sum(counts), "rows") as progress:
            if tasks is None:
                resolution = _resolve_local(work, subsets, progress)
            else:
                resolution = _resolve_on_cluster(work, subsets, tasks, progress)
            pieces = ((part, (number, resolution)) for number, part in enumerate(parts))
            progress.advance(sum(counts[parts.index(unit.name)] for unit in run.finished_units()))
            for unit in run_units(run, tasks, pieces, _write_part):
                progress.advance(counts[parts.index(unit.name)])
    units = run.finished_units()
    dropped = {reason: sum(unit.dropped.get(reason, 0) for unit in units) for reason in REASONS}
    return StageResult(
        summary={
            "num_parts": len(parts),
            "num_rows": sum(counts),
            "num_kept": sum(unit.rows[1] for unit in units if unit.rows),
            "dropped": {reason: count for reason, count in dropped.items() if count},
        }
    )


def _in_order(run: StageRun[LaionSelectionConfig]) -> list[StageOutput]:
    """Return the subsets sorted by part; tasks refer to a part by its index in this order."""
    return sorted(run.inputs.get("subset", ()), key=lambda item: item.manifest.partition or "")


def _resolve_local(work: _SelectionWork, subsets: list[StageOutput], progress: Progress) -> _Resolution:
    """Find the duplicates and the threshold in this process."""
    for number, subset in enumerate(subsets):
        _partition(work, number, subset.path(ROWS_FILE), work.folder)
        progress.advance(subset.manifest.file(ROWS_FILE).num_rows or 0)
    work = replace(work, partitions=(work.folder,))
    histogram = None
    for bucket in range(1 << work.bits):
        histogram = _sum(histogram, _dedup_buckets(work, range(bucket, bucket + 1), work.folder))
        _bucket_path(work.folder, bucket).unlink(missing_ok=True)
    bin_number, position = _locate_limit(work.config.limit, histogram)
    if bin_number is None:
        return _Resolution((work.folder,), None)
    return _Resolution((work.folder,), _threshold([_candidates(work.folder, bin_number, work.config)], position))


def _resolve_on_cluster(
    work: _SelectionWork, subsets: list[StageOutput], tasks: RayTasks, progress: Progress
) -> _Resolution:
    """Find them on a cluster: all parts are partitioned in parallel, then all buckets are deduplicated in parallel."""
    paths = [subset.path(ROWS_FILE).absolute() for subset in subsets]
    names = [f"part {subset.manifest.partition}" for subset in subsets]
    partitions = []
    for name, folder in tasks.map(_partition_task, work, zip(names, enumerate(paths), strict=True)):
        partitions.append(folder)
        progress.advance(subsets[names.index(name)].manifest.file(ROWS_FILE).num_rows or 0)
    work = replace(work, partitions=tuple(partitions))
    num_buckets = 1 << work.bits
    step = -(-num_buckets // (_TASKS_PER_PLACE * max(1, tasks.num_places)))
    ranges = [range(start, min(start + step, num_buckets)) for start in range(0, num_buckets, step)]
    histogram = None
    duplicates = []
    for _, (folder, counts) in tasks.map(_dedup_task, work, ((f"bucket {item[0]}", item) for item in ranges)):
        duplicates.append(folder)
        histogram = _sum(histogram, counts)
    for folder in partitions:
        shutil.rmtree(folder, ignore_errors=True)
    bin_number, position = _locate_limit(work.config.limit, histogram)
    if bin_number is None:
        return _Resolution(tuple(duplicates), None)
    chosen = tasks.map(_candidates_task, (bin_number, work.config), ((folder.name, folder) for folder in duplicates))
    return _Resolution(tuple(duplicates), _threshold([candidates for _, candidates in chosen], position))


def _sum(one: "np.ndarray | None", other: "np.ndarray | None") -> "np.ndarray | None":
    return other if one is None or other is None else one + other


def _partition_task(work: _SelectionWork, numbered: tuple[int, Path]) -> Path:
    folder = fresh_folder(work.folder, "partitioned")
    _partition(work, *numbered, folder)
    return folder


def _dedup_task(work: _SelectionWork, buckets: range) -> "tuple[Path, np.ndarray | None]":
    folder = fresh_folder(work.folder, "deduplicated")
    return folder, _dedup_buckets(work, buckets, folder)


def _candidates_task(chosen: tuple[int, LaionSelectionConfig], folder: Path) -> "np.ndarray":
    return _candidates(folder, *chosen)


def _partition(work: _SelectionWork, number: int, path: Path, folder: Path) -> None:
    """Append the entries of one part to the bucket files in `folder`."""
    import numpy as np
    import pyarrow.parquet as pq

    from pipelines.laion.hashes import key_words, parse_hex_keys, string_hashes

    first = 0
    with pq.ParquetFile(path) as rows:
        for batch in rows.iter_batches(_BATCH_ROWS, columns=["sample_key", "url"], use_threads=False):
            entries = np.empty(batch.num_rows, _ENTRY)
            entries["key"] = key_words(parse_hex_keys(batch["sample_key"]))
            entries["hash"] = string_hashes(batch["url"]) if work.config.drop_duplicate_urls else entries["key"]
            entries["part"] = number
            entries["row"] = np.arange(first, first + batch.num_rows)
            first += batch.num_rows
            buckets = _bucket(entries, work.bits)
            order = np.argsort(buckets, kind="stable")
            ends = np.cumsum(np.bincount(buckets, minlength=1 << work.bits))
            for bucket, piece in enumerate(np.split(entries[order], ends[:-1])):
                if len(piece):
                    _append(_bucket_path(folder, bucket), piece)


def _bucket(entries: "np.ndarray", bits: int) -> "np.ndarray":
    import numpy as np

    if not bits:
        return np.zeros(len(entries), np.int64)
    return (entries["hash"][:, 0] >> np.uint64(_HASH_BITS - bits)).astype(np.int64)


def _bucket_path(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:05d}"


def _duplicates_path(folder: Path, number: int) -> Path:
    return folder / f"duplicates-{number:05d}"


def _append(path: Path, rows: "np.ndarray") -> None:
    with path.open("ab") as stream:
        stream.write(rows.tobytes())


def _dedup_buckets(work: _SelectionWork, buckets: range, folder: Path) -> "np.ndarray | None":
    """Write the duplicates in some buckets to `folder`, one file per part; with a limit also the keys of unique rows.

    With a limit, return a histogram of the high 16 bits of the unique rows' ranks, int64 [65536].
    """
    import numpy as np

    from pipelines.laion.hashes import key_ranks

    histogram = None if work.config.limit is None else np.zeros(1 << 16, np.int64)
    for bucket in buckets:
        paths = [path for source in work.partitions if (path := _bucket_path(source, bucket)).exists()]
        if not paths:
            continue
        entries = np.concatenate([np.fromfile(path, _ENTRY) for path in paths])
        reasons = _find_duplicates(entries)
        _write_duplicates(folder, entries, reasons, work.num_parts)
        if histogram is not None:
            unique = np.ascontiguousarray(entries["key"][reasons < 0])
            ranks = key_ranks(unique, work.config.sample_salt)
            histogram += np.bincount((ranks >> _LOW_BITS).astype(np.int64), minlength=1 << 16)
            _append(folder / _UNIQUE_KEYS, unique)
    return histogram


def _locate_limit(limit: int | None, histogram: "np.ndarray | None") -> tuple[int | None, int]:
    """Return the histogram bin that holds the sample's last row, and the row's position within the bin.

    Returns (None, 0) if all rows are in the sample.
    """
    import numpy as np

    if limit is None or histogram is None or histogram.sum() <= limit:
        return None, 0
    totals = histogram.cumsum()
    bin_number = int(np.searchsorted(totals, limit))
    return bin_number, limit - int(totals[bin_number] - histogram[bin_number]) - 1


def _candidates(folder: Path, bin_number: int, config: LaionSelectionConfig) -> "np.ndarray":
    """Return (rank, key words) of the rows in one histogram bin, uint64 [rows, 3]."""
    import numpy as np

    from pipelines.laion.hashes import key_ranks

    found = [np.empty((0, 3), "u8")]
    path = folder / _UNIQUE_KEYS
    for start in range(0, path.stat().st_size if path.exists() else 0, _READ_BYTES):
        keys = np.fromfile(path, "u8", count=_READ_BYTES // 8, offset=start).reshape(-1, 2)
        ranks = key_ranks(keys, config.sample_salt)
        inside = (ranks >> _LOW_BITS) == bin_number
        found.append(np.column_stack([ranks[inside], keys[inside]]))
    return np.concatenate(found)


def _threshold(found: "list[np.ndarray]", position: int) -> "np.ndarray":
    import numpy as np

    candidates = np.concatenate(found)
    return candidates[np.lexsort(candidates.T[::-1])[position]]


def _find_duplicates(entries: "np.ndarray") -> "np.ndarray":
    """Return per entry -1 if it is kept, or else the index of its reason."""
    import numpy as np

    reasons = np.full(len(entries), -1, np.int8)
    order = np.argsort(entries["hash"][:, 0], kind="stable")
    sorted_hash = entries["hash"][order, 0]
    like_next = np.append(sorted_hash[1:] == sorted_hash[:-1], False)
    rows = order[like_next | np.roll(like_next, 1)]
    if not len(rows):
        return reasons
    some = entries[rows]
    hashes, keys = some["hash"], some["key"]
    by_winner = np.lexsort((some["row"], some["part"], keys[:, 1], keys[:, 0], hashes[:, 1], hashes[:, 0]))
    rows, hashes, keys = rows[by_winner], hashes[by_winner], keys[by_winner]
    begins = np.append(True, (hashes[1:] != hashes[:-1]).any(axis=1))
    winner = np.flatnonzero(begins)[np.cumsum(begins) - 1]
    same_pair = (keys == keys[winner]).all(axis=1)
    reasons[rows] = np.where(begins, -1, np.where(same_pair, 0, 1))
    return reasons


def _write_duplicates(folder: Path, entries: "np.ndarray", reasons: "np.ndarray", num_parts: int) -> None:
    import numpy as np

    dropped = np.flatnonzero(reasons >= 0)
    duplicates = np.empty(len(dropped), _DUPLICATE)
    duplicates["row"], duplicates["reason"] = entries["row"][dropped], reasons[dropped]
    parts = entries["part"][dropped]
    order = np.argsort(parts, kind="stable")
    ends = np.cumsum(np.bincount(parts, minlength=num_parts))
    for number, piece in enumerate(np.split(duplicates[order], ends[:-1])):
        if len(piece):
            _append(_duplicates_path(folder, number), piece)


def _write_part(run: StageRun[LaionSelectionConfig], name: str, numbered: tuple[int, _Resolution]) -> None:
    """Write the kept rows of one part."""
    number, resolution = numbered
    with run.unit(name) as unit:
        paths = [_duplicates_path(folder, number) for folder in resolution.duplicates]
        _write_rows(run, unit, _in_order(run)[number], paths, resolution.threshold)


def _write_rows(
    run: StageRun[LaionSelectionConfig],
    unit: Unit,
    subset: StageOutput,
    duplicates: list[Path],
    threshold: "np.ndarray | None",
) -> None:
    """Write the kept rows of one part; a part that loses none is hard-linked.

    The file's bytes depend only on the rows kept in this part.
    """
    import pyarrow.parquet as pq

    source = subset.path(ROWS_FILE)
    name = rows_name(subset.manifest.partition or "")
    reasons = _reasons(run.config, subset, duplicates, threshold)
    if (reasons < 0).all():
        copy = run.scratch / name
        copy.unlink(missing_ok=True)
        try:
            copy.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, copy)  # another file system
        unit.adopt(copy, name, num_rows=len(reasons))
        unit.account(rows_in=len(reasons), rows_out=len(reasons))
        return
    first = rows_out = 0
    with (
        pq.ParquetFile(source) as rows,
        unit.open(name) as stream,
        pq.ParquetWriter(
            stream,
            rows.schema_arrow,
            compression="zstd",
            use_dictionary=["width", "height", "nsfw", "language", "license"],
        ) as writer,
    ):
        for batch in rows.iter_batches(_BATCH_ROWS, use_threads=False):
            kept = _filter_batch(unit, batch, reasons[first : first + batch.num_rows])
            first += batch.num_rows
            rows_out += kept.num_rows
            if kept.num_rows:
                writer.write_batch(kept, row_group_size=_BATCH_ROWS)
    unit.count_rows(name, rows_out)
    unit.account(rows_in=len(reasons), rows_out=rows_out)


def _reasons(
    config: LaionSelectionConfig, subset: StageOutput, duplicates: list[Path], threshold: "np.ndarray | None"
) -> "np.ndarray":
    """Return per row of a part -1 if it is kept, or else the index of its reason."""
    import numpy as np
    import pyarrow.parquet as pq

    from pipelines.laion.hashes import key_ranks, key_words, parse_hex_keys

    reasons = np.full(subset.manifest.file(ROWS_FILE).num_rows or 0, -1, np.int8)
    for path in duplicates:
        if path.exists():
            dropped = np.fromfile(path, _DUPLICATE)
            reasons[dropped["row"]] = dropped["reason"]
    if threshold is None:
        return reasons
    first = 0
    with pq.ParquetFile(subset.path(ROWS_FILE)) as rows:
        for batch in rows.iter_batches(_BATCH_ROWS, columns=["sample_key"], use_threads=False):
            keys = key_words(parse_hex_keys(batch["sample_key"]))
            ranked = np.column_stack([key_ranks(keys, config.sample_salt), keys])
            differs = ranked != threshold
            column = differs.argmax(axis=1)
            outside = differs.any(axis=1) & (ranked[np.arange(len(ranked)), column] > threshold[column])
            here = reasons[first : first + batch.num_rows]
            here[(here < 0) & outside] = REASONS.index("not_sampled")
            first += batch.num_rows
    return reasons


def _filter_batch(unit: Unit, batch: "pa.RecordBatch", reasons: "np.ndarray") -> "pa.RecordBatch":
    """Return the kept rows of a batch; record the others as dropped."""
    import pyarrow as pa
    import pyarrow.compute as pc

    dropped = pa.array(reasons >= 0)
    if not pc.any(dropped).as_py():
        return batch
    removed = batch.filter(dropped)
    unit.drop_arrays(
        removed["sample_key"],
        pa.DictionaryArray.from_arrays(pa.array(reasons[reasons >= 0]), pa.array(REASONS)),
        pc.binary_join_element_wise("row", pc.cast(removed["source_row"], pa.string()), " "),
    )
    return batch.filter(pc.invert(dropped))


STAGE = Stage(
    name="laion_selection",
    code_version="2",
    config_type=LaionSelectionConfig,
    produce=produce,
    description="The rows of all parts together: one per URL, reduced to a sample; every other row with its reason.",
    rows=RowTable("rows"),
    checks=(),
    preview=None,
    funnel_label="Rows kept of all parts together",
    cost=None,
)
