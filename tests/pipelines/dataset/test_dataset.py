"""The stage `dataset`: one row per sample key, duplicates, splits and features."""

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import DROPPED_NAME
from pipelines.core.sample_key import sample_key
from pipelines.dataset import dataset
from pipelines.dataset.config import DatasetConfig
from pipelines.dataset.dataset import SAMPLES_FILE, split_of
from pipelines.dataset.samples import ShardSamples
from pipelines.download.perceptual_hash import perceptual_hash
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from pipelines.shards.format import ShardWriter, index_path, read_index, sample_members
from pipelines.shards.reader import Shard, read_shard
from tests.pipelines.data_world import World, dropped_reasons, read_rows
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import (
    entry_list,
)
from tests.plain_stage import plain_stage


def test_dataset_contains_each_key_once_and_the_first_part_wins(
    server: HostileServer, world: World, tmp_path: Path
) -> None:
    inputs = {"shards": world["shards"][::-1]}
    output = dataset.STAGE.run(DatasetConfig(), inputs, tmp_path)
    rows = read_rows(output.path(SAMPLES_FILE))
    assert [row["sample_key"] for row in rows] == sorted(row["sample_key"] for row in rows)
    twice = sample_key(server.url("/scene/11"), "scene 11")
    assert dropped_reasons(output) == {twice: "duplicate_key"}
    assert next(row["part"] for row in rows if row["sample_key"] == twice) == "00000"
    assert len(rows) == 23
    by_part = {item.manifest.partition: item for item in world["shards"]}
    for row in rows:
        assert Shard(by_part[row["part"]].path(row["shard"])).keys[row["index_in_shard"]] == row["sample_key"]


def _shards_with_hashes(root: Path, hashes: list[tuple[str, str, int]]) -> list[StageOutput]:
    """Two parts of shards whose indexes state these (perceptual hash, source SHA-256, source pixels)."""

    def produce(run: StageRun[FrozenConfig]) -> None:
        mine = hashes[:2] if run.partition == "00000" else hashes[2:]
        start = 0 if run.partition == "00000" else 2
        with run.unit("00000") as unit:
            with unit.open("shard-00000.tar", num_rows=len(mine)) as stream:
                writer = ShardWriter(stream, "shard-00000.tar")
                for place, (perceptual, source, pixels) in enumerate(mine, start):
                    sample = sample_members(_key(place), b"", "", {"sample_key": _key(place), "caption": ""})
                    columns = {"perceptual_hash": perceptual, "source_sha256": source, "source_pixels": pixels}
                    writer.add_members(sample, columns)
                index = writer.finish()
            unit.write("shard-00000.index.json", index.to_bytes())

    stage = plain_stage(name="shards", code_version="1", config_type=FrozenConfig, produce=produce)
    return [stage.run(FrozenConfig(), {}, root, part) for part in ("00000", "00001")]


def _key(place: int) -> str:
    return f"{place:032x}"


def test_of_duplicates_across_parts_one_is_kept_and_every_drop_is_listed(tmp_path: Path) -> None:
    hashes = [
        ("0000000000000000", "a", 100),
        ("ffffffffffffffff", "b", 900),
        ("0000000000000003", "c", 400),  # two bits from the first, and larger: the winner, in another part
        ("000000000000000f", "c", 400),  # the same bytes as the one before; exact duplicates are dropped first
        ("00000000000000ff", "d", 400),  # six bits from the winner, four from the one that lost
    ]
    tars = _shards_with_hashes(tmp_path, hashes)

    def drops(**config: Any) -> dict[str, tuple[str, str]]:
        output = dataset.STAGE.run(DatasetConfig(**config), {"shards": tars}, tmp_path)
        conservation = output.manifest.conservation
        assert conservation is not None and conservation.holds and conservation.rows_in == 5
        kept = {row["sample_key"] for row in read_rows(output.path(SAMPLES_FILE))}
        rows = read_rows(output.path(DROPPED_NAME)) if conservation.dropped else []
        assert kept == {_key(place) for place in range(5)} - {row["sample_key"] for row in rows}
        assert all(row["detail"] in kept for row in rows)
        return {row["sample_key"]: (row["reason"], row["detail"]) for row in rows}

    assert drops() == drops(near_duplicates=0) == {}
    exact = {_key(3): ("duplicate_image", _key(2))}
    assert drops(duplicate_images=True) == exact
    near = {_key(0): ("near_duplicate", _key(2)), _key(3): ("near_duplicate", _key(2))}
    assert drops(near_duplicates=4) == near
    assert drops(near_duplicates=4, duplicate_images=True) == near | exact
    assert drops(near_duplicates=6) == near | {_key(4): ("near_duplicate", _key(2))}


