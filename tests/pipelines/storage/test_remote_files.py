"""LAION metadata by URL, on a web server and in an object store, compared with the same files on disk."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.laion import subset as laion_subset
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.index import entry_of, read_parts
from pipelines.laion.sources import find_sources, local_path
from pipelines.runner.outputs import StageOutput
from pipelines.storage.object_store import ObjectFile
from tests.pipelines.laion import laion_world
from tests.pipelines.laion.laion_world import kept_rows, laion_row, write_laion
from tests.pipelines.storage.file_server import FileServer
from tests.s3_server import FaultyProxy, S3Server, object_store


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    """Two metadata files of 2 MB each, of text that doesn't compress, in several row groups."""
    for part in range(2):
        draw = random.Random(part)
        rows = [laion_row(f"http://a.com/{part}/{n}.jpg", f"{n} {draw.randbytes(500).hex()}") for n in range(2000)]
        write_laion(tmp_path / "laion" / f"part-{part}.parquet", rows, row_group_size=500)
    return tmp_path / "laion"


@pytest.fixture
def web(laion: Path) -> Iterator[FileServer]:
    with FileServer(laion) as running:
        yield running


def index_of(root: Path, *sources: str) -> StageOutput:
    from pipelines.laion import index as laion_index
    from pipelines.laion.sources import scan_index

    return laion_index.STAGE.run(scan_index(list(sources), root / "digests.json"), {}, root)


def subset_of(index: StageOutput, root: Path, part: str = "part-1") -> StageOutput:
    return laion_subset.STAGE.run(LaionSubsetConfig(), {"index": [entry_of(index, part)]}, root, part)


def test_files_by_url_give_the_data_versions_of_the_same_files_on_disk(
    laion: Path, web: FileServer, tmp_path: Path
) -> None:
    urls = [web.url(f"part-{part}.parquet") for part in (1, 0)]
    local, remote = index_of(tmp_path / "a", str(laion)), index_of(tmp_path / "b", *urls)
    assert remote.data_version == local.data_version
    assert remote.manifest.measurements["servers"]["part-0.parquet"]["url"] == urls[1]
    assert "servers" not in local.manifest.measurements
    subset = subset_of(remote, tmp_path / "b")
    assert subset.data_version == subset_of(local, tmp_path / "a").data_version
    sent = web.bytes_sent
    assert index_of(tmp_path / "b", *urls).data_version == local.data_version
    assert web.bytes_sent == sent, "an unchanged file is not read again"


def test_a_digest_stated_by_the_server_saves_reading_the_file(laion: Path, web: FileServer, tmp_path: Path) -> None:
    web.states_digest = True
    urls = [web.url(f"part-{part}.parquet?download=true") for part in range(2)]
    index = index_of(tmp_path / "b", *urls)
    assert index.data_version == index_of(tmp_path / "a", str(laion)).data_version
    total_bytes = sum(path.stat().st_size for path in laion.iterdir())
    assert web.bytes_sent < total_bytes / 2, "only footers were read"
    assert not (tmp_path / "b" / "sources").exists()
    assert len(kept_rows(subset_of(index, tmp_path / "b"))) == 2000
    assert [path.name for path in (tmp_path / "b" / "sources").rglob("*.parquet")] == ["part-1.parquet"]


