"""The stage `shards`: bytes, limits, extra members, and captions that are unusable."""

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError
from webdataset.compat import WebDataset

from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import sample_key
from pipelines.dataset import dataset
from pipelines.dataset.config import DatasetConfig
from pipelines.dataset.dataset import SAMPLES_FILE
from pipelines.download.tables import image_units
from pipelines.runner.outputs import StageOutput
from pipelines.shards import shards
from pipelines.shards.config import ExtraMember, ShardsConfig
from pipelines.shards.lint import lint_folder
from pipelines.shards.reader import Shard, read_shard
from tests.pipelines.data_world import World, dropped_reasons, image_keys, read_rows, sample_rows
from tests.pipelines.laion.laion_world import (
    run_captions,
)


def test_plain_webdataset_reads_the_shards(world: World) -> None:
    paths = [str(path) for output in world["shards"] for path in output.files(".tar")]
    samples = list(WebDataset(paths, shardshuffle=False).decode("pil"))  # pyright: ignore[reportArgumentType]
    expected = [sample for path in paths for sample in read_shard(Path(path))]
    assert [item["__key__"] for item in samples] == [item.sample_key for item in expected]
    for item, sample in zip(samples, expected, strict=True):
        assert item["txt"] == sample.caption == f"A caption, čaj ☕, of {sample.sample_key}."
        assert item["json"] == sample.provenance
        assert item["json"]["image_sha256"] == hashlib.sha256(sample.image_bytes).hexdigest()
        assert item["json"]["caption_sha256"] == hashlib.sha256(sample.caption.encode()).hexdigest()
        assert item["jpg"].size == (256, 256)
        assert item["json"]["captioner"] == {"id": "test/captioner", "revision": "sha256:1"}
        assert sample_key(item["json"]["url"], item["json"]["alt_text"]) == sample.sample_key


def test_shards_contain_the_bytes_of_the_images_stage_in_key_order(world: World) -> None:
    for downloaded, tars in zip(world["images"], world["shards"], strict=True):
        images = {
            row["sample_key"]: row["image"]
            for unit in image_units(downloaded)
            for row in unit.read(["sample_key", "image"]).to_pylist()
        }
        for path in tars.files(".tar"):
            samples = list(read_shard(path))
            assert [sample.sample_key for sample in samples] == sorted(sample.sample_key for sample in samples)
            assert all(sample.image_bytes == images.pop(sample.sample_key) for sample in samples)
        assert not images


@pytest.mark.parametrize("bound", [{"max_samples_per_shard": 3}, {"max_shard_bytes": 100_000}])
def test_limits_split_a_unit_into_shards_with_the_same_samples_in_the_same_order(
    world: World, tmp_path: Path, bound: dict[str, int]
) -> None:
    inputs = {"images": world["images"][:1], "captions": world["captions"][:1]}
    versions = {
        shards.STAGE.run(ShardsConfig(**bound), inputs, tmp_path / f"{number}", "00000").data_version
        for number in range(2)
    }
    (version,) = versions
    tars = StageOutput.load(tmp_path / "0" / "shards" / version / "manifest.json")
    paths = tars.files(".tar")
    names = [path.name for path in paths]
    assert names[:2] == ["shard-00000.tar", "shard-00000_001.tar"] and names == sorted(names)
    assert tars.manifest.summary == {"num_shards": len(paths), "num_samples": 12}
    assert sample_rows(paths) == sample_rows(world["shards"][0].files(".tar"))
    for path in paths:
        num_rows = tars.manifest.file(path.name).num_rows
        assert num_rows == len(Shard(path))
        assert path.stat().st_size <= bound.get("max_shard_bytes", 1 << 30)
        assert num_rows <= bound.get("max_samples_per_shard", 12)
    assert subprocess.run(["tar", "-tf", paths[1]], check=True, capture_output=True).stdout.count(b"\n") == 3 * (
        tars.manifest.file(names[1]).num_rows or 0
    )
    again = dataset.STAGE.run(DatasetConfig(), {"shards": [tars]}, tmp_path)
    assert [(row["sample_key"], row["shard"]) for row in read_rows(again.path(SAMPLES_FILE))] == sorted(
        (key, path.name) for path in paths for key in Shard(path).keys
    )


def test_a_sample_larger_than_the_limit_gets_its_own_shard(world: World, tmp_path: Path) -> None:
    inputs = {"images": world["images"][:1], "captions": world["captions"][:1]}
    tars = shards.STAGE.run(ShardsConfig(max_shard_bytes=10_240), inputs, tmp_path, "00000")
    assert [len(Shard(path)) for path in tars.files(".tar")] == [1] * 12


