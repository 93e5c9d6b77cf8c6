"""Stage ``images``: downloads one part's pictures and makes them square; every row ends as a picture or with a reason.

Fetching is `pipelines.fetch`, decoding is `pipelines.image_decode`; here rows become shards, and shards files.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import ThroughlineError
from pipelines.fetch_status import NO_FAILURE, FetchStatus
from pipelines.laion_selection import rows_name
from pipelines.laion_subset import ROWS_FILE
from pipelines.manifest import Conservation
from pipelines.progress import Progress
from pipelines.ray_units import ray_tasks, run_units
from pipelines.stage import Stage, StageResult, StageRun
from pipelines.stage_configs import ImagesConfig

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.decode_pool import DecodePool
    from pipelines.fetch import Fetched, Fetcher
    from pipelines.image_decode import DecodeOutcome

_SMALLEST_WINDOW = 20
_REASONS_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One subset row on its way."""

    sample_key: str
    url: str
    alt_text: str
    expected_sha256: str | None = None
    """What the source table says the bytes hash to, if it does."""


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of a row; `picture` is there if and only if the status is ok. `fetched` has let go of its body."""

    status: FetchStatus
    detail: str
    fetched: "Fetched"
    source_num_bytes: int = 0
    picture: "DecodeOutcome | None" = None
    drifted: bool | None = None
    """Whether the bytes are not those of the source table's digest; None where it states none."""


def produce(run: StageRun[ImagesConfig]) -> StageResult:
    path, num_rows = _rows_of(run)
    finished = run.finished_units()
    num_done = sum(unit.rows[0] for unit in finished if unit.rows)
    start = time.monotonic()
    with run.progress(num_rows, "images", initial=num_done) as progress:
        counts = Counter[str]()
        for unit in finished:
            counts.update(unit.notes["statuses"])
        try:
            if run.config.workers.ray_address is None:
                asyncio.run(_download(run, path, _Tally(progress, counts)))
            else:
                _download_on_ray(run, path, _Tally(progress, counts))
        except BaseExceptionGroup as group:
            raise _first(group) from group
    seconds = time.monotonic() - start
    statuses, drift = Counter[str](), Counter[str]()
    for unit in run.finished_units():
        statuses.update(unit.notes["statuses"])
        drift.update(unit.notes["drift"])
    num_ok = statuses[FetchStatus.OK]
    fetched_now = statuses.total() - num_done
    return StageResult(
        summary={"num_rows": statuses.total(), "num_ok": num_ok, "statuses": dict(sorted(statuses.items()))}
        | ({"drift": dict(sorted(drift.items()))} if drift else {}),
        measurements={"seconds": round(seconds, 3), "rows_per_second": round(fetched_now / seconds, 2)},
        conservation=None if statuses else Conservation(rows_in=0, rows_out=0),
    )


def _rows_of(run: StageRun[ImagesConfig]) -> tuple[Path, int | None]:
    """Return the table of rows to download and its length: what the selection left of the part, where there is one."""
    given, name = ("selection", rows_name(run.partition or "")) if "selection" in run.inputs else ("subset", ROWS_FILE)
    output = run.input(given)
    return output.path(name), output.manifest.file(name).num_rows


