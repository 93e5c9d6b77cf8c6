"""The reader of shards: indexes, samples, and errors for damaged shards."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.shards.format import index_path, read_index, read_members
from pipelines.shards.reader import BadSampleError, Shard, read_shard, scan_index
from tests.pipelines.data_world import World


def test_an_index_matches_the_headers_and_a_foreign_one_is_rejected(world: World, tmp_path: Path) -> None:
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


def test_verifying_digests_finds_a_flipped_byte(world: World, tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.tar"
    data = bytearray(world["shards"][0].files(".tar")[0].read_bytes())
    data[2_000] ^= 1
    path.write_bytes(data)
    assert len(list(Shard(path))) == len(read_index(index_path(world["shards"][0].files(".tar")[0])).keys)
    with Shard(path, verify_digests=True) as shard:
        with pytest.raises(BadSampleError, match="does not have the image_sha256"):
            shard[0]
        assert shard[1].sample_key == shard.keys[1]


def test_tarfile_and_the_reader_agree_on_every_member(world: World) -> None:
    path = world["shards"][0].files(".tar")[0]
    with tarfile.open(path, "r:") as tar, path.open("rb") as stream:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
        found = list(read_members(stream, path.name, path.stat().st_size))
    assert [(member.name, member.offset, member.num_bytes) for member in found] == expected


def test_reader_returns_samples_by_index_and_describes_damage(world: World, tmp_path: Path) -> None:
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
    assert "no header of a plain file at byte 0" in problem(b"x" + data[1:])
    caption = data.index(b"A caption")
    assert "its JSON has key" in problem(data[:caption] + b"B" + data[caption + 1 :])
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
