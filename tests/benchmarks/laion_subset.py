"""What a subset costs: the stage against one DuckDB query with the same predicates, a thread each, in turn.

python -m tests.benchmarks.laion_subset [--rows 10000000] [--rounds 3] [--duckdb-python PATH]

DuckDB is no dependency of this project: name the Python of an environment that has it. Both sides run on one and the
same core; neither side's imports count. `_SIDES` says what each of them does. Then the stage runs on smaller tables,
and `laion_selection` over four of them, for slopes from which 400 million rows are estimated.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tests.benchmarks.record import write_results

_GROUP_ROWS = 262_144
_WORDS = (
    "the", "red", "cat", "Vintage", "photo", "of", "a", "wooden", "table", "with", "flowers", "2019", "sale", "blue",
    "house", "Stock", "vector", "in", "London", "woman", "wearing", "dress", "for", "kids", "by", "art", "print",
    "poster", "black", "and",
)  # fmt: skip
_SIDES = {
    "stage": "laion_subset as it is run: filters, one row per URL (the first), a 128-bit key of each pair, each "
    "dropped row listed with its key and reason, files digested and synced to disk; zstd parquet",
    "filters": "COPY (SELECT ... WHERE the same filters) TO zstd parquet; keeps what the stage drops as duplicates",
    "filters, URLs once": "as before, one row per URL (any): the stage's predicates",
    "filters, URLs once, keys": "as before, with an MD5 of each pair for the stage's key",
}
_SAME_PREDICATES = "filters, URLs once"
_TABLES = 4
_SMALL_ROWS = 20_000
_SET_ROWS, _SET_PARTS = 400_000_000, 32
_NODE_CORES, _NODES = 8, 4
_BEGIN = """
import json, os, resource, sys, time
import pyarrow as pa
pa.set_cpu_count(1); pa.set_io_thread_count(1)
from pathlib import Path
import pipelines.laion.rules, pipelines.laion.duplicates
from pipelines.laion import index as laion_index
from pipelines.laion import selection as laion_selection
from pipelines.laion import subset as laion_subset
from pipelines.laion.sources import digest_sources, find_sources
from pipelines.laion.config import LaionIndexConfig, LaionSelectionConfig, LaionSubsetConfig
from pipelines.laion.sources import scan_index
from pipelines.cluster.config import WorkersConfig
pa.array([""])  # and with it pandas
source, out = Path(sys.argv[1]), Path(sys.argv[2])
def started():
    return time.perf_counter(), time.process_time()
def report(since, **more):
    now = started()
    print(json.dumps({"wall": now[0] - since[0], "cpu": now[1] - since[1],
                      "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} | more))
def index_of(source, out):
    index = laion_index.STAGE.run(scan_index(source), {}, out)
    digest_sources(find_sources([str(source)]), out / "digests.json")
    return index
def subset(index, out, part, **more):
    config = LaionSubsetConfig(min_similarity=0.3, nsfw_allowed=("UNLIKELY",), min_side_px=256, max_aspect=3.0,
                               min_text_chars=3, max_text_chars=2000, digest_cache=str(out / "digests.json"), **more)
    return laion_subset.STAGE.run(config, {"index": [laion_index.entry_of(index, part)]}, out, part)
"""
_OURS = f"""{_BEGIN}
index = index_of(source, out)
since = started()
report(since, kept=subset(index, out, sys.argv[3]).manifest.summary["num_kept"])
"""
_INDEX = f"""{_BEGIN}
since = started()
index_of(source, out)
report(since)
"""
_SELECTION = f"""{_BEGIN}
index = index_of(source, out)
subsets = [subset(index, out, part) for part in laion_index.part_names(index)]  # finished: nothing is computed here
since = started()
output = laion_selection.STAGE.run(LaionSelectionConfig(), {{"subset": subsets}}, out)
report(since, rows=output.manifest.summary["num_rows"], kept=output.manifest.summary["num_kept"])
"""
_RAY = f"""{_BEGIN}
index = index_of(source, out)
first, *others = laion_index.part_names(index)
since = started()
for part in others:
    subset(index, out, part)
here = (started()[0] - since[0]) / len(others)
on_ray, out = WorkersConfig(ray_address="local"), out / "ray"
index, since = index_of(source, out), started()
subset(index, out, first, workers=on_ray)
start, since = started()[0] - since[0], started()
for part in others:
    subset(index, out, part, workers=on_ray)
report(since, start=start, more=(started()[0] - since[0]) / len(others) - here)
"""
_DUCKDB = """
import json, resource, sys, time
import duckdb
connection = duckdb.connect()
connection.execute("SET threads = 1; SET enable_progress_bar = false")
wall, cpu = time.perf_counter(), time.process_time()
(kept,), = connection.execute(sys.argv[1]).fetchall()
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "kept": kept,
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "version": duckdb.__version__}))
"""
_WHERE = r"""
    regexp_matches(URL, '^(?i)https?://[^/?#\s]') AND length(trim(TEXT)) > 0 AND length(TEXT) BETWEEN 3 AND 2000
    AND similarity >= 0.3 AND upper(NSFW) IN ('UNLIKELY') AND least(WIDTH, HEIGHT) >= 256
    AND greatest(WIDTH, HEIGHT) / least(WIDTH, HEIGHT) <= 3
