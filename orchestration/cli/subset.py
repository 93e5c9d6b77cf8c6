"""The command `throughline subset`: a filtered, deduplicated subset of metadata files, without a profile or Dagster.

It runs the graph's own stages with an output root of its own, so unchanged parts are reused and a killed run resumes.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from pipelines.laion.config import LaionSubsetConfig
    from pipelines.laion.index import Part
    from pipelines.runner.outputs import StageOutput

_LISTS = ("opt_outs", "urls_denied", "urls_allowed", "domains_denied", "domains_allowed")
_RAY_THREADS = 256
"""Parts submitted at once; Ray runs as many as it has resources for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; imports nothing heavy."""
    parser.add_argument(
        "--input",
        dest="sources",
        nargs="+",
        required=True,
        metavar="PATH|URL",
        help="folders, globs or parquet files, on disk, in object stores (s3://, gs://, az://) or by https://",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER|s3://BUCKET/PREFIX", help="output root; finished parts are reused"
    )
    parser.add_argument(
        "--preset", metavar="NAME", help="published rules: laion400m, aesthetic-v2-5, sd-2, ...; `?` lists them"
    )
    parser.add_argument(
        "--where", metavar="EXPR", help="a condition, such as \"width >= 512 AND text NOT LIKE '%%logo%%'\""
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="RULE=VALUE",
        help="change a rule: a JSON value, a comma-separated list, or a file for the lists; repeatable",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="sample N rows by hash")
    parser.add_argument("--workers", type=int, help="worker processes; default: one per core")
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help='run on a Ray cluster, not in local processes: "auto", host:port, or "local"',
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_subset(arguments: argparse.Namespace) -> int:
    """Build the subset and print its funnel; return 0. Raises ThroughlineError for a user error."""
    from orchestration.cli.options import require_folder, require_home
    from pipelines.cluster.config import WorkersConfig
    from pipelines.core.environment import home_folder
    from pipelines.laion.presets import PRESETS, TOP_SHARES, preset_rules
    from pipelines.storage.mirror import open_root

    if arguments.preset == "?":
        for name, preset in PRESETS.items():
            print(f"{name:<24}{(preset.__doc__ or '').split(chr(10) + chr(10))[0].replace(chr(10) + '    ', ' ')}")
        return 0
    _check_arguments(arguments)
    if "://" in arguments.out:
        require_home(home_folder())
    else:
        require_folder(Path(arguments.out), "--out", "--out /a/folder")
    arguments.out = open_root(arguments.out, home_folder())
    changes = _changes(arguments.changes)
    if arguments.where is not None:
        changes["where"] = arguments.where
    rules = preset_rules(arguments.preset, changes)
    by_url = rules.drop_duplicate_urls
    # Deduplicating over all parts at once makes the kept row of a URL independent of their order.
    rules = rules.model_copy(update={"drop_duplicate_urls": False})
    index = _index(arguments.sources, arguments.out)
    if arguments.preset in TOP_SHARES:
        role, share = TOP_SHARES[arguments.preset]
        field = f"min_{role}"
        if getattr(rules, field) is None:
            rules = rules.model_copy(update={field: _threshold(index, role, share)})
    rules = rules.model_copy(update={"workers": WorkersConfig(ray_address=arguments.ray)})
    subsets = _subsets(index, rules, arguments.out, arguments.workers or os.cpu_count() or 1)
    selection = _selection(subsets, rules, by_url, arguments.limit, arguments.out)
    _report(arguments, rules, index, subsets, selection)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ThroughlineError for a number below 1 or an empty text."""
    for option in ("limit", "workers"):
        number = getattr(arguments, option)
        if number is not None and number < 1:
            raise ThroughlineError(f"--{option} {number}: expected at least 1; omit it for the default")
    for option in ("out", "where", "ray"):
        if getattr(arguments, option) == "":
            raise ThroughlineError(
                f"--{option} '': expected a value, found none (an unset shell variable?); give one, or omit the option"
            )


def _changes(settings: Sequence[str]) -> dict[str, Any]:
    """Return field -> value of ``rule=value`` settings."""
    from pipelines.laion.sources import scan_entry_list

    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ThroughlineError(f"--set {setting}: expected RULE=VALUE, such as min_side_px=512")
        if name in _LISTS and text != "null":
            changes[name] = scan_entry_list(text).model_dump()
            continue
        try:
            changes[name] = json.loads(text)
        except ValueError:
            changes[name] = text
        if name.endswith("_allowed") and isinstance(changes[name], str):
            changes[name] = text.split(",")
    return changes