def test_webp_and_extra_members_are_read_by_plain_webdataset(world: World, tmp_path: Path) -> None:
    extras = (
        ExtraMember(suffix="alt.txt", source="images", column="alt_text"),
        ExtraMember(suffix="size.json", source="images", column="width_px"),
        ExtraMember(suffix="model.txt", source="captions", column="prompt_version"),
    )
    config = ShardsConfig(image_format="webp", image_quality=80, extra_members=extras)
    inputs = {"images": world["images"][:1], "captions": world["captions"][:1]}
    tars = shards.STAGE.run(config, inputs, tmp_path, "00000")
    paths = tars.files(".tar")
    plain = list(WebDataset([str(path) for path in paths], shardshuffle=False))  # pyright: ignore[reportArgumentType]
    ours = [sample for path in paths for sample in read_shard(path)]
    for item, sample in zip(plain, ours, strict=True):
        assert item["webp"] == sample.image_bytes
        assert Image.open(io.BytesIO(item["webp"])).format == "WEBP"
        assert sample.extras == {name: item[name] for name in ("alt.txt", "size.json", "model.txt")}
        assert item["alt.txt"].decode() == sample.provenance["alt_text"]
        assert json.loads(item["size.json"]) == sample.provenance["width_px"]
    assert lint_folder(tars.folder, decode=True).findings == []
    jpeg = shards.STAGE.run(ShardsConfig(image_format="jpeg", image_quality=40), inputs, tmp_path, "00000")
    sizes = [sum(len(image) for _, image, _ in sample_rows(out.files(".tar"))) for out in (jpeg, world["shards"][0])]
    assert sizes[0] < sizes[1] / 2


def test_invalid_extra_members_are_rejected(world: World, tmp_path: Path) -> None:
    for suffix, message in (("txt", "choose another suffix"), ("a.pkl", "runs code"), ("../x", "pattern")):
        with pytest.raises(ValidationError, match=message):
            ExtraMember(suffix=suffix, source="images", column="url")
    twice = ExtraMember(suffix="url", source="images", column="url")
    with pytest.raises(ValidationError, match="each must be unique"):
        ShardsConfig(extra_members=(twice, twice))
    config = ShardsConfig(extra_members=(ExtraMember(suffix="x", source="captions", column="score"),))
    inputs = {"images": world["images"][:1], "captions": world["captions"][:1]}
    with pytest.raises(ThroughlineError, match=r"captions-00000.parquet: no column score"):
        shards.STAGE.run(config, inputs, tmp_path, "00000")


def test_members_contain_no_trace_of_the_machine(world: World) -> None:
    with tarfile.open(world["shards"][0].files(".tar")[0], "r:") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644


def test_bad_captions_are_dropped_with_their_reason(world: World, tmp_path: Path) -> None:
    downloaded = world["images"][1]
    empty, cut, missing, *others = image_keys(downloaded)
    changes: dict[str, dict[str, str] | None] = {
        empty: {"caption": " \n"},
        cut: {"finish_reason": "length"},
        missing: None,
    }
    captions = run_captions(downloaded, tmp_path, changes=changes)
    inputs = {"images": [downloaded], "captions": [captions]}
    tars = shards.STAGE.run(ShardsConfig(), inputs, tmp_path, "00001")
    assert dropped_reasons(tars) == {empty: "caption_empty", cut: "caption_truncated", missing: "caption_missing"}
    assert {key for path in tars.files(".tar") for key in Shard(path).keys} == set(others)
    lenient = shards.STAGE.run(ShardsConfig(drop_truncated=False), inputs, tmp_path, "00001")
    assert dropped_reasons(lenient) == {empty: "caption_empty", missing: "caption_missing"}


@pytest.mark.parametrize(
    ("config", "message"),
    [({"stranger": "f" * 32}, "captions without an image"), ({"duplicate": "first"}, "duplicate sample keys")],
)
def test_captions_that_do_not_match_the_images_stop_the_stage(
    world: World, tmp_path: Path, config: dict[str, str], message: str
) -> None:
    downloaded = world["images"][1]
    if "duplicate" in config:
        config = {"duplicate": image_keys(downloaded)[0]}
    captions = run_captions(downloaded, tmp_path, **config)
    with pytest.raises(ThroughlineError, match=rf"captions-00000.parquet: .*{message}"):
        shards.STAGE.run(ShardsConfig(), {"images": [downloaded], "captions": [captions]}, tmp_path, "00001")
