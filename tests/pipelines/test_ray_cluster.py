"""A Ray cluster of a head and two nodes on one machine, of which one is killed in mid-job."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.ray_cluster import RAY_ENVIRONMENT
from pipelines.stage_configs import WorkersConfig
from tests.pipelines.laion_world import laion_row, write_laion
from tests.pipelines.ray_world import GatedServer, run_chain, selected, versions, wait_until, write_source

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


def test_a_node_killed_in_mid_job_costs_no_row_and_makes_none_twice(
    cluster: Any, gated: GatedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workers = WorkersConfig(ray_address=cluster.address)
    source = write_source(gated, tmp_path / "laion")
    killed = threading.Event()

    def kill_a_node() -> None:
        # Each node has room for one shard, so two pictures asked for are both nodes at work.
        wait_until(lambda: sum(path.startswith("/held/") for path in gated.requests) >= 2)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        killed.set()
        gated.gate.set()

    killer = threading.Thread(target=kill_a_node)
    killer.start()
    on_ray = run_chain(gated, source, tmp_path / "ray", workers)
    killer.join()
    assert killed.is_set()
    assert [record for record in caplog.records if "it is done again" in record.getMessage()]
    assert versions(on_ray) == versions(run_chain(gated, source, tmp_path / "here", WorkersConfig()))

    for part in range(2):
        rows = [laion_row(f"http://a.example/{number % 20}", f"text {part}") for number in range(25)]
        write_laion(tmp_path / "parts" / f"{part}.parquet", rows)
    selections = [
        selected(tmp_path / name, tmp_path / "parts", 2, limit=11, bucket_rows=9, workers=where)
        for name, where in (("ray", workers), ("here", WorkersConfig()))
    ]
    assert versions({"": selections[0]}) == versions({"": selections[1]})
