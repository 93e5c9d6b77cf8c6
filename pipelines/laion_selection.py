"""Stage ``laion_selection``: the rows of all parts taken together, without duplicates between parts, cut to a sample.

What the whole set decides is decided here and not in ``laion_subset``, so that a part's rows depend on its own file. Of
rows with one URL that of the smallest sample key stays, of rows with one sample key that of the first part and row; so
the keys that stay are the same in whatever order, and in however many files, the rows came.

Rows are compared by 128-bit hash, in buckets of the hash's range that fit into memory one at a time.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ThroughlineError
from pipelines.laion_subset import ROWS_FILE
from pipelines.stage import Stage, StageOutput, StageResult, StageRun, Unit
from pipelines.stage_configs import LaionSelectionConfig

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


def rows_name(part: str) -> str:
    """Return the file that holds a part's rows in this stage's output."""
    return PART_ROWS_FILE.format(partition=part)


def produce(run: StageRun[LaionSelectionConfig]) -> StageResult:
    subsets = sorted(run.inputs.get("subset", ()), key=lambda item: item.manifest.partition or "")
    if not subsets:
        raise ThroughlineError("laion_selection: no subsets among its inputs; run laion_subset for at least one part")
    parts = [item.manifest.partition or "" for item in subsets]
    counts = [item.manifest.file(ROWS_FILE).num_rows or 0 for item in subsets]
    if not all(run.is_finished(part) for part in parts):
        shutil.rmtree(run.scratch, ignore_errors=True)
        run.scratch.mkdir(parents=True)
        with run.progress(2 * sum(counts), "rows") as progress:
            bits = max((-(-sum(counts) // run.config.bucket_rows) - 1).bit_length(), 0)
            for number, subset in enumerate(subsets):
                _scatter(subset, number, bits, run)
                progress.advance(counts[number])
            threshold = _settle(run, 1 << bits, len(subsets))
            for number, subset in enumerate(subsets):
                if not run.is_finished(parts[number]):
                    with run.unit(parts[number]) as unit:
                        _write_part(run, unit, subset, number, threshold)
                progress.advance(counts[number])
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


def _scatter(subset: StageOutput, number: int, bits: int, run: StageRun[LaionSelectionConfig]) -> None:
    """Append the entries of one part to the files of their buckets."""
    import numpy as np
    import pyarrow.parquet as pq

    from pipelines.row_hashes import key_words, parse_hex_keys, string_hashes

    first = 0
    with pq.ParquetFile(subset.path(ROWS_FILE)) as rows:
        for batch in rows.iter_batches(_BATCH_ROWS, columns=["sample_key", "url"], use_threads=False):
            entries = np.empty(batch.num_rows, _ENTRY)
            entries["key"] = key_words(parse_hex_keys(batch["sample_key"]))
            entries["hash"] = string_hashes(batch["url"]) if run.config.drop_duplicate_urls else entries["key"]
            entries["part"] = number
            entries["row"] = np.arange(first, first + batch.num_rows)
            first += batch.num_rows
            buckets = _bucket(entries, bits)
            order = np.argsort(buckets, kind="stable")
            ends = np.cumsum(np.bincount(buckets, minlength=1 << bits))
            for bucket, piece in enumerate(np.split(entries[order], ends[:-1])):
                if len(piece):
                    _append(_bucket_path(run.scratch, bucket), piece)


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


def _settle(run: StageRun[LaionSelectionConfig], num_buckets: int, num_parts: int) -> "np.ndarray | None":
    """Write down the duplicates, by part; return (rank, key words) of the last row of the sample, or None for no limit.

    The last row is found by counting ranks by their high bits, then by looking at one count's rows alone.
    """
    import numpy as np

    from pipelines.row_hashes import key_ranks

    limit, salt = run.config.limit, run.config.sample_salt
    high = np.uint64(_HASH_BITS - 16)
    histogram = np.zeros(1 << 16, np.int64)
    for bucket in range(num_buckets):
        path = _bucket_path(run.scratch, bucket)
        if not path.exists():
            continue
        entries = np.fromfile(path, _ENTRY)
        reasons = _duplicates(entries)
        _write_losers(run.scratch, entries, reasons, num_parts)
        if limit is not None:
            survivors = np.ascontiguousarray(entries["key"][reasons < 0])
            histogram += np.bincount((key_ranks(survivors, salt) >> high).astype(np.int64), minlength=1 << 16)
            survivors.tofile(path)  # all that the sample needs of the bucket
        else:
            path.unlink()
    if limit is None or histogram.sum() <= limit:
        return None
    totals = histogram.cumsum()
    place = int(np.searchsorted(totals, limit))
    found = []
    for bucket in range(num_buckets):
        path = _bucket_path(run.scratch, bucket)
        if path.exists():
            keys = np.fromfile(path, "u8").reshape(-1, 2)
            ranks = key_ranks(keys, salt)
            inside = (ranks >> high) == place
            found.append(np.column_stack([ranks[inside], keys[inside]]))
    candidates = np.concatenate(found)
    order = np.lexsort(candidates.T[::-1])
    return candidates[order[limit - int(totals[place] - histogram[place]) - 1]]


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


def _write_part(
    run: StageRun[LaionSelectionConfig],
    unit: Unit,
    subset: StageOutput,
    number: int,
    threshold: "np.ndarray | None",
) -> None:
    """Write the rows of one part that stay; a part that loses none is linked as it is.

    The file's bytes follow from the rows that stay in this part, whatever the other parts hold.
    """
    import pyarrow.parquet as pq

    source = subset.path(ROWS_FILE)
    name = rows_name(subset.manifest.partition or "")
    reasons = _reasons(run, subset, number, threshold)
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
    run: StageRun[LaionSelectionConfig], subset: StageOutput, number: int, threshold: "np.ndarray | None"
) -> "np.ndarray":
    """Return per row of a part -1 where it stays, or the number of its reason."""
    import numpy as np
    import pyarrow.parquet as pq

    from pipelines.row_hashes import key_ranks, key_words, parse_hex_keys

    reasons = np.full(subset.manifest.file(ROWS_FILE).num_rows or 0, -1, np.int8)
    path = _losers_path(run.scratch, number)
    if path.exists():
        losers = np.fromfile(path, _LOSER)
        reasons[losers["row"]] = losers["reason"]
    if threshold is None:
        return reasons
    first = 0
    with pq.ParquetFile(subset.path(ROWS_FILE)) as rows:
        for batch in rows.iter_batches(_BATCH_ROWS, columns=["sample_key"], use_threads=False):
            keys = key_words(parse_hex_keys(batch["sample_key"]))
            ranked = np.column_stack([key_ranks(keys, run.config.sample_salt), keys])
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


STAGE = Stage(name="laion_selection", code_version="2", config_type=LaionSelectionConfig, produce=produce)

if __name__ == "__main__":
    from pipelines.laion_selection import STAGE as stage

    stage.main()