def test_copies_of_a_withdrawn_image_are_dropped_too(tmp_path: Path) -> None:
    hashes = [
        ("0000000000000000", "a", 900),
        ("ffffffffffffffff", "b", 100),  # withdrawn
        ("ffffffffffffffff", "b", 900),  # its copy, in another part and larger
        ("fffffffffffffff0", "c", 900),  # four bits from it
    ]
    tars = _shards_with_hashes(tmp_path, hashes)
    withdrawn = entry_list(tmp_path / "withdrawn.txt", _key(1))

    def drops(**config: Any) -> dict[str, tuple[str, str]]:
        output = dataset.STAGE.run(DatasetConfig(withdrawn=withdrawn, **config), {"shards": tars}, tmp_path)
        assert output.manifest.conservation is not None and output.manifest.conservation.holds
        rows = read_rows(output.path(DROPPED_NAME))
        assert len(rows) + len(read_rows(output.path(SAMPLES_FILE))) == len(hashes)
        return {row["sample_key"]: (row["reason"], row["detail"]) for row in rows}

    alone = {_key(1): ("withdrawn", "shard-00000.tar of part 00000")}
    assert drops() == alone
    copied = {_key(2): ("duplicate_image", _key(1))}
    assert drops(duplicate_images=True) == alone | copied
    near = {_key(2): ("near_duplicate", _key(1)), _key(3): ("near_duplicate", _key(1))}
    assert drops(near_duplicates=4) == alone | near
    assert drops(duplicate_images=True, near_duplicates=4) == alone | near | copied


def test_near_duplicates_need_hashes_in_the_index(world: World, tmp_path: Path) -> None:
    for output in world["shards"]:
        for path in output.files(".tar"):
            columns = read_index(index_path(path)).columns
            for place, sample in enumerate(read_shard(path)):
                assert columns["perceptual_hash"][place] == sample.provenance["perceptual_hash"]
                shown = perceptual_hash(Image.open(io.BytesIO(sample.image_bytes)))
                assert (int(shown, 16) ^ int(columns["perceptual_hash"][place], 16)).bit_count() <= 8
    tars = world["shards"][0]
    bare = tmp_path / "bare"
    shutil.copytree(tars.folder, bare)
    for path in bare.glob("*.index.json"):
        path.unlink()
    with pytest.raises(ThroughlineError, match="its index has no perceptual_hash"):
        dataset.STAGE.run(DatasetConfig(near_duplicates=3), {"shards": [replace(tars, folder=bare)]}, tmp_path)


def test_dataset_samples_match_its_table(world: World, tmp_path: Path) -> None:
    output = dataset.STAGE.run(DatasetConfig(validation_share=0.3), {"shards": world["shards"]}, tmp_path)
    rows = read_rows(output.path(SAMPLES_FILE))
    for split in ("train", "validation"):
        samples = ShardSamples.of_dataset(output, world["shards"], split)
        assert [sample.sample_key for sample in samples[:]] == [
            row["sample_key"] for row in rows if row["split"] == split
        ]
        assert samples.data_version == output.data_version
    with pytest.raises(ThroughlineError, match=r"made from other shards \(1 missing, 0 unknown"):
        ShardSamples.of_dataset(output, world["shards"][:1], "train")


def test_the_split_of_a_sample_does_not_depend_on_the_rest_of_the_set(world: World, tmp_path: Path) -> None:
    config = DatasetConfig(validation_share=0.4)
    both = read_rows(dataset.STAGE.run(config, {"shards": world["shards"]}, tmp_path).path(SAMPLES_FILE))
    one = read_rows(dataset.STAGE.run(config, {"shards": world["shards"][1:]}, tmp_path).path(SAMPLES_FILE))
    splits = {row["sample_key"]: row["split"] for row in both}
    assert all(splits[row["sample_key"]] == row["split"] for row in one)
    assert set(splits.values()) == {"train", "validation"}


def test_splits_have_the_configured_share() -> None:
    config = DatasetConfig(validation_share=0.1)
    keys = [sample_key("u", str(index)) for index in range(20_000)]
    held_out = sum(split_of(key, config) == "validation" for key in keys)
    assert 1_850 < held_out < 2_150  # 3.5 standard deviations


def test_dataset_drops_samples_without_features_and_rejects_features_of_unknown_keys(
    world: World, tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import save

    class LatentsLike(FrozenConfig):
        leave_out: str = ""
        add: str = ""

    def produce(run: StageRun[LatentsLike]) -> None:
        for path in run.input("shards").files(".tar"):
            name = path.stem.removeprefix("shard-")
            keys = [key for key in Shard(path).keys if key != run.config.leave_out]
            keys += [run.config.add] if run.config.add else []
            packed = np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 16)
            with run.unit(name) as unit:
                unit.write(
                    f"latents-{name}.safetensors", save({"mean": np.zeros(3, np.float32), "sample_keys": packed})
                )

    stage = plain_stage(name="latents", code_version="1", config_type=LatentsLike, produce=produce)
    tars = world["shards"][1]
    key = Shard(tars.files(".tar")[0]).keys[0]
    latents = stage.run(LatentsLike(leave_out=key), {"shards": [tars]}, tmp_path, "00001")
    output = dataset.STAGE.run(DatasetConfig(), {"shards": [tars], "latents": [latents]}, tmp_path)
    assert dropped_reasons(output) == {key: "latents_missing"}
    with pytest.raises(ThroughlineError, match="latents for part 00000 not among its inputs"):
        dataset.STAGE.run(DatasetConfig(), {"shards": world["shards"], "latents": [latents]}, tmp_path)
    strange = stage.run(LatentsLike(add="f" * 32), {"shards": [tars]}, tmp_path, "00001")
    with pytest.raises(ThroughlineError, match=r"latents-00000.safetensors: 1 sample keys that are not in shard"):
        dataset.STAGE.run(DatasetConfig(), {"shards": [tars], "latents": [strange]}, tmp_path)
