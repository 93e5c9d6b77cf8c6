"""Output roots in an object store, against a real S3 server."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, damaged_files
from pipelines.dataset.config import DatasetConfig
from pipelines.dataset.order import Share
from pipelines.dataset.samples import ShardSamples
from pipelines.dataset.stream import ShardStream
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from pipelines.shards import shards
from pipelines.shards.config import ShardsConfig
from pipelines.storage.config import StoreConfig
from pipelines.storage.mirror import OutputStore, bind, location_of, store_of, working_folder
from pipelines.storage.store_errors import StorageError
from tests.pipelines.dataset.test_stream import NUM_SAMPLES, write_shards
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import laion_row, run_captions, run_images, run_subset, write_laion
from tests.pipelines.runner.toy_stage import ToyConfig
from tests.pipelines.storage.store_stage import STAGE, mirrored
from tests.plain_stage import plain_stage
from tests.s3_server import TRANSFER, Fault, FaultyProxy, S3Server, unfinished_uploads

REPOSITORY = Path(__file__).parents[3]
FOREVER = 1_000_000


def store_at(root: Path) -> OutputStore:
    store = store_of(root)
    assert store is not None
    return store


def counting(tmp_path: Path) -> ToyConfig:
    return ToyConfig(count_file=str(tmp_path / "count"))


def times_computed(tmp_path: Path) -> int:
    return len((tmp_path / "count").read_text())


@pytest.mark.slow
def test_another_machine_finds_everything_and_fetches_on_demand(s3: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    here, there = mirrored(tmp_path / "here", bucket), mirrored(tmp_path / "there", bucket)
    made = STAGE.run(counting(tmp_path), {}, here)
    puts = [line.split()[1].rpartition("/")[2] for line in s3.seen if line.startswith("PUT ") and "part" not in line]
    assert puts[-1] == MANIFEST_NAME, "the manifest comes last"
    assert made.is_here

    found = STAGE.run(counting(tmp_path), {}, there)
    assert times_computed(tmp_path) == 1
    assert found.data_version == made.data_version
    assert not found.is_here
    assert sorted(path.name for path in found.folder.iterdir()) == [MANIFEST_NAME]
    found.path("first.index.json", alone=True)
    assert sorted(path.name for path in found.folder.iterdir()) == ["first.index.json", MANIFEST_NAME]
    (found.folder / "first.index.json").unlink()
    assert found.path("first.bin").read_bytes() == b"first"
    assert (found.folder / "first.index.json").exists(), "a sidecar is fetched too"
    assert not (found.folder / "large.bin").exists()
    assert [path.name for path in found.files(".bin")] == ["first.bin", "large.bin"]
    assert found.is_here
    assert damaged_files(found.folder, found.manifest, read_bytes=True) == []
    s3.seen.clear()
    assert STAGE.find_finished(counting(tmp_path), {}, there) is not None
    assert s3.seen == [], "no request for an output recorded as stored"


@pytest.mark.slow
def test_half_an_output_is_never_found(s3: FaultyProxy, s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    here, there = (mirrored(tmp_path / name, bucket, attempts=2) for name in ("here", "there"))
    for where in ("PUT .*first.bin", "PUT .*partNumber=3", "POST .*uploadId", "PUT .*fingerprints", "PUT .*manifest"):
        s3.faults = [Fault(where, "busy", FOREVER)]
        with pytest.raises(StorageError, match="503 SlowDown"):
            STAGE.run(counting(tmp_path), {}, here)
        s3.faults = []
        for root in (here, there):
            assert STAGE.find_finished(ToyConfig(), {}, root) is None
        assert unfinished_uploads(s3_server, bucket) == []
    s3.seen.clear()
    output = STAGE.run(counting(tmp_path), {}, here)
    assert times_computed(tmp_path) == 1, "a finished output is uploaded, not computed again"
    assert not any("large.bin" in line and line.startswith("PUT") for line in s3.seen), "it had been uploaded"
    found = STAGE.find_finished(ToyConfig(), {}, there)
    assert found is not None and found.data_version == output.data_version
    assert store_at(there).damaged(found.manifest) == []


@pytest.mark.slow
def test_a_machine_killed_during_an_upload_resumes(s3: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    here, there = mirrored(tmp_path / "here", bucket), mirrored(tmp_path / "there", bucket)
    s3.faults = [Fault("PUT .*partNumber=3", "stall", FOREVER)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.pipelines.storage.store_stage", str(here), bucket, str(tmp_path / "count")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    deadline = time.monotonic() + 60
    while not any("partNumber=3" in line for line in s3.seen):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    s3.faults = []
    assert STAGE.find_finished(ToyConfig(), {}, there) is None

    output = STAGE.run(counting(tmp_path), {}, here)
    assert times_computed(tmp_path) == 1
    found = STAGE.run(counting(tmp_path), {}, there)
    assert times_computed(tmp_path) == 1
    assert store_at(there).damaged(found.manifest) == [] and found.data_version == output.data_version


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["flip", "shorten", "remove", "alter the manifest"])
@pytest.mark.parametrize("copy_here", [True, False])
def test_damage_in_the_store_is_reported_never_fetched_and_repaired(
    s3: FaultyProxy, s3_server: S3Server, bucket: str, tmp_path: Path, harm: str, copy_here: bool
) -> None:
    here, there = mirrored(tmp_path / "here", bucket), mirrored(tmp_path / "there", bucket)
    output = STAGE.run(counting(tmp_path), {}, here)
    folder = s3_server.folder / bucket / "team" / "runs" / "stored" / output.data_version
    name = MANIFEST_NAME if harm == "alter the manifest" else "first.bin"
    data = bytearray((folder / name).read_bytes())
    if harm == "remove":
        (folder / name).unlink()
    else:
        data[1] ^= 1
        (folder / name).write_bytes(data[:-1] if harm == "shorten" else data)
    s3_server.wait_for_changes()
    (problem,) = store_at(here).damaged(output.manifest)
    assert problem.startswith(f"s3://{bucket}/team/runs/stored/{output.data_version}/{name}: ")

    found = STAGE.find_finished(ToyConfig(), {}, there)
    if harm == "alter the manifest":
        assert found is None
    else:
        assert found is not None
        with pytest.raises(StorageError, match=r"first.bin: .*fix: throughline run --set verify=digest"):
            found.path("first.bin")
        assert not (found.folder / "first.bin").exists()

    if not copy_here:
        shutil.rmtree(output.folder)
    repaired = STAGE.run(counting(tmp_path), {}, here, verify="digest")
    assert times_computed(tmp_path) == (1 if copy_here else 2)
    assert repaired.data_version == output.data_version
    assert store_at(here).damaged(repaired.manifest) == []


@pytest.mark.slow
def test_a_damaged_copy_is_fetched_again(s3: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    root = mirrored(tmp_path / "here", bucket)
    output = STAGE.run(counting(tmp_path), {}, root)
    (output.folder / "first.bin").write_bytes(b"fir")
    assert output.path("first.bin").read_bytes() == b"first", "a truncated copy is noticed at once"
    (output.folder / "first.bin").write_bytes(b"FIRST")
    assert len(output.damaged(read_bytes=True)) == 1
    again = STAGE.run(counting(tmp_path), {}, root, verify="digest")
    assert again.path("first.bin").read_bytes() == b"first"
    assert times_computed(tmp_path) == 1
    shutil.rmtree(root / "stored")
    assert STAGE.run(counting(tmp_path), {}, root).path("first.bin").read_bytes() == b"first"
    assert times_computed(tmp_path) == 1, "the folder is a cache"


@pytest.mark.slow
def test_of_two_machines_with_different_bytes_the_first_wins(s3: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    """As when a model on another GPU gives different bytes for the same fingerprint."""
    roots = [mirrored(tmp_path / name, bucket) for name in ("one", "two")]

    def late(run: StageRun[ToyConfig]) -> None:
        with run.unit("files") as unit:
            unit.write("first.bin", b"other bytes")
        STAGE.run(ToyConfig(), {}, roots[0])  # the first machine finishes while this one computes

    second = plain_stage(name="stored", code_version="1", config_type=ToyConfig, produce=late).run(
        ToyConfig(), {}, roots[1]
    )
    first = STAGE.find_finished(ToyConfig(), {}, roots[0])
    assert first is not None and second.data_version == first.data_version
    assert second.path("first.bin").read_bytes() == b"first"
    assert STAGE.run(ToyConfig(), {}, mirrored(tmp_path / "three", bucket)).data_version == first.data_version


@pytest.mark.slow
def test_the_data_stages_run_on_an_object_store(
    s3: FaultyProxy, bucket: str, server: HostileServer, tmp_path: Path
) -> None:
    rows = [laion_row(server.url(f"/scene/{index}"), f"scene {index}") for index in range(12)]
    source = write_laion(tmp_path / "laion" / "part.parquet", rows).parent

    def chain(root: Path) -> list[StageOutput]:
        from pipelines.dataset import dataset

        subset = run_subset(source, root)
        images = run_images(server, subset, root)
        captions = run_captions(images, root)
        tars = shards.STAGE.run(ShardsConfig(), {"images": [images], "captions": [captions]}, root, "00000")
        return [subset, images, captions, tars, dataset.STAGE.run(DatasetConfig(), {"shards": [tars]}, root)]

    local = chain(tmp_path / "folder")
    first = chain(mirrored(tmp_path / "here", bucket))
    second = chain(mirrored(tmp_path / "there", bucket))
    versions = [output.data_version for output in local]
    assert [output.data_version for output in first] == versions
    assert [output.data_version for output in second] == versions
    assert not second[1].is_here
    samples = ShardSamples.of_dataset(second[4], [second[3]], "train")
    assert [sample.caption for sample in samples] == [
        sample.caption for sample in ShardSamples.of_dataset(local[4], [local[3]], "train")
    ]


def _write_tars(run: StageRun[ToyConfig]) -> None:
    run.scratch.joinpath("tars").mkdir(exist_ok=True)
    with run.unit("tars") as unit:
        for path in write_shards(run.scratch / "tars"):
            unit.adopt(path, path.name)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_fetches_a_shard_when_it_opens_it(
    s3: FaultyProxy, bucket: str, tmp_path: Path, num_workers: int
) -> None:
    stage = plain_stage(name="tars", code_version="1", config_type=ToyConfig, produce=_write_tars)
    here, there = mirrored(tmp_path / "here", bucket), mirrored(tmp_path / "there", bucket)
    tars = stage.run(ToyConfig(), {}, here, "00000")
    names = [f"shard-{index // 10:05d}.tar" for index in range(NUM_SAMPLES)]
    rows = np.arange(NUM_SAMPLES, dtype=np.int32) % 10

    def fetched() -> list[str]:
        return [line.split()[1].rpartition("/")[2] for line in s3.seen if line.startswith("GET ") and ".tar" in line]

    found = StageOutput.load(there / "tars" / tars.data_version / MANIFEST_NAME)
    samples = ShardSamples.of_places([found], ["00000"] * NUM_SAMPLES, names, rows, "version")
    assert fetched() == []
    assert (samples[15].caption, samples[10].caption) == ("15", "10")
    assert fetched() == ["shard-00001.tar"]
    assert [path.name for path in found.folder.glob("*.tar")] == ["shard-00001.tar"]

    stream = ShardStream(samples, Share(batch_size=4, stop=NUM_SAMPLES), seed=7, decode=lambda sample: sample.caption)
    captions = [text for batch in DataLoader(stream, batch_size=None, num_workers=num_workers) for text in batch.items]
    assert captions == [str(index) for index in stream.order.take(0, NUM_SAMPLES).tolist()]
    assert sorted(fetched()) == ["shard-00000.tar", "shard-00001.tar", "shard-00002.tar"]


def test_a_working_folder_of_an_earlier_version_stays_readable(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    root.mkdir()
    (root / "store.json").write_text(
        """{
 "transfer": {
  "attempts": 6,
  "connect_seconds": 10.0,
  "part_bytes": 16777216,
  "read_seconds": 60.0,
  "stale_upload_hours": 24.0,
  "threads": 8
 },
 "url": "s3://bucket/team/runs"
}
"""
    )
    assert store_at(root).config == StoreConfig(url="s3://bucket/team/runs")
    assert working_folder(tmp_path, store_at(root).config) == tmp_path / "stores" / "bucket-team-runs-5f9ce66b"


def test_a_folder_belongs_to_one_store(tmp_path: Path) -> None:
    root = tmp_path / "outputs"
    one, other = (StoreConfig(url=f"s3://{name}/x") for name in ("one", "other"))
    assert store_of(root) is None
    assert location_of(root) == str(root)
    bind(root, one)
    assert location_of(root) == f"s3://one/x (working folder {root})"
    bind(root, one.model_copy(update={"transfer": TRANSFER}))
    assert store_at(root).config.transfer == TRANSFER
    with pytest.raises(ThroughlineError, match="is the working folder of s3://one/x, not of s3://other/x"):
        bind(root, other)
    local = tmp_path / "local"
    STAGE.run(ToyConfig(), {}, local)
    with pytest.raises(ThroughlineError, match="holds outputs of its own"):
        bind(local, one)