def _first(group: BaseExceptionGroup) -> BaseException:
    """Return the failure that ended the tasks; the others were only cancelled after it."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


class _Tally:
    """Counts statuses and shows them beside the rate."""

    def __init__(self, progress: Progress, counts: Counter[str]) -> None:
        self._progress = progress
        self._counts = counts

    def add(self, status: FetchStatus, num_rows: int = 1) -> None:
        self._counts[status] += num_rows
        failed = Counter({word: count for word, count in self._counts.items() if word != FetchStatus.OK})
        shown = ", ".join(f"{word} {count}" for word, count in failed.most_common(_REASONS_SHOWN))
        self._progress.advance(
            num_rows, ok=self._counts[FetchStatus.OK], failed=f"{failed.total()} ({shown})" if shown else 0
        )


async def _download(run: StageRun[ImagesConfig], path: Path, tally: _Tally) -> None:
    from pipelines.decode_pool import DecodePool
    from pipelines.fetch import Fetcher

    config = run.config
    in_flight = asyncio.Semaphore(config.shards_in_flight)
    async with (
        DecodePool(config.decode_workers, config.decode_seconds, config.transform) as pool,
        Fetcher(config.fetch, pool.has_room) as fetcher,
        asyncio.TaskGroup() as shards,
    ):

        async def download_shard(name: str, rows: list[Row]) -> None:
            try:
                outcomes = await _download_shard(run, name, rows, fetcher, pool, tally)
                await asyncio.to_thread(_write_shard, run, name, rows, outcomes)
            finally:
                in_flight.release()

        for name, rows in read_shards(path, config.rows_per_shard):
            if not run.is_finished(name):
                await in_flight.acquire()
                shards.create_task(download_shard(name, rows))


def _download_on_ray(run: StageRun[ImagesConfig], path: Path, tally: _Tally) -> None:
    with ray_tasks(run, run.config.workers) as tasks:
        assert tasks is not None

        def shards() -> Iterator[tuple[str, _Share]]:
            for name, rows in read_shards(path, run.config.rows_per_shard):
                # Shards that run at the same time may be on one host all of them.
                yield name, _Share(rows, max(1, run.config.fetch.connections_per_host // max(1, tasks.num_places)))

        for unit in run_units(run, tasks, shards(), _download_unit):
            for status, num_rows in unit.notes["statuses"].items():
                tally.add(FetchStatus(status), num_rows)


@dataclass(frozen=True)
class _Share:
    """What a process on another node is given of the download: a shard, and its share of the connections to a host."""

    rows: list[Row]
    connections_per_host: int


def _download_unit(run: StageRun[ImagesConfig], name: str, share: _Share) -> None:
    from pipelines.decode_pool import DecodePool
    from pipelines.fetch import Fetcher

    config = run.config
    fetch = config.fetch.model_copy(update={"connections_per_host": share.connections_per_host})

    async def download() -> list[RowOutcome]:
        async with (
            DecodePool(max(1, int(config.workers.cpus_per_unit)), config.decode_seconds, config.transform) as pool,
            Fetcher(fetch, pool.has_room) as fetcher,
        ):
            return await _download_shard(run, name, share.rows, fetcher, pool, None)

    try:
        outcomes = asyncio.run(download())
    except BaseExceptionGroup as group:
        raise _first(group) from group
    _write_shard(run, name, share.rows, outcomes)


def read_shards(path: Path, rows_per_shard: int) -> Iterator[tuple[str, list[Row]]]:
    """Yield (unit name, rows) of a subset, whatever its row groups; the last shard may be shorter."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    pending: list[Row] = []
    with pq.ParquetFile(path) as rows:
        names = [field.name for field in fields(Row) if field.name in rows.schema_arrow.names]
        for batch in rows.iter_batches(max(rows_per_shard, 8192), columns=names):
            pending.extend(Row(**row) for row in pa.Table.from_batches([batch]).to_pylist())
            while len(pending) >= rows_per_shard:
                yield f"{number:05d}", pending[:rows_per_shard]
                pending = pending[rows_per_shard:]
                number += 1
    if pending:
        yield f"{number:05d}", pending


async def _download_shard(
    run: StageRun[ImagesConfig],
    name: str,
    rows: list[Row],
    fetcher: "Fetcher",
    pool: "DecodePool",
    tally: _Tally | None,
) -> list[RowOutcome]:
    watch = _FailureWatch(f"{run.label} shard {name}", len(rows), run.config)

    async def one(index: int, row: Row) -> RowOutcome:
        outcome = _checked_for_drift(row, await _download_row(row, fetcher, pool), run.config)
        if tally is not None:
            tally.add(outcome.status)
        watch.record(index, outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(index, row)) for index, row in enumerate(rows)]
    return [task.result() for task in tasks]


async def _download_row(row: Row, fetcher: "Fetcher", pool: "DecodePool") -> RowOutcome:
    fetched = await fetcher.fetch(row.url)
    if fetched.status is not FetchStatus.OK:
        return RowOutcome(fetched.status, fetched.detail, fetched)
    picture = await pool.decode(fetched.body)
    ok = picture.status is FetchStatus.OK
    return RowOutcome(
        picture.status, picture.detail, replace(fetched, body=b""), len(fetched.body), picture if ok else None
    )


def _checked_for_drift(row: Row, outcome: RowOutcome, config: ImagesConfig) -> RowOutcome:
    if outcome.picture is None or row.expected_sha256 is None:
        return outcome
    found = outcome.picture.source_sha256
    if found == row.expected_sha256.strip().lower():
        return replace(outcome, drifted=False)
    detail = f"SHA-256 {found[:16]}..., the source table states {row.expected_sha256[:16]}..."
    if config.drift == "drop":
        return replace(outcome, status=FetchStatus.DRIFTED, detail=detail, picture=None, drifted=True)
    return replace(outcome, detail=", ".join(filter(None, (outcome.detail, detail))), drifted=True)


