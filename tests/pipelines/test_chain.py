"""The chain of data stages is reproducible."""

from pathlib import Path

from pipelines.shards import shards
from pipelines.shards.config import ShardsConfig
from tests.pipelines.data_world import World, write_parts
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import (
    run_captions,
    run_images,
    run_subset,
)


def test_another_output_root_gives_the_same_data_versions(server: HostileServer, world: World, tmp_path: Path) -> None:
    source = write_parts(server, tmp_path / "elsewhere")
    subset = run_subset(source, tmp_path / "out")
    downloaded = run_images(server, subset, tmp_path / "out", decode_workers=1, shards_in_flight=1)
    captions = run_captions(downloaded, tmp_path / "out")
    inputs = {"images": [downloaded], "captions": [captions]}
    tars = shards.STAGE.run(ShardsConfig(), inputs, tmp_path / "out", "00000")
    again = {"subset": subset, "images": downloaded, "captions": captions, "shards": tars}
    assert {name: output.data_version for name, output in again.items()} == {
        name: outputs[0].data_version for name, outputs in world.items()
    }
