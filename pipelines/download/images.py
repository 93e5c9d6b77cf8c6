"""Stage ``images``: downloads one part's pictures and makes them square; every row ends as a picture or with a reason.

Here rows become shards, and passes over them are made until every row is settled; fetching, decoding and the files of a
shard have modules of their own.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster.units import ray_tasks, run_units
from pipelines.core.config import identity_of
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import EARLIER, Conservation
from pipelines.core.progress import Progress
from pipelines.download.circuit_breaker import FailureWatch
from pipelines.download.config import ImagesConfig
from pipelines.download.cost import images_cost
from pipelines.download.inspection import find_image_rows, preview_images
from pipelines.download.outcomes import Passes, Row, RowOutcome, Standing, images_name, status_name, write_tables
from pipelines.download.status import MAY_HEAL, MAY_HEAL_LATER, FetchStatus
from pipelines.download.tally import Tally
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
    given, name = _rows_given(run)
    subset = run.input(given)
    part = _Part(run, subset.path(name), subset.manifest.file(name).num_rows or 0, _earlier(run))
    start = time.monotonic()
    try:
        num_asked = asyncio.run(_download(part)) if run.config.workers.ray_address is None else _download_on_ray(part)
    except BaseExceptionGroup as group:
        raise _first(group) from group
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
        measurements={"seconds": round(seconds, 3), "rows_per_second": round(num_asked / seconds, 2)},
        conservation=None if statuses else Conservation(rows_in=0, rows_out=0),
    )


def _rows_given(run: StageRun[ImagesConfig]) -> tuple[str, str]:
    """Return the input that holds the rows to download, and the file in it: what a selection left, if there is one."""
    if "selection" in run.inputs:
        return "selection", rows_name(run.partition or "")
    return "subset", ROWS_FILE


def _earlier(run: StageRun[ImagesConfig]) -> StageOutput | None:
    """Return the output that a later pass starts from, and None for a download.

    Raises ThroughlineError where it is missing, or was made from other rows or with another configuration.
    """
    if not run.config.later_passes:
        return None
    outputs = run.inputs.get(EARLIER, ())
    if len(outputs) != 1:
        raise ThroughlineError(
            f"{run.label}: later_passes {run.config.later_passes} starts from the output of "
            f"{run.config.later_passes - 1}, which the request has to name as its input {EARLIER!r}"
        )
    manifest, (given, _) = outputs[0].manifest, _rows_given(run)
    expected = run.config.model_copy(update={"later_passes": run.config.later_passes - 1})
    if (manifest.stage, manifest.partition) != (run.stage_name, run.partition):
        raise ThroughlineError(
            f"{run.label}: {EARLIER} is {manifest.stage} {manifest.partition or ''}, not of this part"
        )
    if manifest.config != identity_of(expected) or manifest.inputs.get(given) != (run.input(given).ref,):
        raise ThroughlineError(
            f"{run.label}: {EARLIER} {manifest.data_version} is of another subset or configuration; a later pass "
            "changes later_passes alone"
        )
    return outputs[0]


def _first(group: BaseExceptionGroup) -> BaseException:
    """Return the failure that ended the tasks; the others were only cancelled after it."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


@dataclass(frozen=True)
class _Task:
    """A shard in a pass: which of its rows are asked for, and what the pass before left."""

    name: str
    rows: list[Row]
    asked: list[int]
    standing: Standing | None


