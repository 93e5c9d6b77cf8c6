"""Uploads to and downloads from a local S3 server (rclone), optionally in turn with an earlier revision's client.

python -m tests.benchmarks.object_store [--rounds 4] [--before REVISION]

Seconds, wall and CPU of this process, medians over the rounds, for 200 files of 1 MB and one file of 300 MB, digests
and fsync included. `--before` takes ``pipelines/storage/s3.py`` and ``s3_errors.py``, the client over boto3, from a
revision of this repository that has them. The server shares the machine's cores.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks.record import write_results
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

_SIZES = {"200 files of 1 MB": (200, 1_000_000), "1 file of 300 MB": (1, 300_000_000)}
_THREADS = 8


def _earlier_client(revision: str, folder: Path) -> Any:
    package = folder / "earlier_client"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("s3", "s3_errors"):
        source = subprocess.run(
            ["git", "show", f"{revision}:pipelines/storage/{name}.py"], check=True, capture_output=True, text=True
        ).stdout
        (package / f"{name}.py").write_text(source.replace("pipelines.storage.s3_errors", "earlier_client.s3_errors"))
    sys.path.insert(0, str(folder))
    return importlib.import_module("earlier_client.s3")


def _current_client() -> Any:
    from pipelines.storage import config, object_store

    class Client:
        ObjectFile, ObjectStore, StoreConfig = object_store.ObjectFile, object_store.ObjectStore, config.StoreConfig

    return Client


def _write_files(folder: Path) -> dict[str, list[tuple[str, Path, str, int]]]:
    files: dict[str, list[tuple[str, Path, str, int]]] = {}
    for label, (count, num_bytes) in _SIZES.items():
        files[label] = []
        for number in range(count):
            data = os.urandom(num_bytes)
            path = folder / f"{num_bytes}-{number}"
            path.write_bytes(data)
            files[label].append((path.name, path, hashlib.sha256(data).hexdigest(), num_bytes))
    return files


def _measure(client: Any, bucket: str, files: list[tuple[str, Path, str, int]], folder: Path) -> dict[str, Any]:
    store = client.ObjectStore(client.StoreConfig(url=f"s3://{bucket}"))
    store.check()
    copies = [client.ObjectFile(key, folder / "copies" / key, sha256, size) for key, _, sha256, size in files]
    times = {}
    start, cpu = time.perf_counter(), time.process_time()
    store.upload([client.ObjectFile(*file) for file in files])
    times["upload"] = (time.perf_counter() - start, time.process_time() - cpu)
    start, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(store.download, copies))
    times["download"] = (time.perf_counter() - start, time.process_time() - cpu)
    shutil.rmtree(folder / "copies")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--before", metavar="REVISION")
    arguments = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    seconds: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "server").mkdir()
        clients = {"obstore": _current_client()}
        if arguments.before:
            clients["before"] = _earlier_client(arguments.before, folder)
        files = _write_files(folder)
        with S3Server(folder / "server") as server:
            os.environ["AWS_ENDPOINT_URL_S3"] = server.endpoint
            for number in range(arguments.rounds):
                for client in sorted(clients, reverse=bool(number % 2)):
                    bucket = server.new_bucket()
                    for label, items in files.items():
                        for direction, pair in _measure(clients[client], bucket, items, folder).items():
                            seconds[label, direction, client].append(pair)
                    for path in (server.folder / bucket).iterdir():
                        path.unlink()
    measured: dict[str, Any] = {"rounds": arguments.rounds}
    for (label, direction, client), pairs in seconds.items():
        for kind, values in zip(("wall", "CPU"), zip(*pairs, strict=True), strict=True):
            measured[f"{label}, {direction}, {client}, {kind} s"] = round(statistics.median(values), 2)
    write_results("object_store", measured)


if __name__ == "__main__":
    main()
