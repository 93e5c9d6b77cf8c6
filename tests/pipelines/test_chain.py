import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from webdataset.compat import WebDataset

from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import DROPPED_NAME
from pipelines.core.sample_key import sample_key
from pipelines.dataset import dataset
from pipelines.dataset.config import DatasetConfig
from pipelines.dataset.dataset import SAMPLES_FILE, split_of
from pipelines.dataset.samples import ShardSamples
from pipelines.download import images
from pipelines.download.perceptual_hash import perceptual_hash
from pipelines.download.tables import image_units
from pipelines.laion import selection as laion_selection
from pipelines.laion.config import LaionSelectionConfig
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from pipelines.shards import shards
from pipelines.shards.config import ExtraMember, ShardsConfig
from pipelines.shards.format import ShardWriter, index_path, read_index, read_members, sample_members
from pipelines.shards.lint import lint_folder
from pipelines.shards.reader import BadSampleError, Shard, read_shard, scan_index
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import (
    entry_list,
    images_config,
    laion_row,
    run_captions,
    run_images,
    run_subset,
    write_laion,
)
from tests.plain_stage import plain_stage

BAD_PATHS = ("/404", "/html", "/truncated.jpg", "/noai", "/animated.gif", "/redirect-metadata", "/500")


def dropped(output: StageOutput) -> dict[str, str]:
    if DROPPED_NAME not in {entry.path for entry in output.manifest.files}:
        return {}
    rows = pq.read_table(output.path(DROPPED_NAME)).to_pylist()
    return {row["sample_key"]: row["reason"] for row in rows}


def write_parts(server: HostileServer, folder: Path) -> Path:
    """Two parts of 12 good pictures each, bad ones in the first, and one pair that stands in both."""
    for part in range(2):
        rows = [
            laion_row(server.url(f"/scene/{index}"), f"scene {index}") for index in range(part * 11, part * 11 + 12)
        ]
        if part == 0:
            rows += [laion_row(server.url(path), f"bad {path}") for path in BAD_PATHS]
        write_laion(folder / f"{part:05d}.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def world(server: HostileServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[StageOutput]]:
    root = tmp_path_factory.mktemp("world")
    source = write_parts(server, root / "laion")
    outputs: dict[str, list[StageOutput]] = {"subset": [], "images": [], "captions": [], "shards": []}
    for part in ("00000", "00001"):
        subset = run_subset(source, root / "out", part)
        pictures = run_images(server, subset, root / "out")
        captions = run_captions(pictures, root / "out")
        tars = shards.STAGE.run(ShardsConfig(), {"images": [pictures], "captions": [captions]}, root / "out", part)
        for name, output in zip(outputs, (subset, pictures, captions, tars), strict=True):
            outputs[name].append(output)
    return outputs


def test_every_row_ends_as_a_picture_or_with_a_reason(
    server: HostileServer, world: dict[str, list[StageOutput]]
) -> None:
    pictures = world["images"][0]
    conservation = pictures.manifest.conservation
    assert conservation is not None
    assert (conservation.rows_in, conservation.rows_out) == (19, 12)
    expected = {
        "/404": "http_not_found",
        "/html": "html",
        "/truncated.jpg": "image_truncated",
        "/noai": "opted_out",
        "/animated.gif": "animated",
        "/redirect-metadata": "blocked_address",
        "/500": "http_server_error",
    }
    keys = {sample_key(server.url(path), f"bad {path}"): reason for path, reason in expected.items()}
    assert dropped(pictures) == keys
    statuses = [row for path in pictures.files(".parquet") if "status-" in path.name for row in _rows(path)]
    assert Counter(row["status"] for row in statuses) == Counter({"ok": 12, **Counter(expected.values())})
    assert {row["sample_key"] for row in statuses} == {*keys, *_image_keys(pictures)}


def _rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _image_keys(pictures: StageOutput) -> list[str]:
    return [key for unit in image_units(pictures) for key in unit.read(["sample_key"])["sample_key"].to_pylist()]


def test_pictures_are_square_rgb_and_say_what_they_came_from(
    server: HostileServer, world: dict[str, list[StageOutput]]
) -> None:
    rows = [row for unit in image_units(world["images"][0]) for row in unit.read().to_pylist()]
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.size, image.mode, image.format) == ((256, 256), "RGB", "JPEG")
        assert row["sample_key"] == sample_key(row["url"], row["alt_text"])
        seed = int(row["url"].rsplit("/", 1)[1])
        assert (row["width_px"], row["height_px"], row["format"]) == (280 + seed % 50, 300, "jpeg")
        assert row["content_type"] == "image/jpeg"
        assert row["final_url"] == row["url"]
    assert len({row["source_sha256"] for row in rows}) == 12


