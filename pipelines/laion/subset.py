"""Stage ``laion_subset``: filters the rows of one part and gives each its sample key.

The output depends only on the part's own entry in the index. Duplicates are dropped within the part; the stages
`laion_selection` and `dataset` deduplicate across parts.
"""

# pyarrow.compute makes its functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cluster.units import ray_tasks, run_units
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import SourceFile
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.cost import subset_cost
from pipelines.laion.index import Part, read_part
from pipelines.laion.sources import locate_source
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import SourceTable
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun, Unit

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.laion.duplicates import DuplicateFinder
    from pipelines.laion.rules import Rule

ROWS_FILE = "rows.parquet"
_UNIT = "rows"
# Rows in memory at a time, and rows per row group: it shapes the output's bytes, so it is not configurable.
_BATCH_ROWS = 65_536
# Role -> column of the subset.
_COPIED = {
    "url": "url", "text": "alt_text", "sha256": "expected_sha256", "similarity": "similarity",
    "aesthetic": "aesthetic", "pwatermark": "pwatermark", "punsafe": "punsafe",
}  # fmt: skip


def produce(run: StageRun[LaionSubsetConfig]) -> StageResult:
    entry = run.input("index")
    part = read_part(entry)
    if part.part != run.partition:
        raise ThroughlineError(f"laion_subset {run.partition}: got the index entry of part {part.part}")
    if not run.is_finished(_UNIT):
        path = _locate(run.config, entry, part).absolute()
        with ray_tasks(run, run.config.workers) as tasks:
            for _ in run_units(run, tasks, [(_UNIT, path)], _make_unit):
                pass
    (finished,) = run.finished_units()
    rows_in, rows_out = finished.rows or (0, 0)
    return StageResult(
        summary={"num_rows": rows_in, "num_kept": rows_out, "dropped": finished.dropped},
        sources=[SourceFile(name=part.name, sha256=part.sha256, num_bytes=part.num_bytes)],
    )


def _make_unit(run: StageRun[LaionSubsetConfig], name: str, path: Path) -> None:
    with run.unit(name) as unit:
        _write_subset(run, unit, read_part(run.input("index")), path)


def _locate(config: LaionSubsetConfig, entry: StageOutput, part: Part) -> Path:
    where = entry.manifest.execution
    cache = config.digest_cache or where.get("digest_cache")
    return locate_source(part.content, config.source or where["source"], Path(cache) if cache else None)


def _open_checked(config: LaionSubsetConfig, part: Part, path: Path) -> "tuple[list[Rule], dict[str, str]]":
    """Return the rules, and name -> column of the file for the names in `where`.

    Raises ThroughlineError that names file and column where the file lacks a column that a rule needs.
    """
    from pipelines.laion.rules import rules_of

    rules = rules_of(config)
    for rule in rules:
        for role in rule.columns:
            if role not in part.columns:
                raise ThroughlineError(
                    f"{path}: no column {role}, which the rule {rule.field} needs; switch the rule off "
                    f"({rule.field}=null) or leave the file out"
                )
    return rules, _named_columns(config.where, part.columns, path) if config.where else {}


def _named_columns(where: str, roles: dict[str, str], path: Path) -> dict[str, str]:
    """Return name -> column of the file for the names that `where` reads."""
    import pyarrow as pa

    from pipelines.laion.schema import ROLE_TYPES, find_column, open_metadata
    from pipelines.laion.where import Condition

    with open_metadata(path) as metadata:
        schema = metadata.schema_arrow
    types = {column: ROLE_TYPES[role] for role, column in roles.items()}
    named = {}

    def no_rows(name: str) -> pa.Array:
        named[name] = column = find_column(name, schema, roles)
        return pa.nulls(0, types[column]) if column in types else _plain(pa.nulls(0, schema.field(column).type))

    try:
        Condition(where).evaluate(no_rows, 0)
    except ThroughlineError as error:
        raise ThroughlineError(f"{path}: {error}") from error
    return named


