"""Stage ``images``: downloads a part's images and crops them to squares; each failed row is dropped with a reason.

This module downloads shards in passes until every row has succeeded or failed for good. Fetching, decoding, the tables
of a shard and the bookkeeping of passes have modules of their own.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipelines.cluster.units import ray_tasks, run_units
from pipelines.core.config import identity_of
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import EARLIER, Conservation
from pipelines.download.config import ImagesConfig
from pipelines.download.cost import images_cost
from pipelines.download.inspection import find_image_rows, preview_images
from pipelines.download.monitoring import CircuitBreaker, DownloadProgress
from pipelines.download.outcomes import Row, RowOutcome, write_tables
from pipelines.download.passes import PartShards, PassStore, ShardTask
from pipelines.download.status import RETRYABLE, FetchStatus
from pipelines.laion.selection import rows_name
from pipelines.laion.subset import ROWS_FILE
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import RowReader
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun

if TYPE_CHECKING:
    from pipelines.download.decode import DecodeOutcome
    from pipelines.download.decode_pool import DecodePool
    from pipelines.download.fetch import Fetched, Fetcher


def produce(run: StageRun[ImagesConfig]) -> StageResult:
    input_name, file_name = _row_source(run)
    source = run.input(input_name)
    num_rows = source.manifest.file(file_name).num_rows or 0
    part = PartShards(run, source.path(file_name), num_rows, _earlier(run))
    start = time.monotonic()
    try:
        on_ray = run.config.workers.ray_address is not None
        num_requested = _download_on_ray(part) if on_ray else asyncio.run(_download(part))
    except BaseExceptionGroup as group:
        raise _first_error(group) from group
    seconds = time.monotonic() - start
    statuses, drift, again = Counter[str](), Counter[str](), Counter[str]()
    for unit in run.finished_units():
        statuses.update(unit.notes["statuses"])
        drift.update(unit.notes["drift"])
        again.update(unit.notes["again"])
    summary = {
        "num_rows": statuses.total(),
        "num_ok": statuses[FetchStatus.OK],
        "statuses": dict(sorted(statuses.items())),
    }
    summary |= {"drift": dict(sorted(drift.items()))} if drift else {}
    summary |= {"asked_again": dict(sorted(again.items()))} if again else {}
    return StageResult(
        summary=summary,
        measurements={"seconds": round(seconds, 3), "rows_per_second": round(num_requested / seconds, 2)},
        conservation=None if statuses else Conservation(rows_in=0, rows_out=0),
    )


def _row_source(run: StageRun[ImagesConfig]) -> tuple[str, str]:
    """Return (input name, file name) of the rows to download: the selection if there is one, else the subset."""
    if "selection" in run.inputs:
        return "selection", rows_name(run.partition or "")
    return "subset", ROWS_FILE


def _earlier(run: StageRun[ImagesConfig]) -> StageOutput | None:
    """Return the output that a later pass starts from; None for a first download.

    Raises ThroughlineError if it is missing, or was made from other rows or with another configuration.
    """
    if not run.config.later_passes:
        return None
    outputs = run.inputs.get(EARLIER, ())
    if len(outputs) != 1:
        raise ThroughlineError(
            f"{run.label}: later_passes {run.config.later_passes} starts from the output of later_passes "
            f"{run.config.later_passes - 1}; give that as the input {EARLIER!r} of the request"
        )
    manifest, (input_name, _) = outputs[0].manifest, _row_source(run)
    expected = run.config.model_copy(update={"later_passes": run.config.later_passes - 1})
    if (manifest.stage, manifest.partition) != (run.stage_name, run.partition):
        raise ThroughlineError(
            f"{run.label}: the input {EARLIER} is {manifest.stage} {manifest.partition or ''}; expected an output of "
            "this stage and part"
        )
    if manifest.config != identity_of(expected) or manifest.inputs.get(input_name) != (run.input(input_name).ref,):
        raise ThroughlineError(
            f"{run.label}: the input {EARLIER}, {manifest.data_version}, is of another subset or configuration; a "
            "later pass may change later_passes only"
        )
    return outputs[0]


def _first_error(group: BaseExceptionGroup) -> BaseException:
    """Return the error that ended the tasks; the others were only cancelled because of it."""
    error = group.exceptions[0]
    return _first_error(error) if isinstance(error, BaseExceptionGroup) else error


async def _download(part: PartShards) -> int:
    """Make all passes over the part; return the number of requested rows."""
    from pipelines.download.decode_pool import DecodePool
    from pipelines.download.fetch import Fetcher

    config = part.run.config
    num_requested = 0
    async with (
        DecodePool(config.decode_workers, config.decode_seconds, config.transform) as pool,
        Fetcher(config.fetch, pool.has_room) as fetcher,
    ):
        for number in range(1, config.retry_passes + 2):
            if number > 1:
                if next(part.tasks(number), None) is None:
                    break
                await asyncio.sleep(config.retry_pass_seconds)
            progress, counts = part.progress(number)
            with progress:
                tally = DownloadProgress(progress, counts)
                await _make_pass(part, number, fetcher, pool, tally)
            num_requested += tally.num_requested
    return num_requested


async def _make_pass(
    part: PartShards, number: int, fetcher: "Fetcher", pool: "DecodePool", tally: DownloadProgress
) -> None:
    run = part.run
    in_flight = asyncio.Semaphore(run.config.shards_in_flight)

    async def download_shard(task: ShardTask) -> None:
        try:
            outcomes = await _download_shard(run, task, fetcher, pool, tally)
            if number <= run.config.retry_passes and _is_any_retryable(outcomes):
                await asyncio.to_thread(part.store.save, number, task, outcomes)
            else:
                await asyncio.to_thread(_write_shard, run, task, outcomes)
                await asyncio.to_thread(part.store.remove, task.name)
        finally:
            in_flight.release()

    async with asyncio.TaskGroup() as shards:
        for task in part.tasks(number):
            await in_flight.acquire()
            shards.create_task(download_shard(task))


def _is_any_retryable(outcomes: list[RowOutcome]) -> bool:
    return any(outcome.status in RETRYABLE for outcome in outcomes)


def _download_on_ray(part: PartShards) -> int:
    """Download shards on the nodes of a cluster, each with all its passes; return the number of requested rows."""
    run, submitted = part.run, dict[str, ShardTask]()
    progress, counts = part.progress(1)
    with ray_tasks(run, run.config.workers) as tasks, progress:
        assert tasks is not None
        # All shards that run at the same time may be fetching from the same host.
        connections = max(1, run.config.fetch.connections_per_host // max(1, tasks.num_places))

        def shards() -> Iterator[tuple[str, ShardTask]]:
            for task in part.tasks(run.config.retry_passes + 1):
                submitted[task.name] = task
                yield task.name, task

        tally = DownloadProgress(progress, counts)
        for unit in run_units(run, tasks, shards(), partial(_download_unit, connections)):
            task = submitted.pop(unit.name)
            before = Counter(item.status.value for item in task.previous.outcomes) if task.previous else Counter[str]()
            tally.add_shard(unit.notes["statuses"], before, len(task.requested_rows()))
    return tally.num_requested


def _download_unit(connections_per_host: int, run: StageRun[ImagesConfig], name: str, task: ShardTask) -> None:
    """Download one shard on another node; `connections_per_host` is its share of the configured limit."""
    from pipelines.download.decode_pool import DecodePool
    from pipelines.download.fetch import Fetcher

    config = run.config
    fetch = config.fetch.model_copy(update={"connections_per_host": connections_per_host})

    async def download(task: ShardTask) -> None:
        store = PassStore(run.scratch)
        async with (
            DecodePool(max(1, int(config.workers.cpus_per_unit)), config.decode_seconds, config.transform) as pool,
            Fetcher(fetch, pool.has_room) as fetcher,
        ):
            while True:
                outcomes = await _download_shard(run, task, fetcher, pool, None)
                number = task.previous.pass_number + 1 if task.previous is not None else 1
                if number > config.retry_passes or not _is_any_retryable(outcomes):
                    break
                store.save(number, task, outcomes)
                task = replace(task, previous=store.progress(name))
                await asyncio.sleep(config.retry_pass_seconds)
        _write_shard(run, task, outcomes)

    try:
        asyncio.run(download(task))
    except BaseExceptionGroup as group:
        raise _first_error(group) from group


async def _download_shard(
    run: StageRun[ImagesConfig], task: ShardTask, fetcher: "Fetcher", pool: "DecodePool", tally: DownloadProgress | None
) -> list[RowOutcome]:
    """Download the requested rows of a shard; return the outcomes of all its rows."""
    previous = task.previous.outcomes if task.previous is not None else None
    # In a later pass only rows that failed before are requested, so that their failures say nothing about the network.
    watch = CircuitBreaker(f"{run.label} shard {task.name}", len(task.rows), run.config) if previous is None else None

    async def download(index: int) -> RowOutcome:
        outcome, num_bytes = await _download_row(task.rows[index], fetcher, pool, run.config)
        before = previous[index] if previous else None
        if tally is not None:
            tally.add(outcome.status, num_bytes, before.status if before else None)
        if watch is not None:
            watch.record(index, outcome)
        return replace(outcome, num_passes=before.num_passes + 1) if before else outcome

    requested = task.requested_rows()
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(download(index)) for index in requested]
    outcomes = dict(enumerate(previous or ())) | {
        index: item.result() for index, item in zip(requested, running, strict=True)
    }
    return [outcomes[index] for index in range(len(task.rows))]


async def _download_row(
    row: Row, fetcher: "Fetcher", pool: "DecodePool", config: ImagesConfig
) -> tuple[RowOutcome, int]:
    """Return the outcome of a row, and the number of bytes received."""
    fetched = await fetcher.fetch(row.url)
    if fetched.status is not FetchStatus.OK:
        return RowOutcome(fetched.status, fetched.detail, fetched.http_status), 0
    num_bytes = len(fetched.body)
    decoded = await pool.decode(fetched.body)
    status, detail, drifted = decoded.status, decoded.detail, None
    if status is FetchStatus.OK and row.expected_sha256 is not None:
        drifted = decoded.source_sha256 != row.expected_sha256.strip().lower()
        if drifted:
            digests = f"SHA-256 {decoded.source_sha256[:16]}..., the source table states {row.expected_sha256[:16]}..."
            if config.drift == "drop":
                status, detail = FetchStatus.DRIFTED, digests
            else:
                detail = ", ".join(filter(None, (detail, digests)))
    image = _image_row(row, fetched, decoded, drifted) if status is FetchStatus.OK else None
    return RowOutcome(status, detail, fetched.http_status, image=image), num_bytes


def _image_row(row: Row, fetched: "Fetched", decoded: "DecodeOutcome", drifted: bool | None) -> dict[str, Any]:
    return {
        "sample_key": row.sample_key,
        "url": row.url,
        "alt_text": row.alt_text,
        "image": decoded.image,
        "format": decoded.format,
        "width_px": decoded.width_px,
        "height_px": decoded.height_px,
        "source_sha256": decoded.source_sha256,
        "source_num_bytes": len(fetched.body),
        "perceptual_hash": decoded.perceptual_hash,
        "drifted": drifted,
        "content_type": fetched.content_type,
        "final_url": fetched.final_url,
    }


def _write_shard(run: StageRun[ImagesConfig], task: ShardTask, outcomes: list[RowOutcome]) -> None:
    rows, statuses = task.rows, Counter(outcome.status for outcome in outcomes)
    with run.unit(task.name) as unit:
        write_tables(lambda path, count: unit.open(path, num_rows=count), task.name, rows, outcomes, task.previous)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.status is not FetchStatus.OK:
                unit.drop(row.sample_key, outcome.status.value, outcome.detail)
        unit.account(rows_in=len(rows), rows_out=statuses[FetchStatus.OK])
        new_images = [outcome.image for outcome in outcomes if outcome.image is not None]
        drift = Counter[bool | None](image["drifted"] for image in new_images)
        if task.previous is not None and len(new_images) < statuses[FetchStatus.OK]:
            drift.update(task.previous.images(["drifted"])["drifted"].to_pylist())
        drift[True] += statuses[FetchStatus.DRIFTED]
        again = [outcome for outcome in outcomes if outcome.num_passes > 1]
        healed = sum(outcome.status is FetchStatus.OK for outcome in again)
        unit.notes["drift"] = {word: drift[flag] for flag, word in ((False, "same"), (True, "drifted")) if drift[flag]}
        unit.notes["again"] = {"rows": len(again), "healed": healed} if again else {}
        unit.notes["statuses"] = {status.value: statuses[status] for status in sorted(statuses)}


STAGE = Stage(
    name="images",
    code_version="4",
    config_type=ImagesConfig,
    produce=produce,
    description="The downloaded images as square RGB JPEGs, and a status with a reason for every row.",
    rows=RowReader(find_image_rows),
    checks=(),
    preview=preview_images,
    funnel_label="Pictures downloaded and decoded",
    cost=images_cost,
)