def _index(sources: Sequence[str], out: Path) -> "StageOutput":
    from pipelines.laion import index as laion_index
    from pipelines.laion.sources import scan_index

    out.mkdir(parents=True, exist_ok=True)
    return laion_index.STAGE.run(scan_index(list(sources), out / "digests.json"), {}, out)


def _threshold(index: "StageOutput", role: str, share: float) -> float:
    from pipelines.laion.index import read_parts
    from pipelines.laion.sources import find_sources, local_path
    from pipelines.laion.top_share import top_share_threshold

    found = find_sources(index.manifest.execution["source"])
    cache = index.manifest.execution["digest_cache"]
    paths = [(local_path(found[part.name], Path(cache)), part.columns) for part in read_parts(index)]
    return top_share_threshold(paths, role, share)


def _subsets(index: "StageOutput", rules: "LaionSubsetConfig", out: Path, workers: int) -> "list[StageOutput]":
    """Run the stage for every part, several in parallel."""
    from pipelines.laion import subset as laion_subset
    from pipelines.laion.index import entry_of, read_parts

    parts = read_parts(index)
    inputs = {part.part: {"index": [entry_of(index, part.part)]} for part in parts}
    finished = {
        part.part: output
        for part in parts
        if (output := laion_subset.STAGE.find_finished(rules, inputs[part.part], out, part.part)) is not None
    }
    pending = sorted((part for part in parts if part.part not in finished), key=lambda part: -part.num_rows)
    done = sum(part.num_rows for part in parts if part.part in finished)
    if pending and rules.workers.ray_address is not None:
        finished |= _subsets_on_ray(index, rules, out, pending, done)
    elif min(workers, len(pending)) == 1:
        for part in pending:
            finished[part.part] = laion_subset.STAGE.run(rules, inputs[part.part], out, part.part)
    elif pending:
        finished |= _subsets_in_processes(index, rules, out, pending, min(workers, len(pending)), done)
    return [finished[part.part] for part in parts]


def _subsets_on_ray(
    index: "StageOutput", rules: "LaionSubsetConfig", out: Path, parts: "Sequence[Part]", rows_done: int
) -> "Mapping[str, StageOutput]":
    """Run the stage for each part in a thread that waits for its Ray tasks."""
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from pipelines.cluster.units import join_ray_for_units
    from pipelines.core.progress import Progress
    from pipelines.laion import subset as laion_subset
    from pipelines.laion.index import entry_of

    join_ray_for_units(rules.workers)  # once for all threads
    finished = {}
    total = rows_done + sum(part.num_rows for part in parts)
    pool = ThreadPoolExecutor(min(len(parts), _RAY_THREADS))
    with Progress("subset", total, "rows", initial=rows_done) as progress:
        try:
            inputs = {part.part: {"index": [entry_of(index, part.part)]} for part in parts}
            futures = {
                pool.submit(laion_subset.STAGE.run, rules, inputs[part.part], out, part.part): part for part in parts
            }
            for future in as_completed(futures):
                part = futures[future]
                finished[part.part] = future.result()
                progress.advance(part.num_rows)
        finally:
            pool.shutdown(cancel_futures=True)
    return finished