"""
_ONE_PER_URL = " QUALIFY row_number() OVER (PARTITION BY URL) = 1"
_COLUMNS = "URL, TEXT, WIDTH, HEIGHT, similarity, NSFW, LICENSE"
_QUERIES = {
    "filters": (_COLUMNS, ""),
    "filters, URLs once": (_COLUMNS, _ONE_PER_URL),
    "filters, URLs once, keys": (f"{_COLUMNS}, md5(URL || TEXT) AS sample_key", _ONE_PER_URL),
}


def write_table(path: Path, num_rows: int, seed: int = 0) -> None:
    """Write a table of LAION-400M's columns, with its rough sizes, labels and lengths; one URL in fifty comes again,
    in this table and in those of other seeds."""
    rng = np.random.default_rng(seed)
    texts = pa.array([" ".join(rng.choice(_WORDS, rng.integers(3, 18))) for _ in range(50_000)])
    hosts = pa.array([f"cdn{number}.shop-{number * 7919 % 1000}.example.com" for number in range(5000)])
    schema = pa.schema(
        {"SAMPLE_ID": pa.int64(), "URL": pa.string(), "TEXT": pa.string(), "HEIGHT": pa.int32(), "WIDTH": pa.int32(),
         "LICENSE": pa.string(), "NSFW": pa.string(), "similarity": pa.float64()}
    )  # fmt: skip
    with pq.ParquetWriter(path, schema, compression="snappy") as writer:
        for start in range(0, num_rows, _GROUP_ROWS):
            count = min(_GROUP_ROWS, num_rows - start)
            ids = rng.integers(0, 2**63, count)
            again = rng.random(count) < 0.02
            ids = np.where(again, rng.integers(0, num_rows // 20 + 1, count), ids)
            schemes = rng.choice(["https:/", "http:/", "ftp:/"], count, p=[0.6, 0.399, 0.001])
            digits = pa.array(np.frombuffer(ids.astype("<u8").tobytes().hex().encode(), "S16")).cast(pa.string())
            folder, file = pa.scalar("wp-content/uploads/2019"), pa.scalar("image.jpg")
            width = np.clip(rng.lognormal(6.2, 0.55, count), 20, 6000).astype(np.int32)
            height = np.clip(width * np.exp(rng.normal(0, 0.35, count)), 20, 6000).astype(np.int32)
            columns = [
                pa.array(ids),
                pc.binary_join_element_wise(
                    pa.array(schemes), hosts.take(pa.array(ids % 5000)), folder, digits, file, "/"
                ),
                pc.binary_join_element_wise(
                    texts.take(pa.array(rng.integers(0, 50_000, count))),
                    pc.cast(pa.array(ids % 100_000), pa.string()),
                    " ",
                ),
                pa.array(height),
                pa.array(width),
                pa.array(rng.choice(["?", "https://creativecommons.org/licenses/by/2.0/"], count, p=[0.99, 0.01])),
                pa.array(rng.choice(["UNLIKELY", "UNSURE", "NSFW"], count, p=[0.94, 0.04, 0.02])),
                pa.array(rng.gamma(2, 0.02, count) + 0.3, mask=rng.random(count) < 0.001),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=_GROUP_ROWS)


def _measure(command: list[str]) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _ours(script: str, source: Path, out: Path, *part: str) -> dict[str, Any]:
    return _measure([sys.executable, "-c", script, str(source), str(out), *part])


def _compare(folder: Path, table: Path, num_rounds: int, duckdb_python: str) -> dict[str, list[dict[str, Any]]]:
    """Return per way what each of its rounds took: all ways in turn, round by round."""
    ways: dict[str, list[dict[str, Any]]] = {"stage": []}
    has_duckdb = subprocess.run([duckdb_python, "-c", "import duckdb"], capture_output=True, check=False)
    if has_duckdb.returncode == 0:
        ways |= {query: [] for query in _QUERIES}
    else:
        print(f"{duckdb_python} has no duckdb: the stage is measured alone; see --duckdb-python")
    for number in range(num_rounds):
        out = folder / f"out-{number}"
        ways["stage"].append(_ours(_OURS, table, out, table.stem))
        shutil.rmtree(out)
        for query, (columns, rest) in _QUERIES.items():
            if query in ways:
                target = folder / "duckdb.parquet"
                sql = f"SELECT {columns} FROM read_parquet('{table}') WHERE {_WHERE}{rest}"
                copy = f"COPY ({sql}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)"
                ways[query].append(_measure([duckdb_python, "-c", _DUCKDB, copy]))
    return ways


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return (slope, value at 0) of the line through points (rows, value)."""
    slope, fixed = np.polyfit(*zip(*points, strict=True), 1)
    return float(slope), float(fixed)