class _Part:
    """The part's shards, and where each of them stands."""

    def __init__(self, run: StageRun[ImagesConfig], path: Path, num_rows: int, earlier: StageOutput | None) -> None:
        self.run = run
        self.passes = Passes(run.scratch.absolute())
        self._path = path
        self._num_rows = num_rows
        self._earlier = earlier

    def progress(self, number: int) -> tuple[Progress, Counter[str]]:
        """Return the progress of a pass at its start, and the statuses that rows have by then."""
        config, counts = self.run.config, Counter[str]()
        num_asked, finished = 0, {unit.name: unit.notes["statuses"] for unit in self.run.finished_units()}
        for index in range(-(-self._num_rows // config.rows_per_shard)):
            name = shard_name(index)
            if name in finished:
                counts.update(finished[name])
                continue
            standing = self._standing(name)
            if standing is not None:
                outcomes = standing.outcomes()
                counts.update(outcome.status.value for outcome in outcomes)
                num_asked += len(_asked(outcomes, standing)) if standing.number < number else 0
        if number == 1 and self._earlier is None:
            return self.run.progress(self._num_rows, "images", initial=counts.total()), counts
        return Progress(f"{self.run.label} pass {number}", num_asked, "failed rows"), counts

    def tasks(self, number: int) -> Iterator[_Task]:
        """Yield what a pass has to do."""
        for name, rows in read_shards(self._path, self.run.config.rows_per_shard):
            if self.run.is_finished(name):
                continue
            standing = self._standing(name)
            if standing is None:
                yield _Task(name, rows, list(range(len(rows))), None)
            elif standing.number < number:
                standing.check_rows(rows)
                yield _Task(name, rows, _asked(standing.outcomes(), standing), standing)

    def _standing(self, name: str) -> Standing | None:
        waiting = self.passes.standing(name)
        if waiting is not None or self._earlier is None:
            return waiting
        listed = {entry.path for entry in self._earlier.manifest.files}
        self._earlier.path(status_name(name))  # raises where the manifest doesn't list it
        self._earlier.fetch([images_name(name)] if images_name(name) in listed else [])
        return Standing(self._earlier.folder.absolute(), name)


def _asked(outcomes: list[RowOutcome], standing: Standing) -> list[int]:
    heals = MAY_HEAL if standing.number else MAY_HEAL_LATER
    return [index for index, outcome in enumerate(outcomes) if outcome.status in heals]


async def _download(part: _Part) -> int:
    """Make all passes over the part; return how many rows were asked for."""
    from pipelines.download.decode_pool import DecodePool
    from pipelines.download.fetch import Fetcher

    config = part.run.config
    num_asked = 0
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
                tally = Tally(progress, counts)
                await _make_pass(part, number, fetcher, pool, tally)
            num_asked += tally.num_asked
    return num_asked


async def _make_pass(part: _Part, number: int, fetcher: "Fetcher", pool: "DecodePool", tally: Tally) -> None:
    run = part.run
    in_flight = asyncio.Semaphore(run.config.shards_in_flight)
    goes_on = number <= run.config.retry_passes

    async def download_shard(task: _Task) -> None:
        try:
            outcomes = await _download_shard(run, task, fetcher, pool, tally)
            if goes_on and any(outcome.status in MAY_HEAL for outcome in outcomes):
                await asyncio.to_thread(part.passes.leave, number, task.name, task.rows, outcomes, task.standing)
            else:
                await asyncio.to_thread(_write_shard, run, task, outcomes)
                await asyncio.to_thread(part.passes.finish, task.name)
        finally:
            in_flight.release()

    async with asyncio.TaskGroup() as shards:
        for task in part.tasks(number):
            await in_flight.acquire()
            shards.create_task(download_shard(task))


def shard_name(index: int) -> str:
    """Return the name of the unit that a subset's shard becomes."""
    return f"{index:05d}"


def _download_on_ray(part: _Part) -> int:
    """Let other nodes download the part shard by shard, each making all its passes; return how many rows were asked."""
    run, sent = part.run, dict[str, _Task]()
    progress, counts = part.progress(1)
    with ray_tasks(run, run.config.workers) as tasks, progress:
        assert tasks is not None
        # Shards that run at the same time may be on one host all of them.
        connections = max(1, run.config.fetch.connections_per_host // max(1, tasks.num_places))

        def shards() -> Iterator[tuple[str, _Share]]:
            for task in part.tasks(run.config.retry_passes + 1):
                sent[task.name] = task
                yield task.name, _Share(task, connections)

        tally = Tally(progress, counts)
        for unit in run_units(run, tasks, shards(), _download_unit):
            task = sent.pop(unit.name)
            before = task.standing.outcomes() if task.standing is not None else []
            tally.add_shard(unit.notes["statuses"], Counter(item.status.value for item in before), len(task.asked))
    return tally.num_asked


@dataclass(frozen=True)
class _Share:
    """What a process on another node is given of the download: a shard, and its share of the connections to a host."""

    task: _Task
    connections_per_host: int


def _download_unit(run: StageRun[ImagesConfig], name: str, share: _Share) -> None:
    from pipelines.download.decode_pool import DecodePool
    from pipelines.download.fetch import Fetcher

    config = run.config
    fetch = config.fetch.model_copy(update={"connections_per_host": share.connections_per_host})

    async def download() -> None:
        task, passes = share.task, Passes(run.scratch)
        async with (
            DecodePool(max(1, int(config.workers.cpus_per_unit)), config.decode_seconds, config.transform) as pool,
            Fetcher(fetch, pool.has_room) as fetcher,
        ):
            while True:
                outcomes = await _download_shard(run, task, fetcher, pool, None)
                number = task.standing.number + 1 if task.standing is not None else 1
                if number > config.retry_passes or not any(outcome.status in MAY_HEAL for outcome in outcomes):
                    break
                passes.leave(number, name, task.rows, outcomes, task.standing)
                standing = passes.standing(name)
                assert standing is not None, "it was left just now"
                task = _Task(name, task.rows, _asked(standing.outcomes(), standing), standing)
                await asyncio.sleep(config.retry_pass_seconds)
        _write_shard(run, task, outcomes)

    try:
        asyncio.run(download())
    except BaseExceptionGroup as group:
        raise _first(group) from group


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
                yield shard_name(number), pending[:rows_per_shard]
                pending = pending[rows_per_shard:]
                number += 1
    if pending:
        yield shard_name(number), pending


async def _download_shard(
    run: StageRun[ImagesConfig], task: _Task, fetcher: "Fetcher", pool: "DecodePool", tally: Tally | None
) -> list[RowOutcome]:
    """Ask for the rows of a task; return what became of all rows of its shard."""
    outcomes = task.standing.outcomes() if task.standing is not None else []
    # What an earlier pass left are failures: only among rows that nobody asked for do failures tell of the network.
    watch = None if outcomes else FailureWatch(f"{run.label} shard {task.name}", len(task.rows), run.config)

    async def one(index: int) -> RowOutcome:
        outcome, num_bytes = await _download_row(task.rows[index], fetcher, pool, run.config)
        before = outcomes[index] if outcomes else None
        if tally is not None:
            tally.add(outcome.status, num_bytes, before.status if before else None)
        if watch is not None:
            watch.record(index, outcome)
        return replace(outcome, num_passes=before.num_passes + 1) if before else outcome

    async with asyncio.TaskGroup() as group:
        running = [group.create_task(one(index)) for index in task.asked]
    found = [item.result() for item in running]
    if not outcomes:
        return found
    for index, outcome in zip(task.asked, found, strict=True):
        outcomes[index] = outcome
    return outcomes


async def _download_row(
    row: Row, fetcher: "Fetcher", pool: "DecodePool", config: ImagesConfig
) -> tuple[RowOutcome, int]:
    """Return what became of a row, and the bytes that came."""
    fetched = await fetcher.fetch(row.url)
    if fetched.status is not FetchStatus.OK:
        return RowOutcome(fetched.status, fetched.detail, fetched.http_status), 0
    num_bytes = len(fetched.body)
    decoded = await pool.decode(fetched.body)
    status, detail, drifted = decoded.status, decoded.detail, None
    if status is FetchStatus.OK and row.expected_sha256 is not None:
        drifted = decoded.source_sha256 != row.expected_sha256.strip().lower()
        if drifted:
            said = f"SHA-256 {decoded.source_sha256[:16]}..., the source table states {row.expected_sha256[:16]}..."
            if config.drift == "drop":
                status, detail = FetchStatus.DRIFTED, said
            else:
                detail = ", ".join(filter(None, (detail, said)))
    picture = _picture(row, fetched, decoded, drifted) if status is FetchStatus.OK else None
    return RowOutcome(status, detail, fetched.http_status, picture=picture), num_bytes


def _picture(row: Row, fetched: "Fetched", decoded: "DecodeOutcome", drifted: bool | None) -> dict[str, Any]:
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


def _write_shard(run: StageRun[ImagesConfig], task: _Task, outcomes: list[RowOutcome]) -> None:
    import pyarrow.parquet as pq

    rows, name = task.rows, task.name
    num_ok = sum(outcome.status is FetchStatus.OK for outcome in outcomes)
    with run.unit(name) as unit:
        write_tables(lambda path, count: unit.open(path, num_rows=count), name, rows, outcomes, task.standing)
        for row, outcome in zip(rows, outcomes, strict=True):
            if outcome.status is not FetchStatus.OK:
                unit.drop(row.sample_key, outcome.status.value, outcome.detail)
        unit.account(rows_in=len(rows), rows_out=num_ok)
        drift = Counter[bool | None]({True: sum(outcome.status is FetchStatus.DRIFTED for outcome in outcomes)})
        if num_ok:
            drift.update(pq.read_table(run.out_path(images_name(name)), columns=["drifted"])["drifted"].to_pylist())
        again = [outcome for outcome in outcomes if outcome.num_passes > 1]
        healed = sum(outcome.status is FetchStatus.OK for outcome in again)
        unit.notes["drift"] = {word: drift[flag] for flag, word in ((False, "same"), (True, "drifted")) if drift[flag]}
        unit.notes["again"] = {"rows": len(again), "healed": healed} if again else {}
        unit.notes["statuses"] = dict(sorted(Counter(outcome.status.value for outcome in outcomes).items()))


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