def _subsets_in_processes(
    index: "StageOutput", rules: "LaionSubsetConfig", out: Path, parts: "Sequence[Part]", workers: int, rows_done: int
) -> "Mapping[str, StageOutput]":
    import threading
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    from pipelines.core.progress import Progress
    from pipelines.laion.index import entry_of
    from pipelines.runner.outputs import StageOutput

    context = get_context("spawn")
    rows = context.SimpleQueue()
    finished = {}
    with Progress("subset", rows_done + sum(part.num_rows for part in parts), "rows", initial=rows_done) as progress:
        watcher = threading.Thread(target=_watch, args=(rows, progress), daemon=True)
        watcher.start()
        pool = ProcessPoolExecutor(workers, context, _start_worker, (rows,))
        try:
            dumped = rules.model_dump()
            futures = {
                pool.submit(_run_part, dumped, str(entry_of(index, part.part).address), str(out), part.part): part.part
                for part in parts
            }
            for future in as_completed(futures):
                finished[futures[future]] = StageOutput.load(Path(future.result()))
        except BrokenProcessPool as error:
            raise ThroughlineError(
                "a worker process was killed, usually because memory ran out; run the same command again with fewer "
                "--workers: finished parts are reused"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
            rows.put(None)
            watcher.join()
    return finished


class _RowCounter:
    """Replaces a worker's standard error: converts the stage's progress lines into row counts for the parent."""

    def __init__(self, rows: Any) -> None:
        self._rows, self._done = rows, 0

    def isatty(self) -> bool:
        return False

    def write(self, line: str) -> None:
        try:
            done = json.loads(line)["progress"]["done"]
        except (ValueError, KeyError, TypeError):
            os.write(2, line.encode())
            return
        self._rows.put(done if done < self._done else done - self._done)
        self._done = done

    def flush(self) -> None:
        pass


def _start_worker(rows: Any) -> None:
    import pyarrow as pa

    from pipelines.core.environment import PROGRESS_JSON

    os.environ[PROGRESS_JSON] = "1"
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    sys.stderr = _RowCounter(rows)


def _run_part(rules: dict[str, Any], entry_path: str, out: str, part: str) -> str:
    from pipelines.laion import subset as laion_subset
    from pipelines.laion.config import LaionSubsetConfig
    from pipelines.runner.outputs import StageOutput

    config, entry = LaionSubsetConfig.model_validate(rules), StageOutput.load(Path(entry_path))
    return str(laion_subset.STAGE.run(config, {"index": [entry]}, Path(out), part).manifest_path)


def _watch(rows: Any, progress: Any) -> None:
    while (count := rows.get()) is not None:
        progress.advance(count)


def _selection(
    subsets: "list[StageOutput]", rules: "LaionSubsetConfig", by_url: bool, limit: int | None, out: Path
) -> "StageOutput":
    from pipelines.laion import selection as laion_selection
    from pipelines.laion.config import LaionSelectionConfig

    config = LaionSelectionConfig(drop_duplicate_urls=by_url, limit=limit, workers=rules.workers)
    return laion_selection.STAGE.run(config, {"subset": subsets}, out)


def _report(
    arguments: argparse.Namespace,
    rules: "LaionSubsetConfig",
    index: "StageOutput",
    subsets: "list[StageOutput]",
    selection: "StageOutput",
) -> None:
    from collections import Counter

    from orchestration.cli.funnel import funnel_lines, funnel_svg, steps_of
    from pipelines.core.atomic import write_bytes
    from pipelines.core.config import identity_of
    from pipelines.laion import rules as laion_rules
    from pipelines.laion import selection as laion_selection

    dropped: Counter[str] = Counter()
    for output in [*subsets, selection]:
        assert output.manifest.conservation is not None
        dropped.update(output.manifest.conservation.dropped)
    rows_in = index.manifest.summary["num_rows"]
    order = [reason for reason in laion_rules.REASONS if not reason.startswith("duplicate")]
    steps = steps_of(rows_in, dropped, [*order, *laion_selection.REASONS])
    title = f"{arguments.preset or 'subset'}: {selection.manifest.summary['num_kept']:,} of {rows_in:,} rows"
    chart = arguments.out / "funnel.svg"
    write_bytes(chart, funnel_svg(title, rows_in, steps).encode())
    if arguments.json:
        outcome = {
            "rows_in": rows_in,
            "rows_out": selection.manifest.summary["num_kept"],
            "dropped": {step.reason: step.dropped for step in steps},
            "preset": arguments.preset,
            "rules": identity_of(rules),
            "index": str(index.manifest_path),
            "subsets": [str(output.manifest_path) for output in subsets],
            "selection": str(selection.manifest_path),
            "files": [str(path) for path in selection.files(".parquet") if path.name.startswith("rows-")],
            "funnel": str(chart),
        }
        print(json.dumps(outcome, indent=1, ensure_ascii=False))
        return
    for line in funnel_lines(rows_in, steps):
        print(line)
    print(f"rows:   {selection.folder}/rows-*.parquet")
    print(f"funnel: {chart}")