def test_a_part_with_a_wrong_stated_digest_is_rejected(laion: Path, web: FileServer, tmp_path: Path) -> None:
    web.states_digest = True
    (place,) = find_sources([web.url("part-0.parquet")]).values()
    path = laion / "part-0.parquet"
    wrong = type(place)(place.url, place.num_bytes, place.etag, "0" * 64)  # type: ignore[call-arg, union-attr]
    with pytest.raises(ThroughlineError, match=r"part-0.parquet: \d+ bytes of SHA-256 .*the server stated"):
        local_path(wrong, tmp_path / "digests.json")
    assert not list((tmp_path / "sources").rglob("*.parquet"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ThroughlineError, match="was replaced while it was read"):
        local_path(place, tmp_path / "digests.json")


@pytest.mark.slow
def test_broken_and_busy_answers_are_retried(laion: Path, web: FileServer, tmp_path: Path) -> None:
    (place,) = find_sources([web.url("part-0.parquet")]).values()
    web.busy, web.cut_after = 1, 1_000_000
    web.requests.clear()
    copy = local_path(place, tmp_path / "digests.json")
    assert copy.read_bytes() == (laion / "part-0.parquet").read_bytes()
    assert web.requests[-1].split()[-1].startswith("bytes=")
    web.busy = 1_000
    with pytest.raises(ThroughlineError, match="the server answered 503, 5 times; run the same command again"):
        find_sources([web.url("part-1.parquet")])


def test_servers_without_head_and_wrong_urls(web: FileServer) -> None:
    web.supports_head = False
    (place,) = find_sources([web.url("part-0.parquet")]).values()
    assert local_size(place) == (web.folder / "part-0.parquet").stat().st_size
    with pytest.raises(ThroughlineError, match=r"absent.parquet: the server answered 404; check the URL"):
        find_sources([web.url("absent.parquet")])
    with pytest.raises(ThroughlineError, match="a web server can't list a folder"):
        find_sources([web.url("")])


def local_size(place: object) -> int:
    from pipelines.storage.remote_files import RemoteFile

    assert isinstance(place, RemoteFile)
    return place.num_bytes


@pytest.mark.slow
def test_objects_by_url_prefix_and_pattern(
    s3: FaultyProxy, s3_server: S3Server, bucket: str, laion: Path, tmp_path: Path
) -> None:
    for name in ("part-0.parquet", "deep/part-1.parquet", "_SUCCESS.parquet", "notes.txt"):
        path = s3_server.folder / bucket / "laion" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((laion / path.name).read_bytes() if path.name.startswith("part") else b"")
    base = f"s3://{bucket}/laion"
    expected = {
        base: ["deep/part-1.parquet", "part-0.parquet"],
        f"{base}/": ["deep/part-1.parquet", "part-0.parquet"],
        f"{base}/*.parquet": ["part-0.parquet"],
        f"{base}/**/part-[01].parquet": ["part-0.parquet", "part-1.parquet"],
        f"{base}/deep/part-?.parquet": ["part-1.parquet"],
        f"{base}/deep/part-1.parquet": ["part-1.parquet"],
    }
    assert {source: list(find_sources([source])) for source in expected} == expected
    for source in (f"{base}/no", f"{base}/*.csv", f"{base}/absent.parquet"):
        with pytest.raises(ThroughlineError, match="check the URL"):
            find_sources([source])
    index = index_of(tmp_path / "b", f"{base}/**/*.parquet")
    assert index.data_version == index_of(tmp_path / "a", str(laion)).data_version
    assert [part.name for part in read_parts(index)] == ["part-0.parquet", "part-1.parquet"]
    assert len(kept_rows(subset_of(index, tmp_path / "b"))) == 2000
    digests = json.loads((tmp_path / "b" / "digests.json").read_bytes())
    assert f"{base}/part-0.parquet" in digests
    assert laion_world.run_index(laion, tmp_path / "c").data_version == index.data_version


@pytest.mark.slow
def test_a_digest_in_an_objects_metadata_saves_reading_it(
    s3: FaultyProxy, bucket: str, laion: Path, tmp_path: Path
) -> None:
    store = object_store(bucket)
    files = [ObjectFile(f"laion/{path.name}", path, file_sha256(path), path.stat().st_size) for path in laion.iterdir()]
    store.upload(files)
    s3.heads.clear()
    index = index_of(tmp_path / "b", store.url("laion"))
    assert index.data_version == index_of(tmp_path / "a", str(laion)).data_version
    reads = [head.lower() for head in s3.heads if head.startswith("GET ") and ".parquet" in head.split()[1]]
    assert reads and all("range: bytes=" in head for head in reads), "only footers were read"
    assert len(kept_rows(subset_of(index, tmp_path / "b"))) == 2000, "the digest was verified"
