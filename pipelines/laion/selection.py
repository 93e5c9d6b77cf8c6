"""Stage ``laion_selection``: the rows of all parts taken together, without duplicates between parts, cut to a sample.

What the whole set decides is decided here and not in ``laion_subset``, so that a part's rows depend on its own file. Of
rows with one URL that of the smallest sample key stays, of rows with one sample key that of the first part and row; so
the keys that stay are the same in whatever order, and in however many files, the rows came.

Rows are compared by 128-bit hash, in buckets of the hash's range that fit into memory one at a time.
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
# A row on its way to its bucket: hash of what must differ, sample key, part by place in the input, row of its file.
_ENTRY = [("hash", "u8", 2), ("key", "u8", 2), ("part", "u4"), ("row", "u4")]
_LOSER = [("row", "u4"), ("reason", "u1")]
_SURVIVORS = "survivors"
_SURVIVOR_BYTES = 1 << 28
_HIGH = 48
"""Bits below the high ones: the sample's last row is found by counting ranks by their high 16 bits, then by looking at
one count's rows alone."""
_TASKS_PER_PLACE = 4


def rows_name(part: str) -> str:
    """Return the file that holds a part's rows in this stage's output."""
    return PART_ROWS_FILE.format(partition=part)


@dataclass(frozen=True)
class _Work:
    """What every piece of the work needs to know, on whatever node it is done."""

    config: LaionSelectionConfig
    bits: int
    """Leading bits of a hash that name its bucket."""
    num_parts: int
    folder: Path
    """Where pieces that are done on other nodes make folders of their own."""
    scattered: tuple[Path, ...] = ()
    """Folders that together hold all entries, by bucket."""


@dataclass(frozen=True)
class _Verdict:
    """What is known of all rows before a part is written."""

    losers: tuple[Path, ...]
    """Folders that together hold all duplicates, by part."""
    threshold: "np.ndarray | None"
    """(rank, key words) of the last row of the sample; None where there is no limit."""


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
        work = _Work(run.config, bits, len(parts), run.scratch.absolute())
        with ray_tasks(run, run.config.workers) as tasks, run.progress(2 * sum(counts), "rows") as progress:
            verdict = _judge_here(work, subsets, progress) if tasks is None else _judge(work, subsets, tasks, progress)
            pieces = ((part, (number, verdict)) for number, part in enumerate(parts))
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
    """Return the subsets in the order of their parts: a part's place in it stands for the part."""
    return sorted(run.inputs.get("subset", ()), key=lambda item: item.manifest.partition or "")


def _judge_here(work: _Work, subsets: list[StageOutput], progress: Progress) -> _Verdict:
    """Find the duplicates and the threshold in this process."""
    for number, subset in enumerate(subsets):
        _scatter(work, number, subset.path(ROWS_FILE), work.folder)
        progress.advance(subset.manifest.file(ROWS_FILE).num_rows or 0)
    work = replace(work, scattered=(work.folder,))
    histogram = None
    for bucket in range(1 << work.bits):
        histogram = _sum(histogram, _settle(work, range(bucket, bucket + 1), work.folder))
        _bucket_path(work.folder, bucket).unlink(missing_ok=True)
    place, rank = _place_of_limit(work.config.limit, histogram)
    if place is None:
        return _Verdict((work.folder,), None)
    return _Verdict((work.folder,), _threshold([_candidates(work.folder, place, work.config)], rank))