def _write_subset(run: StageRun[LaionSubsetConfig], unit: Unit, part: Part, path: Path) -> None:
    import pyarrow.parquet as pq

    from pipelines.laion.duplicates import DuplicateFinder
    from pipelines.laion.schema import LABELS, SUBSET_SCHEMA

    rules, named = _open_checked(run.config, part, path)
    duplicates = DuplicateFinder(run.config.drop_duplicate_urls, part.num_rows)
    rows_in = rows_out = 0
    with (
        run.progress(part.num_rows, "rows") as progress,
        unit.open(ROWS_FILE) as stream,
        # Dictionaries of URLs, texts or keys would be built and then discarded.
        pq.ParquetWriter(
            stream, SUBSET_SCHEMA, compression="zstd", use_dictionary=["width", "height", *LABELS]
        ) as writer,
    ):
        pending: list[pa.RecordBatch] = []
        for batch in read_batches(path, part.columns, _BATCH_ROWS, named):
            rows_in += batch.num_rows
            if rows_in > part.num_rows:
                break  # the deduplication table has no room for more
            pending.append(_filter_batch(batch, rows_in - batch.num_rows, rules, duplicates, unit))
            rows_out += pending[-1].num_rows
            _write_groups(writer, pending, _BATCH_ROWS)
            progress.advance(batch.num_rows, kept=rows_out)
        _write_groups(writer, pending, 1)
    if rows_in != part.num_rows:
        found = f"at least {rows_in}" if rows_in > part.num_rows else rows_in
        raise ThroughlineError(f"{path}: {found} rows, the index says {part.num_rows}; re-run laion_index")
    unit.count_rows(ROWS_FILE, rows_out)
    unit.account(rows_in=rows_in, rows_out=rows_out)


def _write_groups(writer: "pq.ParquetWriter", pending: "list[pa.RecordBatch]", least: int) -> None:
    """Write full row groups while at least `least` rows are pending, whatever the sizes of the batches."""
    import pyarrow as pa

    while (num_rows := sum(batch.num_rows for batch in pending)) >= least:
        beyond = max(num_rows - _BATCH_ROWS, 0)
        last = pending.pop()
        inside = last.num_rows - beyond
        writer.write_batch(pa.concat_batches([*pending, last[:inside]]), row_group_size=_BATCH_ROWS)
        pending[:] = [last[inside:]] if beyond else []


def read_batches(
    path: Path, columns: dict[str, str], batch_rows: int, named: dict[str, str] | None = None
) -> "Iterator[pa.RecordBatch]":
    """Yield record batches with one column per role, in the types that the rules read.

    text is never null (null becomes the empty string); labels may be dictionaries of strings; a role that the file
    lacks is a column of nulls. `named` adds columns, name -> column of the file; a column that fills a role has the
    role's values. Raises ThroughlineError that names the file where its data can't be read.
    """
    import pyarrow as pa

    from pipelines.laion.hashes import fill_missing
    from pipelines.laion.schema import LABELS, ROLE_TYPES, open_metadata

    named = named or {}
    roles = {column: role for role, column in columns.items()}
    own = {column for column in named.values() if column not in roles}
    labels = [columns[role] for role in LABELS if role in columns]
    with open_metadata(path, labels) as metadata:
        try:
            for batch in _raw_batches(metadata, batch_rows, [*columns.values(), *own]):
                arrays = {
                    role: _cast(batch[columns[role]], kind, role in LABELS)
                    if role in columns
                    else pa.nulls(batch.num_rows, kind)
                    for role, kind in ROLE_TYPES.items()
                }
                arrays["text"] = fill_missing(arrays["text"])
                values = {
                    name: arrays[roles[column]] if column in roles else _plain(batch[column])
                    for name, column in named.items()
                }
                yield pa.RecordBatch.from_pydict(arrays | values)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ThroughlineError(f"{path}: damaged metadata ({reason}); fetch the file again") from error