def test_plain_webdataset_reads_the_shards(world: dict[str, list[StageOutput]]) -> None:
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


def test_shards_hold_the_bytes_of_the_images_stage_in_the_order_of_keys(world: dict[str, list[StageOutput]]) -> None:
    for pictures, tars in zip(world["images"], world["shards"], strict=True):
        images = {
            row["sample_key"]: row["image"]
            for unit in image_units(pictures)
            for row in unit.read(["sample_key", "image"]).to_pylist()
        }
        for path in tars.files(".tar"):
            samples = list(read_shard(path))
            assert [sample.sample_key for sample in samples] == sorted(sample.sample_key for sample in samples)
            assert all(sample.image_bytes == images.pop(sample.sample_key) for sample in samples)
        assert not images


def _sample_rows(paths: list[Path]) -> list[tuple[str, bytes, str]]:
    return [(item.sample_key, item.image_bytes, item.caption) for path in paths for item in read_shard(path)]


@pytest.mark.parametrize("bound", [{"max_samples_per_shard": 3}, {"max_shard_bytes": 100_000}])
def test_bounds_cut_a_unit_into_shards_of_the_same_samples_in_the_same_order(
    world: dict[str, list[StageOutput]], tmp_path: Path, bound: dict[str, int]
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
    assert _sample_rows(paths) == _sample_rows(world["shards"][0].files(".tar"))
    for path in paths:
        num_rows = tars.manifest.file(path.name).num_rows
        assert num_rows == len(Shard(path))
        assert path.stat().st_size <= bound.get("max_shard_bytes", 1 << 30)
        assert num_rows <= bound.get("max_samples_per_shard", 12)
    assert subprocess.run(["tar", "-tf", paths[1]], check=True, capture_output=True).stdout.count(b"\n") == 3 * (
        tars.manifest.file(names[1]).num_rows or 0
    )
    again = dataset.STAGE.run(DatasetConfig(), {"shards": [tars]}, tmp_path)
    assert [(row["sample_key"], row["shard"]) for row in _rows(again.path(SAMPLES_FILE))] == sorted(
        (key, path.name) for path in paths for key in Shard(path).keys
    )


def test_a_sample_larger_than_the_bound_gets_a_shard_of_its_own(
    world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
    inputs = {"images": world["images"][:1], "captions": world["captions"][:1]}
    tars = shards.STAGE.run(ShardsConfig(max_shard_bytes=10_240), inputs, tmp_path, "00000")
    assert [len(Shard(path)) for path in tars.files(".tar")] == [1] * 12


def test_webp_and_extra_members_are_read_by_plain_webdataset(
    world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
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
    sizes = [sum(len(image) for _, image, _ in _sample_rows(out.files(".tar"))) for out in (jpeg, world["shards"][0])]
    assert sizes[0] < sizes[1] / 2


def test_extra_members_that_cannot_be_are_refused(world: dict[str, list[StageOutput]], tmp_path: Path) -> None:
    for suffix, message in (("txt", "choose another suffix"), ("a.pkl", "runs code"), ("../x", "pattern")):
        with pytest.raises(ValidationError, match=message):
            ExtraMember(suffix=suffix, source="images", column="url")
    twice = ExtraMember(suffix="url", source="images", column="url")
    with pytest.raises(ValidationError, match="each may stand once"):
        ShardsConfig(extra_members=(twice, twice))
    config = ShardsConfig(extra_members=(ExtraMember(suffix="x", source="captions", column="score"),))
    inputs = {"images": world["images"][:1], "captions": world["captions"][:1]}
    with pytest.raises(ThroughlineError, match=r"captions-00000.parquet: no column score"):
        shards.STAGE.run(config, inputs, tmp_path, "00000")


def test_an_index_is_what_the_headers_say_and_a_foreign_one_is_refused(
    world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
    path = world["shards"][0].files(".tar")[0]
    with path.open("rb") as stream:
        assert scan_index(stream, path) == replace(read_index(index_path(path)), columns={})
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    index_path(copy).write_bytes(index_path(path).read_bytes())
    assert Shard(copy).keys == Shard(path).keys
    copy.write_bytes(path.read_bytes() + bytes(10_240))
    with pytest.raises(ThroughlineError, match="its index says"):
        Shard(copy)
    for content, message in ((b"{}", "format"), (b"[", "not a readable index")):
        index_path(copy).write_bytes(content)
        with pytest.raises(ThroughlineError, match=message):
            Shard(copy)


def test_a_flipped_byte_is_found_where_digests_are_verified(
    world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
    path = tmp_path / "shard-00000.tar"
    data = bytearray(world["shards"][0].files(".tar")[0].read_bytes())
    data[2_000] ^= 1
    path.write_bytes(data)
    assert len(list(Shard(path))) == len(read_index(index_path(world["shards"][0].files(".tar")[0])).keys)
    with Shard(path, verify_digests=True) as shard:
        with pytest.raises(BadSampleError, match="not the image_sha256"):
            shard[0]
        assert shard[1].sample_key == shard.keys[1]


def test_members_carry_nothing_of_the_machine(world: dict[str, list[StageOutput]]) -> None:
    with tarfile.open(world["shards"][0].files(".tar")[0], "r:") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644


def test_tarfile_and_the_reader_agree_on_every_member(world: dict[str, list[StageOutput]]) -> None:
    path = world["shards"][0].files(".tar")[0]
    with tarfile.open(path, "r:") as tar, path.open("rb") as stream:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
        found = list(read_members(stream, path.name, path.stat().st_size))
    assert [(member.name, member.offset, member.num_bytes) for member in found] == expected


def test_images_downloads_what_the_selection_left_of_its_part(server: HostileServer, tmp_path: Path) -> None:
    both = [server.url("/scene/1"), server.url("/scene/2")]
    for part, urls in {"a": both, "b": [*both, server.url("/scene/3")]}.items():
        write_laion(tmp_path / "laion" / f"{part}.parquet", [laion_row(url, f"in {part}") for url in urls])
    subsets = [run_subset(tmp_path / "laion", tmp_path, part) for part in ("a", "b")]
    selection = laion_selection.STAGE.run(LaionSelectionConfig(), {"subset": subsets}, tmp_path)
    ends: dict[str, set[str]] = {}
    for part in ("a", "b"):
        rows = selection.only_file(laion_selection.rows_name(part))
        pictures = images.STAGE.run(images_config(server), {"selection": [rows]}, tmp_path, part)
        table, selected = pictures.manifest.conservation, pq.read_table(rows.address)["sample_key"].to_pylist()
        assert table is not None and table.holds and table.rows_in == len(selected)
        (ref,) = pictures.manifest.inputs["selection"]
        assert (ref.stage, ref.file) == ("laion_selection", f"rows-{part}.parquet")
        ends[part] = {row["url"] for row in _rows(pictures.path("status-00000.parquet"))} if selected else set()
    assert not ends["a"] & ends["b"]
    assert ends["a"] | ends["b"] == {*both, server.url("/scene/3")}


def test_a_second_root_gives_the_same_data_versions(
    server: HostileServer, world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
    source = write_parts(server, tmp_path / "elsewhere")
    subset = run_subset(source, tmp_path / "out")
    pictures = run_images(server, subset, tmp_path / "out", decode_workers=1, shards_in_flight=1)
    captions = run_captions(pictures, tmp_path / "out")
    inputs = {"images": [pictures], "captions": [captions]}
    tars = shards.STAGE.run(ShardsConfig(), inputs, tmp_path / "out", "00000")
    again = {"subset": subset, "images": pictures, "captions": captions, "shards": tars}
    assert {name: output.data_version for name, output in again.items()} == {
        name: outputs[0].data_version for name, outputs in world.items()
    }


def test_bad_captions_are_dropped_with_their_reason(world: dict[str, list[StageOutput]], tmp_path: Path) -> None:
    pictures = world["images"][1]
    empty, cut, missing, *others = _image_keys(pictures)
    changes: dict[str, dict[str, str] | None] = {
        empty: {"caption": " \n"},
        cut: {"finish_reason": "length"},
        missing: None,
    }
    captions = run_captions(pictures, tmp_path, changes=changes)
    inputs = {"images": [pictures], "captions": [captions]}
    tars = shards.STAGE.run(ShardsConfig(), inputs, tmp_path, "00001")
    assert dropped(tars) == {empty: "caption_empty", cut: "caption_truncated", missing: "caption_missing"}
    assert {key for path in tars.files(".tar") for key in Shard(path).keys} == set(others)
    lenient = shards.STAGE.run(ShardsConfig(drop_truncated=False), inputs, tmp_path, "00001")
    assert dropped(lenient) == {empty: "caption_empty", missing: "caption_missing"}


@pytest.mark.parametrize(
    ("config", "message"),
    [({"stranger": "f" * 32}, "captions without a picture"), ({"duplicate": "first"}, "stand there twice")],
)
def test_captions_that_do_not_fit_the_pictures_stop_the_stage(
    world: dict[str, list[StageOutput]], tmp_path: Path, config: dict[str, str], message: str
) -> None:
    pictures = world["images"][1]
    if "duplicate" in config:
        config = {"duplicate": _image_keys(pictures)[0]}
    captions = run_captions(pictures, tmp_path, **config)
    with pytest.raises(ThroughlineError, match=rf"captions-00000.parquet: .*{message}"):
        shards.STAGE.run(ShardsConfig(), {"images": [pictures], "captions": [captions]}, tmp_path, "00001")


def test_dataset_takes_each_key_once_and_the_first_part_wins(
    server: HostileServer, world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
    inputs = {"shards": world["shards"][::-1]}
    output = dataset.STAGE.run(DatasetConfig(), inputs, tmp_path)
    rows = _rows(output.path(SAMPLES_FILE))
    assert [row["sample_key"] for row in rows] == sorted(row["sample_key"] for row in rows)
    twice = sample_key(server.url("/scene/11"), "scene 11")
    assert dropped(output) == {twice: "duplicate_key"}
    assert next(row["part"] for row in rows if row["sample_key"] == twice) == "00000"
    assert len(rows) == 23
    by_part = {item.manifest.partition: item for item in world["shards"]}
    for row in rows:
        assert Shard(by_part[row["part"]].path(row["shard"])).keys[row["index_in_shard"]] == row["sample_key"]


def _alike_shards(root: Path, pictures: list[tuple[str, str, int]]) -> list[StageOutput]:
    """Two parts of shards whose indexes state these (perceptual hash, source SHA-256, source pixels)."""

    def produce(run: StageRun[FrozenConfig]) -> None:
        mine = pictures[:2] if run.partition == "00000" else pictures[2:]
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


def test_alike_samples_of_all_parts_leave_one_winner_and_every_loss_is_listed(tmp_path: Path) -> None:
    pictures = [
        ("0000000000000000", "a", 100),
        ("ffffffffffffffff", "b", 900),
        ("0000000000000003", "c", 400),  # two bits from the first, and larger: the winner, in another part
        ("000000000000000f", "c", 400),  # the bytes of the one before, found first where that is asked for
        ("00000000000000ff", "d", 400),  # six bits from the winner, four from the one that lost
    ]
    tars = _alike_shards(tmp_path, pictures)

    def drops(**config: Any) -> dict[str, tuple[str, str]]:
        output = dataset.STAGE.run(DatasetConfig(**config), {"shards": tars}, tmp_path)
        conservation = output.manifest.conservation
        assert conservation is not None and conservation.holds and conservation.rows_in == 5
        kept = {row["sample_key"] for row in _rows(output.path(SAMPLES_FILE))}
        rows = _rows(output.path(DROPPED_NAME)) if conservation.dropped else []
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


def test_copies_of_a_withdrawn_picture_go_with_it(tmp_path: Path) -> None:
    pictures = [
        ("0000000000000000", "a", 900),
        ("ffffffffffffffff", "b", 100),  # withdrawn
        ("ffffffffffffffff", "b", 900),  # its copy, in another part and larger
        ("fffffffffffffff0", "c", 900),  # four bits from it
    ]
    tars = _alike_shards(tmp_path, pictures)
    withdrawn = entry_list(tmp_path / "withdrawn.txt", _key(1))

    def drops(**config: Any) -> dict[str, tuple[str, str]]:
        output = dataset.STAGE.run(DatasetConfig(withdrawn=withdrawn, **config), {"shards": tars}, tmp_path)
        assert output.manifest.conservation is not None and output.manifest.conservation.holds
        rows = _rows(output.path(DROPPED_NAME))
        assert len(rows) + len(_rows(output.path(SAMPLES_FILE))) == len(pictures)
        return {row["sample_key"]: (row["reason"], row["detail"]) for row in rows}

    alone = {_key(1): ("withdrawn", "shard-00000.tar of part 00000")}
    assert drops() == alone
    copied = {_key(2): ("duplicate_image", _key(1))}
    assert drops(duplicate_images=True) == alone | copied
    near = {_key(2): ("near_duplicate", _key(1)), _key(3): ("near_duplicate", _key(1))}
    assert drops(near_duplicates=4) == alone | near
    assert drops(duplicate_images=True, near_duplicates=4) == alone | near | copied


def test_near_duplicates_need_the_hashes_of_the_index(world: dict[str, list[StageOutput]], tmp_path: Path) -> None:
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


def test_samples_of_a_dataset_are_those_of_its_table(world: dict[str, list[StageOutput]], tmp_path: Path) -> None:
    output = dataset.STAGE.run(DatasetConfig(validation_share=0.3), {"shards": world["shards"]}, tmp_path)
    rows = _rows(output.path(SAMPLES_FILE))
    for split in ("train", "validation"):
        samples = ShardSamples.of_dataset(output, world["shards"], split)
        assert [sample.sample_key for sample in samples[:]] == [
            row["sample_key"] for row in rows if row["split"] == split
        ]
        assert samples.data_version == output.data_version
    with pytest.raises(ThroughlineError, match=r"rolled up from other shards \(1 missing, 0 unknown"):
        ShardSamples.of_dataset(output, world["shards"][:1], "train")


def test_a_sample_keeps_its_split_whatever_else_is_in_the_set(
    world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
    config = DatasetConfig(validation_share=0.4)
    both = _rows(dataset.STAGE.run(config, {"shards": world["shards"]}, tmp_path).path(SAMPLES_FILE))
    one = _rows(dataset.STAGE.run(config, {"shards": world["shards"][1:]}, tmp_path).path(SAMPLES_FILE))
    splits = {row["sample_key"]: row["split"] for row in both}
    assert all(splits[row["sample_key"]] == row["split"] for row in one)
    assert set(splits.values()) == {"train", "validation"}


def test_splits_take_the_configured_share() -> None:
    config = DatasetConfig(validation_share=0.1)
    keys = [sample_key("u", str(index)) for index in range(20_000)]
    held_out = sum(split_of(key, config) == "validation" for key in keys)
    assert 1_850 < held_out < 2_150  # 3.5 standard deviations


def test_dataset_drops_what_has_no_features_and_refuses_features_of_strangers(
    world: dict[str, list[StageOutput]], tmp_path: Path
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
    assert dropped(output) == {key: "latents_missing"}
    with pytest.raises(ThroughlineError, match="latents for part 00000 not among its inputs"):
        dataset.STAGE.run(DatasetConfig(), {"shards": world["shards"], "latents": [latents]}, tmp_path)
    strange = stage.run(LatentsLike(add="f" * 32), {"shards": [tars]}, tmp_path, "00001")
    with pytest.raises(ThroughlineError, match=r"latents-00000.safetensors: 1 sample keys that shard-00000.tar"):
        dataset.STAGE.run(DatasetConfig(), {"shards": [tars], "latents": [strange]}, tmp_path)


def test_reader_gives_samples_by_place_and_names_what_is_wrong(
    world: dict[str, list[StageOutput]], tmp_path: Path
) -> None:
    good = world["shards"][0].files(".tar")[0]
    with Shard(good) as shard:
        assert [shard[index].sample_key for index in (-1, 0)] == [shard.keys[-1], shard.keys[0]]
        assert len(shard) == len(list(read_shard(good)))
        with pytest.raises(IndexError):
            shard[len(shard)]
    data = good.read_bytes()
    path = tmp_path / "shard-00000.tar"

    def problem(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(ThroughlineError) as caught:
            list(read_shard(path))
        assert "shard-00000.tar" in str(caught.value)
        return str(caught.value)

    assert "cut off inside" in problem(data[:5000])
    assert "without an end mark" in problem(data[: data.rindex(b"}") // 512 * 512 + 512])
    assert "no plain file's header at byte 0" in problem(b"x" + data[1:])
    caption = data.index(b"A caption")
    assert "its JSON is about" in problem(data[:caption] + b"B" + data[caption + 1 :])
    with pytest.raises(ThroughlineError, match="no such shard"):
        Shard(tmp_path / "shard-00001.tar")


def _tar(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            data = json.dumps({"sample_key": name.partition(".")[0], "caption": ""}).encode() if "json" in name else b""
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["aa.jpg", "aa.txt"], "expected aa.jpg, aa.json, aa.txt"),
        (["aa.jpg", "bb.json", "aa.txt"], "expected aa.jpg, aa.json, aa.txt"),
        (["bb.jpg", "bb.json", "bb.txt", "aa.jpg", "aa.json", "aa.txt"], "does not come after bb"),
        (["aa.jpg", "aa.json", "aa.txt"] * 2, "does not come after aa"),
    ],
)
def test_reader_rejects_incomplete_and_unordered_samples(tmp_path: Path, names: list[str], message: str) -> None:
    path = tmp_path / "shard-00000.tar"
    path.write_bytes(_tar(names))
    with pytest.raises(ThroughlineError, match=message):
        Shard(path)
