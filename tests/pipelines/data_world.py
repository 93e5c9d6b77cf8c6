"""A small run of the data stages that several test modules share."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.core.manifest import DROPPED_NAME
from pipelines.download.tables import image_units
from pipelines.runner.outputs import StageOutput
from pipelines.shards import shards
from pipelines.shards.config import ShardsConfig
from pipelines.shards.reader import read_shard
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import (
    laion_row,
    run_captions,
    run_images,
    run_subset,
    write_laion,
)

BAD_PATHS = ("/404", "/html", "/truncated.jpg", "/noai", "/animated.gif", "/redirect-metadata", "/500")


def dropped_reasons(output: StageOutput) -> dict[str, str]:
    if DROPPED_NAME not in {entry.path for entry in output.manifest.files}:
        return {}
    rows = pq.read_table(output.path(DROPPED_NAME)).to_pylist()
    return {row["sample_key"]: row["reason"] for row in rows}


def write_parts(server: HostileServer, folder: Path) -> Path:
    """Write two parts of 12 good images each, with bad ones in the first and one pair in both; return their folder."""
    for part in range(2):
        rows = [
            laion_row(server.url(f"/scene/{index}"), f"scene {index}") for index in range(part * 11, part * 11 + 12)
        ]
        if part == 0:
            rows += [laion_row(server.url(path), f"bad {path}") for path in BAD_PATHS]
        write_laion(folder / f"{part:05d}.parquet", rows)
    return folder


World = dict[str, list[StageOutput]]
"""Stage -> its outputs, one for each part."""


def run_world(server: HostileServer, root: Path) -> World:
    source = write_parts(server, root / "laion")
    outputs: dict[str, list[StageOutput]] = {"subset": [], "images": [], "captions": [], "shards": []}
    for part in ("00000", "00001"):
        subset = run_subset(source, root / "out", part)
        downloaded = run_images(server, subset, root / "out")
        captions = run_captions(downloaded, root / "out")
        tars = shards.STAGE.run(ShardsConfig(), {"images": [downloaded], "captions": [captions]}, root / "out", part)
        for name, output in zip(outputs, (subset, downloaded, captions, tars), strict=True):
            outputs[name].append(output)
    return outputs


def read_rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def image_keys(images: StageOutput) -> list[str]:
    return [key for unit in image_units(images) for key in unit.read(["sample_key"])["sample_key"].to_pylist()]


def sample_rows(paths: list[Path]) -> list[tuple[str, bytes, str]]:
    return [(item.sample_key, item.image_bytes, item.caption) for path in paths for item in read_shard(path)]