class _FailureWatch:
    """Stops the stage when nearly all of many neighbouring rows failed: then it isn't the rows that are wrong.

    Rows are looked at in their order, not in the order they finish in (failures are faster than pictures), so that
    the verdict depends on the outcomes alone.
    """

    def __init__(self, label: str, num_rows: int, config: ImagesConfig) -> None:
        self._label = label
        self._share = config.max_failure_share
        self._window = min(config.failure_window, num_rows) if num_rows >= _SMALLEST_WINDOW else 0
        self._recent: deque[RowOutcome] = deque(maxlen=self._window)
        self._early: dict[int, RowOutcome] = {}
        self._next = 0
        self._num_failed = 0

    def record(self, index: int, outcome: RowOutcome) -> None:
        """Take note of a row; raises ThroughlineError where failures exceed the configured share."""
        if not self._window:
            return
        self._early[index] = outcome
        while self._next in self._early:
            self._push(self._early.pop(self._next))
            self._next += 1

    def _push(self, outcome: RowOutcome) -> None:
        if len(self._recent) == self._window:
            self._num_failed -= self._recent[0].status not in NO_FAILURE
        self._recent.append(outcome)
        self._num_failed += outcome.status not in NO_FAILURE
        if len(self._recent) == self._window and self._num_failed > self._share * self._window:
            raise ThroughlineError(self._sentence())

    def _sentence(self) -> str:
        failures = [item for item in self._recent if item.status not in NO_FAILURE]
        (status, detail), count = Counter((item.status, item.detail) for item in failures).most_common(1)[0]
        return (
            f"{self._label}: {len(failures)} of {self._window} rows in a row failed, more than the allowed share "
            f"{self._share:g}; most often {status}{f' ({detail})' if detail else ''}, {count} times; check the network "
            "and that host, then run again: it goes on at the first unfinished shard"
        )


def _write_shard(run: StageRun[ImagesConfig], name: str, rows: list[Row], outcomes: list[RowOutcome]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.image_rows import IMAGES_SCHEMA, PREFIX, STATUS_SCHEMA

    pictures = [_picture(row, outcome) for row, outcome in zip(rows, outcomes, strict=True) if outcome.picture]
    statuses = [
        {
            "sample_key": row.sample_key,
            "url": row.url,
            "status": outcome.status.value,
            "http_status": outcome.fetched.http_status,
            "detail": outcome.detail,
        }
        for row, outcome in zip(rows, outcomes, strict=True)
    ]
    with run.unit(name) as unit:
        if pictures:
            table = pa.Table.from_pylist(pictures, IMAGES_SCHEMA)
            with unit.open(f"{PREFIX}{name}.parquet", num_rows=len(pictures)) as stream:
                pq.write_table(table, stream, **_table_options(table))
        with unit.open(f"status-{name}.parquet", num_rows=len(rows)) as stream:
            pq.write_table(pa.Table.from_pylist(statuses, STATUS_SCHEMA), stream, compression="zstd")
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.picture is None:
                unit.drop(row.sample_key, outcome.status.value, outcome.detail)
        unit.account(rows_in=len(rows), rows_out=len(pictures))
        drift = Counter(outcome.drifted for outcome in outcomes)
        unit.notes["drift"] = {word: drift[flag] for flag, word in ((False, "same"), (True, "drifted")) if drift[flag]}
        unit.notes["statuses"] = dict(sorted(Counter(outcome.status.value for outcome in outcomes).items()))


def _picture(row: Row, outcome: RowOutcome) -> dict[str, Any]:
    fetched, picture = outcome.fetched, outcome.picture
    assert picture is not None
    return {
        "sample_key": row.sample_key,
        "url": row.url,
        "alt_text": row.alt_text,
        "image": picture.image,
        "format": picture.format,
        "width_px": picture.width_px,
        "height_px": picture.height_px,
        "source_sha256": picture.source_sha256,
        "source_num_bytes": outcome.source_num_bytes,
        "perceptual_hash": picture.perceptual_hash,
        "drifted": outcome.drifted,
        "content_type": fetched.content_type,
        "final_url": fetched.final_url,
    }


def _table_options(table: "pa.Table") -> dict[str, Any]:
    """Leave the pictures as they are: they don't compress, and statistics over them would double the footer."""
    others = [name for name in table.column_names if name != "image"]
    codecs = dict.fromkeys(others, "zstd") | {"image": "none"}
    return {"compression": codecs, "use_dictionary": False, "write_statistics": others}


STAGE = Stage(name="images", code_version="2", config_type=ImagesConfig, produce=produce)

if __name__ == "__main__":
    from pipelines.images import STAGE as stage

    stage.main()
