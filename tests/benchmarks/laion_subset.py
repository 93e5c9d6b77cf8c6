"""What a subset costs: the stage against one DuckDB query with the same predicates, a thread each, in turn.

python -m tests.benchmarks.laion_subset [--rows 10000000] [--rounds 3] [--duckdb-python PATH]

DuckDB is no dependency of this project: name the Python of an environment that has it. Three queries are asked, each of
them writing what it keeps as zstd parquet: the filters alone; with URLs reduced to one row each, as the stage does; and
that with an MD5 of each pair, as the stage's sample keys. The stage also lists every dropped row and digests its files.
"""

import argparse
import json
import os
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
_OURS = """
import json, resource, sys, time
import pyarrow as pa
pa.set_cpu_count(1); pa.set_io_thread_count(1)
from pathlib import Path
from pipelines import laion_index, laion_subset
from pipelines.stage_configs import LaionIndexConfig, LaionSubsetConfig
source, out = Path(sys.argv[1]), Path(sys.argv[2])
index = laion_index.STAGE.run(LaionIndexConfig.scan(source), {}, out)
config = LaionSubsetConfig(min_similarity=0.3, nsfw_allowed=("UNLIKELY",), min_side_px=256, max_aspect=3.0,
                           min_text_chars=3, max_text_chars=2000, digest_cache=str(out / "digests.json"))
from pipelines.source_files import digest_sources, find_sources
digest_sources(find_sources([str(source)]), out / "digests.json")
wall, cpu = time.perf_counter(), time.process_time()
part, = laion_index.part_names(index)
output = laion_subset.STAGE.run(config, {"index": [laion_index.entry_of(index, part)]}, out, part)
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
                  "kept": output.manifest.summary["num_kept"],
                  "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}))
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


def write_table(path: Path, num_rows: int) -> None:
    """Write a table of LAION-400M's columns, with its rough sizes, labels and lengths; one URL in fifty comes again."""
    rng = np.random.default_rng(0)
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


def main() -> None:
    """Measure each way `--rounds` times in turn; print rates, ratios and peak memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--duckdb-python", default=sys.executable)
    args = parser.parse_args()
    measured: dict[str, Any] = {"rows": args.rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = folder / "laion.parquet"
        write_table(table, args.rows)
        measured["table in MiB"] = table.stat().st_size >> 20
        ways: dict[str, list[dict[str, Any]]] = {"stage": []}
        has_duckdb = subprocess.run([args.duckdb_python, "-c", "import duckdb"], capture_output=True, check=False)
        if has_duckdb.returncode == 0:
            ways |= {query: [] for query in _QUERIES}
        else:
            print(f"{args.duckdb_python} has no duckdb: the stage is measured alone; see --duckdb-python")
        for number in range(args.rounds):
            ways["stage"].append(_measure([sys.executable, "-c", _OURS, str(table), str(folder / f"out-{number}")]))
            for query, (columns, rest) in _QUERIES.items():
                if query in ways:
                    target = folder / "duckdb.parquet"
                    sql = f"SELECT {columns} FROM read_parquet('{table}') WHERE {_WHERE}{rest}"
                    copy = f"COPY ({sql}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)"
                    ways[query].append(_measure([args.duckdb_python, "-c", _DUCKDB, copy]))
        for way, rounds in ways.items():
            for clock in ("cpu", "wall"):
                rates = [args.rows / one[clock] for one in rounds]
                measured[f"{way}: rows per {clock} second"] = round(statistics.median(rates))
            measured[f"{way}: rows kept"] = rounds[0]["kept"]
            measured[f"{way}: peak memory in MiB"] = max(one["rss"] for one in rounds)
            if way != "stage":
                ratios = [other["cpu"] / own["cpu"] for own, other in zip(ways["stage"], rounds, strict=True)]
                measured[f"stage / DuckDB ({way})"] = round(statistics.median(ratios), 2)
                measured["DuckDB"] = rounds[0]["version"]
    write_results("laion_subset", measured)


if __name__ == "__main__":
    main()