def _raw_batches(metadata: "pq.ParquetFile", batch_rows: int, columns: list[str]) -> "Iterator[pa.RecordBatch]":
    """Yield the rows, reading a few row groups at a time; one call for all would read the whole file ahead."""
    groups: list[int] = []
    num_rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        num_rows += metadata.metadata.row_group(group).num_rows
        if num_rows >= batch_rows or group + 1 == metadata.num_row_groups:
            yield from metadata.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False)
            groups, num_rows = [], 0


def _cast(array: "pa.Array", kind: "pa.DataType", keep_dictionary: bool) -> "pa.Array":
    import pyarrow as pa

    if isinstance(array, pa.DictionaryArray):
        if keep_dictionary and array.dictionary.type == kind:
            return array
        array = array.dictionary_decode()
    return array if array.type == kind else array.cast(kind)


def _plain(array: "pa.Array") -> "pa.Array":
    """Return a column that fills no role as string, int64, float64 or boolean."""
    import pyarrow as pa

    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        return array.cast(pa.string())
    if pa.types.is_integer(array.type):
        return array.cast(pa.int64(), safe=False)
    return array.cast(pa.float64()) if pa.types.is_floating(array.type) else array


def _filter_batch(
    batch: "pa.RecordBatch", first_row: int, rules: "list[Rule]", duplicates: "DuplicateFinder", unit: Unit
) -> "pa.RecordBatch":
    """Return the rows that pass, in the subset's schema; drop the others with their reasons."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from pipelines.laion.hashes import hex_keys, sample_keys
    from pipelines.laion.rules import Rows, first_reasons
    from pipelines.laion.schema import LABELS, SUBSET_SCHEMA

    keys = sample_keys(batch["url"], batch["text"])
    reasons = first_reasons(rules, Rows(batch, keys))
    names = [*(rule.reason for rule in rules), "duplicate_pair", "duplicate_url"]
    passed = np.flatnonzero(reasons < 0)
    for offset, mask in enumerate(duplicates.find(keys, batch["url"], passed)):
        reasons[passed[mask]] = len(rules) + offset
    kept, lost = np.flatnonzero(reasons < 0), np.flatnonzero(reasons >= 0)
    if len(lost):
        numbers = pc.cast(pa.array(lost + first_row), pa.string())
        unit.drop_arrays(
            hex_keys(keys[lost]),
            pa.DictionaryArray.from_arrays(pa.array(reasons[lost]), pa.array(names)),
            pc.binary_join_element_wise("row", numbers, " "),
        )
    rows = batch.select([*_COPIED, "width", "height", *LABELS])
    if len(kept) < len(reasons):
        rows = rows.take(pa.array(kept))
    columns = {
        "sample_key": hex_keys(keys[kept]),
        "source_row": pa.array(kept + first_row),
        "width": _pixels(rows["width"]),
        "height": _pixels(rows["height"]),
        **{name: rows[role] for role, name in _COPIED.items()},
        **{role: rows[role].cast(pa.string()) for role in LABELS},
    }
    return pa.RecordBatch.from_pydict(columns, schema=SUBSET_SCHEMA)


def _pixels(sides: "pa.Array") -> "pa.Array":
    """Return sides as int32; values that are no image size (NaN, negative, huge) become null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    valid = pc.and_(pc.greater_equal(sides, 0), pc.less(sides, 2**31))
    return pc.cast(pc.if_else(pc.fill_null(valid, False), sides, None), pa.int32(), safe=False)


STAGE = Stage(
    name="laion_subset",
    code_version="3",
    config_type=LaionSubsetConfig,
    produce=produce,
    description="The rows that pass the filters, each with a sample key; every other row with the rule it failed.",
    rows=SourceTable("rows"),
    checks=(),
    preview=None,
    funnel_label="Rows that pass the filters",
    cost=subset_cost,
)
