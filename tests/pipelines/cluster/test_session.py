"""A Ray cluster of a head and two nodes on one machine; both nodes are killed while they work."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.config import WorkersConfig
from pipelines.cluster.session import RAY_ENVIRONMENT
from pipelines.runner.units import StageRun
from pipelines.shards import shards
from pipelines.shards.config import ShardsConfig
from tests.pipelines.cluster.ray_world import GatedServer, run_chain, selected, versions, wait_until, write_source
from tests.pipelines.laion.laion_world import laion_row, write_laion

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    from recaption.ray_pool import close_pools

    close_pools()
    ray.shutdown()
    os.environ.update(RAY_ENVIRONMENT)
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        started.add_node(num_cpus=1, object_store_memory=80 << 20)
    started.wait_for_nodes()
    yield started
    ray.shutdown()
    started.shutdown()


def _hold_shards(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make each shard create a file in `folder` when it begins, and then wait for the file ``gate``."""
    make = shards._make_unit

    def held(run: StageRun[ShardsConfig], name: str, item: None) -> None:
        import time

        (folder / f"begun-{run.scratch.parent.name}").touch()  # unique to this attempt
        while not (folder / "gate").exists():
            time.sleep(0.02)
        make(run, name, item)

    folder.mkdir()
    monkeypatch.setattr(shards, "_make_unit", held)


def test_killing_nodes_mid_job_loses_and_duplicates_no_row(
    cluster: Any, gated: GatedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = WorkersConfig(ray_address=cluster.address)
    source = write_source(gated, tmp_path / "laion")
    held = tmp_path / "held"
    killed: list[str] = []

    def kill_nodes() -> None:
        first, second = cluster.worker_nodes
        try:
            # Each node has room for one shard, so two requested images mean that both nodes are working.
            wait_until(lambda: sum(path.startswith("/held/") for path in gated.requests) >= 2)
            cluster.remove_node(first, allow_graceful=False)
            killed.append("images")
            gated.gate.set()
            wait_until(lambda: len(list(held.glob("begun-*"))) >= 2)
            cluster.remove_node(second, allow_graceful=False)  # the node added later does the rest
            killed.append("shards")
        finally:
            gated.gate.set()
            (held / "gate").touch()

    def add_a_node() -> None:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    with monkeypatch.context() as patched:
        _hold_shards(patched, held)
        killer = threading.Thread(target=kill_nodes)
        killer.start()
        on_ray = run_chain(gated, source, tmp_path / "ray", workers, before_shards=add_a_node)
        killer.join()
    assert killed == ["images", "shards"]
    retries = [record.getMessage() for record in caplog.records if "retrying" in record.getMessage()]
    assert {message.split()[0] for message in retries} == {"images", "shards"}
    assert versions(on_ray) == versions(run_chain(gated, source, tmp_path / "here", WorkersConfig()))

    for part in range(2):
        rows = [laion_row(f"http://a.example/{number % 20}", f"text {part}") for number in range(25)]
        write_laion(tmp_path / "parts" / f"{part}.parquet", rows)
    selections = [
        selected(tmp_path / name, tmp_path / "parts", 2, limit=11, bucket_rows=9, workers=where)
        for name, where in (("ray", workers), ("here", WorkersConfig()))
    ]
    assert versions({"": selections[0]}) == versions({"": selections[1]})