def _extrapolate(folder: Path, num_rows: int, whole: dict[str, Any]) -> dict[str, Any]:
    """Run the stages on tables of other sizes; return slopes in CPU seconds and bytes, and what they come to."""
    sources = {count: folder / f"{_TABLES}-tables-of-{count}" for count in (_SMALL_ROWS, num_rows // _TABLES)}
    subsets, indexes, selections = [(num_rows, whole)], [], []
    for count, source in sources.items():
        source.mkdir()
        for number in range(_TABLES):
            write_table(source / f"t{number}.parquet", count, seed=1 + number)
        out = folder / f"out-{count}"
        indexes.append((_TABLES * count, _ours(_INDEX, source, out)))
        subsets += [(count, _ours(_OURS, source, out, f"t{number}")) for number in range(_TABLES)]
        selected = _ours(_SELECTION, source, out)
        selections.append((selected["rows"], selected))
        shutil.rmtree(out)
    ray = _ours(_RAY, sources[_SMALL_ROWS], folder / "out-ray")

    part_rows = _SET_ROWS / _SET_PARTS
    second, start = _line([(count, one["cpu"]) for count, one in subsets])
    mib, least_mib = _line([(count, one["rss"]) for count, one in subsets])
    part_seconds, part_mib = start + second * part_rows, least_mib + mib * part_rows
    index_second, _ = _line([(count, one["cpu"]) for count, one in indexes])
    selection_second, _ = _line([(count, one["cpu"]) for count, one in selections])
    index_seconds = index_second * _SET_ROWS
    selection_seconds = selection_second * _SET_ROWS * whole["kept"] / num_rows
    selection_mib = max(one["rss"] for _, one in selections)
    cores = _NODES * _NODE_CORES
    num_tasks = 3 * _SET_PARTS + 4 * cores  # subsets; the selection's parts, twice, and its buckets
    on_ray = ray["start"] + index_seconds + -(-_SET_PARTS // cores) * part_seconds + selection_seconds / cores
    return {
        "subset: CPU seconds per million rows": round(second * 1e6, 3),
        "subset: CPU seconds of a part, fixed": round(start, 2),
        "subset: MiB per million rows of a part": round(mib * 1e6, 1),
        "subset: MiB, fixed": round(least_mib),
        "index (digests): CPU seconds per million rows": round(index_second * 1e6, 3),
        "selection: CPU seconds per million rows kept": round(selection_second * 1e6, 3),
        "selection: peak memory in MiB": selection_mib,
        "Ray: seconds for its start and the first part": round(ray["start"], 1),
        "Ray: seconds more for a part": round(ray["more"], 3),
        f"estimate, {_SET_ROWS // 10**6} M rows in {_SET_PARTS} parts": {
            "rests on": "the slopes above; a core for each process as fast as this one, and storage that keeps up; on "
            "Ray each task one after the other costs what a part cost more there, and the selection spreads evenly",
            "a part: minutes": round(part_seconds / 60, 2),
            "a part: peak memory in MiB": round(part_mib),
            "one process: minutes": round((index_seconds + _SET_PARTS * part_seconds + selection_seconds) / 60, 1),
            "one process: peak memory in MiB": round(max(part_mib, selection_mib)),
            f"one machine of {_NODE_CORES} cores: minutes": round(
                (index_seconds + -(-_SET_PARTS // _NODE_CORES) * part_seconds + selection_seconds) / 60, 1
            ),
            f"one machine of {_NODE_CORES} cores: memory in GiB": round(_NODE_CORES * part_mib / 1024, 1),
            f"Ray, {_NODES} nodes of {_NODE_CORES} cores: minutes": round((on_ray + num_tasks * ray["more"]) / 60, 1),
            f"Ray, {_NODES} nodes of {_NODE_CORES} cores: memory of a node in GiB, without Ray's own": round(
                _NODE_CORES * part_mib / 1024, 1
            ),
        },
    }


def main() -> None:
    """Measure each way `--rounds` times in turn; print rates, ratios, peak memory, slopes and estimates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duckdb-python", default=sys.executable)
    args = parser.parse_args()
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # for every process that is started from here
    measured: dict[str, Any] = {"rows": args.rows, "cores used": f"1 (number {core}), by each side", "sides": _SIDES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = folder / "laion.parquet"
        write_table(table, args.rows)
        measured["table in MiB"] = table.stat().st_size >> 20
        ways = _compare(folder, table, args.rounds, args.duckdb_python)
        for way, rounds in ways.items():
            for clock in ("cpu", "wall"):
                rates = [args.rows / one[clock] for one in rounds]
                measured[f"{way}: rows per {clock} second"] = round(statistics.median(rates))
            measured[f"{way}: rows kept"] = rounds[0]["kept"]
            measured[f"{way}: peak memory in MiB"] = max(one["rss"] for one in rounds)
            if way != "stage":
                measured["DuckDB"] = rounds[0]["version"]
                for clock in ("cpu", "wall"):
                    ratios = [other[clock] / own[clock] for own, other in zip(ways["stage"], rounds, strict=True)]
                    measured[f"stage / DuckDB ({way}), {clock}"] = round(statistics.median(ratios), 2)
            if way == _SAME_PREDICATES:
                measured["at least as fast as the same predicates in DuckDB"] = (
                    measured[f"stage / DuckDB ({way}), cpu"] >= 1
                )
        if _SAME_PREDICATES in ways and ways[_SAME_PREDICATES][0]["kept"] != ways["stage"][0]["kept"]:
            raise SystemExit("the stage and the query of the same predicates keep different numbers of rows")
        table.unlink()
        rounds = ways["stage"]
        whole = sorted(rounds, key=lambda one: one["cpu"])[len(rounds) // 2]
        measured |= _extrapolate(folder, args.rows, whole)
    write_results("laion_subset", measured)


if __name__ == "__main__":
    main()
