"""Stage ``laion_subset``: the rows of one part that pass the rules, each with its sample key.

Duplicates are looked for within the part; `pipelines.dataset` settles equal sample keys between parts.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import ThroughlineError
from pipelines.laion_index import Part, find_part
from pipelines.sample_key import sample_key
from pipelines.source_files import locate_source
from pipelines.stage import Stage, StageOutput, StageResult, StageRun, Unit
from pipelines.stage_configs import LaionSubsetConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.laion_rules import Rule

ROWS_FILE = "rows.parquet"
# Rows held in memory at a time, and rows per row group: part of the output's bytes, so no matter of configuration.
_BATCH_ROWS = 65_536


def produce(run: StageRun[LaionSubsetConfig]) -> StageResult:
    index = run.input("index")
    part = find_part(index, run.partition)
    if not run.is_finished("rows"):
        path = _locate(run.config, index, part)
        _check_columns(run.config, part, path)
        with run.unit("rows") as unit:
            _write_subset(run, unit, part, path)
    (finished,) = run.finished_units()
    rows_in, rows_out = finished.rows or (0, 0)
    return StageResult(summary={"num_rows": rows_in, "num_kept": rows_out, "dropped": finished.dropped})


def _locate(config: LaionSubsetConfig, index: StageOutput, part: Part) -> Path:
    where = index.manifest.execution
    cache = config.digest_cache or where.get("digest_cache")
    return locate_source(part.content, config.source or where["source"], Path(cache) if cache else None)


def _check_columns(config: LaionSubsetConfig, part: Part, path: Path) -> None:
    from pipelines.laion_rules import rules_of

    for rule in rules_of(config):
        for role in rule.column:
            if role not in part.columns:
                raise ThroughlineError(
                    f"{path}: no column {role}, which the rule {rule.reason} needs; switch that rule off "
                    "or leave the file out"
                )


def _write_subset(run: StageRun[LaionSubsetConfig], unit: Unit, part: Part, path: Path) -> None:
    import pyarrow.parquet as pq

    from pipelines.laion_rules import rules_of
    from pipelines.laion_schema import SUBSET_SCHEMA

    rules = rules_of(run.config)
    duplicates = _Duplicates(run.config.drop_duplicate_urls)
    rows_in = rows_out = 0
    with (
        run.progress(part.num_rows, "rows") as progress,
        unit.open(ROWS_FILE) as stream,
        pq.ParquetWriter(stream, SUBSET_SCHEMA, compression="zstd") as writer,
    ):
        for batch in read_batches(path, part.columns, _BATCH_ROWS):
            kept = _keep(batch, rows_in, rules, duplicates, unit)
            if kept.num_rows:
                writer.write_batch(kept, row_group_size=_BATCH_ROWS)
            rows_in += batch.num_rows
            rows_out += kept.num_rows
            progress.advance(batch.num_rows, kept=rows_out)
    if rows_in != part.num_rows:
        raise ThroughlineError(f"{path}: {rows_in} rows, the index says {part.num_rows}; run laion_index again")
    unit.count_rows(ROWS_FILE, rows_out)
    unit.account(rows_in=rows_in, rows_out=rows_out)


def read_batches(path: Path, columns: dict[str, str], batch_rows: int) -> "Iterator[pa.RecordBatch]":
    """Yield record batches with one column per role, cast to the types that the rules read.

    text is never null (null becomes the empty string); a role that the file lacks is a column of nulls. Raises
    ThroughlineError that names the file where its data cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    from pipelines.laion_schema import COLUMNS, open_metadata

    kinds = {column.role: pa.string() if "string" in column.kinds else pa.float64() for column in COLUMNS}
    with open_metadata(path) as metadata:
        try:
            for batch in metadata.iter_batches(batch_rows, columns=list(columns.values())):
                arrays = {
                    role: _cast(batch[columns[role]], kind) if role in columns else pa.nulls(batch.num_rows, kind)
                    for role, kind in kinds.items()
                }
                arrays["text"] = pc.fill_null(arrays["text"], "")
                yield pa.RecordBatch.from_pydict(arrays)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ThroughlineError(f"{path}: damaged metadata ({reason}); fetch the file again") from error


def _cast(array: "pa.Array", kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    return array if array.type == kind else array.cast(kind)


class _Duplicates:
    """Remembers the pairs and URLs that were kept by 128-bit hash, so that memory doesn't grow with their length."""

    def __init__(self, by_url: bool) -> None:
        self._keys: set[bytes] = set()
        self._urls: set[bytes] | None = set() if by_url else None

    def reason(self, key: str, url: str) -> str | None:
        """Return why a row is a duplicate of one before it, or None for the first of its kind, which is remembered."""
        key_bytes = bytes.fromhex(key)
        if key_bytes in self._keys:
            return "duplicate_pair"
        if self._urls is not None:
            url_bytes = hashlib.blake2b(url.encode(), digest_size=16).digest()
            if url_bytes in self._urls:
                return "duplicate_url"
            self._urls.add(url_bytes)
        self._keys.add(key_bytes)
        return None


def _keep(
    batch: "pa.RecordBatch", first_row: int, rules: "list[Rule]", duplicates: _Duplicates, unit: Unit
) -> "pa.RecordBatch":
    """Return the rows that stay, in the subset's schema; each of the others is dropped with its reason."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from pipelines.laion_rules import first_reasons
    from pipelines.laion_schema import SUBSET_SCHEMA

    reasons = first_reasons(rules, batch)
    urls, texts = batch["url"].to_pylist(), batch["text"].to_pylist()
    keys = [sample_key(url or "", text) for url, text in zip(urls, texts, strict=True)]
    words: list[str | None] = [rules[reason].reason if reason >= 0 else None for reason in reasons.tolist()]
    for row in (reasons < 0).nonzero()[0].tolist():
        words[row] = duplicates.reason(keys[row], urls[row])
    kept = [row for row, word in enumerate(words) if word is None]
    lost = [(keys[row], word, f"row {first_row + row}") for row, word in enumerate(words) if word is not None]
    if lost:
        unit.drop_many(*zip(*lost, strict=True))
    rows = batch.take(pa.array(kept, pa.int64()))
    columns = {
        "sample_key": pa.array([keys[row] for row in kept], pa.string()),
        "url": rows["url"],
        "alt_text": rows["text"],
        "width": _pixels(rows["width"]),
        "height": _pixels(rows["height"]),
        "similarity": rows["similarity"],
        "nsfw": rows["nsfw"],
        "license": rows["license"],
        "source_row": pc.add(pa.array(kept, pa.int64()), first_row),
    }
    return pa.RecordBatch.from_pydict(columns, schema=SUBSET_SCHEMA)


def _pixels(sides: "pa.Array") -> "pa.Array":
    """Return sides as int32; what is no size a picture can have (NaN, negative, huge) becomes null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    valid = pc.and_(pc.greater_equal(sides, 0), pc.less(sides, 2**31))
    return pc.cast(pc.if_else(pc.fill_null(valid, False), sides, None), pa.int32(), safe=False)


STAGE = Stage(name="laion_subset", code_version="1", config_type=LaionSubsetConfig, produce=produce)

if __name__ == "__main__":
    from pipelines.laion_subset import STAGE as stage

    stage.main()
