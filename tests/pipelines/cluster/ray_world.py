"""A small chain of the data stages for the tests on Ray, and a server that delays some images."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.cluster.config import WorkersConfig
from pipelines.core.manifest import damaged_files
from pipelines.dataset import dataset
from pipelines.dataset.config import DatasetConfig
from pipelines.download import images
from pipelines.laion import selection as laion_selection
from pipelines.laion.config import LaionSelectionConfig
from pipelines.runner.outputs import StageOutput
from pipelines.shards import shards
from pipelines.shards.config import ShardsConfig
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import images_config, laion_row, run_captions, run_subset, write_laion


class GatedServer(HostileServer):
    """Delays answers to paths under /held/ until its gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path.startswith("/held/"):
            self.requests[path] += 1
            while not self.gate.is_set():
                await asyncio.sleep(0.02)
            path = path.replace("/held/", "/scene/")
        await super()._answer(path, writer)


def wait_until(condition: Callable[[], Any], process: Any = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.02)


def is_intact(output: StageOutput) -> bool:
    return not damaged_files(output.folder, output.manifest, read_bytes=True)


def run_chain(
    server: HostileServer,
    source: Path,
    root: Path,
    workers: WorkersConfig,
    before_shards: Callable[[], Any] = lambda: None,
) -> dict[str, StageOutput]:
    """Run the data stages with `workers`; captions are made without a model."""
    subset = run_subset(source, root, drop_duplicate_urls=False, workers=workers)
    config = images_config(server, workers=workers)
    patient = config.fetch.model_copy(update={"read_seconds": 100.0, "total_seconds": 200.0})
    config = config.model_copy(update={"fetch": patient})
    downloaded = images.STAGE.run(config, {"subset": [subset]}, root, "00000")
    captions = run_captions(downloaded, root)
    before_shards()
    inputs = {"images": [downloaded], "captions": [captions]}
    tars = shards.STAGE.run(ShardsConfig(workers=workers), inputs, root, "00000")
    rolled_up = dataset.STAGE.run(
        DatasetConfig(near_duplicates=4, duplicate_images=True, workers=workers), {"shards": [tars]}, root
    )
    return {"subset": subset, "images": downloaded, "shards": tars, "dataset": rolled_up}


def versions(outputs: dict[str, StageOutput]) -> dict[str, str]:
    assert all(is_intact(output) for output in outputs.values())
    return {name: output.data_version for name, output in outputs.items()}


def write_source(server: HostileServer, folder: Path) -> Path:
    """36 rows in shards of 8, each with one delayed image; some images are bad, some are duplicates."""
    paths = [f"/{'held' if number % 8 == 7 else 'scene'}/{number % 30}" for number in range(36)]
    paths[4::9] = ["/404?x", "/truncated.jpg", "/noai", "/html"]
    rows = [laion_row(server.url(path), f"text {number}") for number, path in enumerate(paths)]
    return write_laion(folder / "p.parquet", rows).parent


def selected(root: Path, source: Path, num_parts: int, **config: Any) -> StageOutput:
    rules = {"drop_duplicate_urls": False}
    subsets = [run_subset(source, root, str(number), **rules) for number in range(num_parts)]
    return laion_selection.STAGE.run(LaionSelectionConfig(**config), {"subset": subsets}, root)