def _judge(work: _Work, subsets: list[StageOutput], tasks: RayTasks, progress: Progress) -> _Verdict:
    """Find them on a cluster: parts are scattered at the same time, then buckets are settled at the same time."""
    paths = [subset.path(ROWS_FILE).absolute() for subset in subsets]
    names = [f"part {subset.manifest.partition}" for subset in subsets]
    scattered = []
    for name, folder in tasks.map(_scatter_apart, work, zip(names, enumerate(paths), strict=True)):
        scattered.append(folder)
        progress.advance(subsets[names.index(name)].manifest.file(ROWS_FILE).num_rows or 0)
    work = replace(work, scattered=tuple(scattered))
    num_buckets = 1 << work.bits
    step = -(-num_buckets // (_TASKS_PER_PLACE * max(1, tasks.num_places)))
    ranges = [range(start, min(start + step, num_buckets)) for start in range(0, num_buckets, step)]
    histogram = None
    losers = []
    for _, (folder, counts) in tasks.map(_settle_apart, work, ((f"bucket {item[0]}", item) for item in ranges)):
        losers.append(folder)
        histogram = _sum(histogram, counts)
    for folder in scattered:
        shutil.rmtree(folder, ignore_errors=True)
    place, rank = _place_of_limit(work.config.limit, histogram)
    if place is None:
        return _Verdict(tuple(losers), None)
    chosen = tasks.map(_candidates_apart, (place, work.config), ((folder.name, folder) for folder in losers))
    return _Verdict(tuple(losers), _threshold([candidates for _, candidates in chosen], rank))


def _sum(one: "np.ndarray | None", other: "np.ndarray | None") -> "np.ndarray | None":
    return other if one is None or other is None else one + other


def _scatter_apart(work: _Work, numbered: tuple[int, Path]) -> Path:
    folder = fresh_folder(work.folder, "scattered")
    _scatter(work, *numbered, folder)
    return folder


def _settle_apart(work: _Work, buckets: range) -> "tuple[Path, np.ndarray | None]":
    folder = fresh_folder(work.folder, "settled")
    return folder, _settle(work, buckets, folder)


def _candidates_apart(chosen: tuple[int, LaionSelectionConfig], folder: Path) -> "np.ndarray":
    return _candidates(folder, *chosen)


def _scatter(work: _Work, number: int, path: Path, folder: Path) -> None:
    """Append the entries of one part to the files of their buckets in `folder`."""
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


def _losers_path(folder: Path, number: int) -> Path:
    return folder / f"losers-{number:05d}"


def _append(path: Path, rows: "np.ndarray") -> None:
    with path.open("ab") as stream:
        stream.write(rows.tobytes())


def _settle(work: _Work, buckets: range, folder: Path) -> "np.ndarray | None":
    """Write down the duplicates of some buckets in `folder`, by part, and with a limit the keys of all other rows.

    Return with a limit how many of these have each value of the high bits of their rank, int64 [65536].
    """
    import numpy as np

    from pipelines.laion.hashes import key_ranks

    histogram = None if work.config.limit is None else np.zeros(1 << 16, np.int64)
    for bucket in buckets:
        paths = [path for place in work.scattered if (path := _bucket_path(place, bucket)).exists()]
        if not paths:
            continue
        entries = np.concatenate([np.fromfile(path, _ENTRY) for path in paths])
        reasons = _duplicates(entries)
        _write_losers(folder, entries, reasons, work.num_parts)
        if histogram is not None:
            survivors = np.ascontiguousarray(entries["key"][reasons < 0])
            ranks = key_ranks(survivors, work.config.sample_salt)
            histogram += np.bincount((ranks >> _HIGH).astype(np.int64), minlength=1 << 16)
            _append(folder / _SURVIVORS, survivors)
    return histogram


def _place_of_limit(limit: int | None, histogram: "np.ndarray | None") -> tuple[int | None, int]:
    """Return the high bits of the rank of the sample's last row, and its place among the rows that have them.

    None and 0 where all rows are in the sample.
    """
    import numpy as np

    if limit is None or histogram is None or histogram.sum() <= limit:
        return None, 0
    totals = histogram.cumsum()
    place = int(np.searchsorted(totals, limit))
    return place, limit - int(totals[place] - histogram[place]) - 1


def _candidates(folder: Path, place: int, config: LaionSelectionConfig) -> "np.ndarray":
    """Return (rank, key words) of the rows that have these high bits, uint64 [rows, 3]."""
    import numpy as np

    from pipelines.laion.hashes import key_ranks

    found = [np.empty((0, 3), "u8")]
    path = folder / _SURVIVORS
    for start in range(0, path.stat().st_size if path.exists() else 0, _SURVIVOR_BYTES):
        keys = np.fromfile(path, "u8", count=_SURVIVOR_BYTES // 8, offset=start).reshape(-1, 2)
        ranks = key_ranks(keys, config.sample_salt)
        inside = (ranks >> _HIGH) == place
        found.append(np.column_stack([ranks[inside], keys[inside]]))
    return np.concatenate(found)


def _threshold(found: "list[np.ndarray]", rank: int) -> "np.ndarray":
    import numpy as np

    candidates = np.concatenate(found)
    return candidates[np.lexsort(candidates.T[::-1])[rank]]


def _duplicates(entries: "np.ndarray") -> "np.ndarray":
    """Return per entry -1 where it stays, or the number of its reason."""
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


def _write_losers(folder: Path, entries: "np.ndarray", reasons: "np.ndarray", num_parts: int) -> None:
    import numpy as np

    lost = np.flatnonzero(reasons >= 0)
    losers = np.empty(len(lost), _LOSER)
    losers["row"], losers["reason"] = entries["row"][lost], reasons[lost]
    parts = entries["part"][lost]
    order = np.argsort(parts, kind="stable")
    ends = np.cumsum(np.bincount(parts, minlength=num_parts))
    for number, piece in enumerate(np.split(losers[order], ends[:-1])):
        if len(piece):
            _append(_losers_path(folder, number), piece)


def _write_part(run: StageRun[LaionSelectionConfig], name: str, judged: tuple[int, _Verdict]) -> None:
    """Write the rows of one part that stay."""
    number, verdict = judged
    with run.unit(name) as unit:
        _write_rows(run, unit, _in_order(run)[number], [_losers_path(item, number) for item in verdict.losers], verdict)


def _write_rows(
    run: StageRun[LaionSelectionConfig], unit: Unit, subset: StageOutput, losers: list[Path], verdict: _Verdict
) -> None:
    """Write the rows of one part that stay; a part that loses none is linked as it is.

    The file's bytes follow from the rows that stay in this part, whatever the other parts hold.
    """
    import pyarrow.parquet as pq

    source = subset.path(ROWS_FILE)
    name = rows_name(subset.manifest.partition or "")
    reasons = _reasons(run.config, subset, losers, verdict.threshold)
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
            kept = _kept(unit, batch, reasons[first : first + batch.num_rows])
            first += batch.num_rows
            rows_out += kept.num_rows
            if kept.num_rows:
                writer.write_batch(kept, row_group_size=_BATCH_ROWS)
    unit.count_rows(name, rows_out)
    unit.account(rows_in=len(reasons), rows_out=rows_out)


def _reasons(
    config: LaionSelectionConfig, subset: StageOutput, losers: list[Path], threshold: "np.ndarray | None"
) -> "np.ndarray":
    """Return per row of a part -1 where it stays, or the number of its reason."""
    import numpy as np
    import pyarrow.parquet as pq

    from pipelines.laion.hashes import key_ranks, key_words, parse_hex_keys

    reasons = np.full(subset.manifest.file(ROWS_FILE).num_rows or 0, -1, np.int8)
    for path in losers:
        if path.exists():
            lost = np.fromfile(path, _LOSER)
            reasons[lost["row"]] = lost["reason"]
    if threshold is None:
        return reasons
    first = 0
    with pq.ParquetFile(subset.path(ROWS_FILE)) as rows:
        for batch in rows.iter_batches(_BATCH_ROWS, columns=["sample_key"], use_threads=False):
            keys = key_words(parse_hex_keys(batch["sample_key"]))
            ranked = np.column_stack([key_ranks(keys, config.sample_salt), keys])
            differs = ranked != threshold
            column = differs.argmax(axis=1)
            beyond = differs.any(axis=1) & (ranked[np.arange(len(ranked)), column] > threshold[column])
            here = reasons[first : first + batch.num_rows]
            here[(here < 0) & beyond] = REASONS.index("not_sampled")
            first += batch.num_rows
    return reasons


def _kept(unit: Unit, batch: "pa.RecordBatch", reasons: "np.ndarray") -> "pa.RecordBatch":
    import pyarrow as pa
    import pyarrow.compute as pc

    lost = pa.array(reasons >= 0)
    if not pc.any(lost).as_py():
        return batch
    gone = batch.filter(lost)
    unit.drop_arrays(
        gone["sample_key"],
        pa.DictionaryArray.from_arrays(pa.array(reasons[reasons >= 0]), pa.array(REASONS)),
        pc.binary_join_element_wise("row", pc.cast(gone["source_row"], pa.string()), " "),
    )
    return batch.filter(pc.invert(lost))


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
