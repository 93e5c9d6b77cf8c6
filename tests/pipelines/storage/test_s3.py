"""Against a real S3 server, with a proxy in between that does what networks do."""

import hashlib
import random
import time
from pathlib import Path

import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.storage.s3 import ObjectFile, ObjectStore, StoreConfig
from pipelines.storage.s3_errors import StorageError
from tests.pipelines.storage.file_server import FileServer
from tests.s3_server import PART_BYTES, Fault, FaultyProxy, object_store

pytestmark = pytest.mark.slow

FOREVER = 1_000_000


def file_of(path: Path, num_bytes: int, key: str = "deep/file.bin") -> ObjectFile:
    data = random.Random(num_bytes).randbytes(num_bytes)
    path.write_bytes(data)
    return ObjectFile(key, path, hashlib.sha256(data).hexdigest(), num_bytes)


@pytest.fixture
def large(tmp_path: Path) -> ObjectFile:
    """A file of three parts."""
    return file_of(tmp_path / "large.bin", 2 * PART_BYTES + 12_345)


def patience(kind: str) -> dict[str, float]:
    """Return how long to wait for an answer: a short while for one that will not come."""
    return {"read_seconds": 2} if kind == "stall" else {}


def arrives(store: ObjectStore, file: ObjectFile) -> bool:
    """Whether the object is the file, and no upload was left behind."""
    return store.holds(file, read_bytes=True) and store.unfinished_uploads("") == []


@pytest.mark.parametrize("num_bytes", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
def test_files_go_up_and_come_down_unchanged(s3: FaultyProxy, bucket: str, tmp_path: Path, num_bytes: int) -> None:
    store, file = object_store(bucket), file_of(tmp_path / "file", num_bytes)
    assert not store.holds(file)
    store.upload([file])
    assert store.holds(file)
    assert arrives(store, file)
    assert any("uploadId" in line for line in s3.seen) == (num_bytes > PART_BYTES)
    back = ObjectFile(file.key, tmp_path / "back" / "file", file.sha256, num_bytes)
    store.download(back)
    assert back.path.read_bytes() == file.path.read_bytes()
    if num_bytes > 10:
        assert store.read_range(file.key, 3, 9, store.info(file.key).etag) == file.path.read_bytes()[3:9]  # type: ignore[union-attr]


UPLOAD_FAULTS = [
    Fault("POST .*uploads", "busy", 2),
    Fault("PUT .*partNumber=2", "busy", 2),
    Fault("PUT .*partNumber=2", "stall"),
    Fault("PUT .*partNumber=1", "reset upload", 2, after_bytes=1_000_000),
    Fault("PUT .*partNumber=1", "reset upload", 1, after_bytes=0),
    Fault("PUT .*partNumber=3", "corrupt upload", after_bytes=6_000),
    Fault("PUT .*partNumber=1", "lose answer"),
    Fault("POST .*uploadId", "busy"),
    Fault("POST .*uploadId", "lose answer"),
]


@pytest.mark.parametrize("fault", UPLOAD_FAULTS, ids=lambda fault: f"{fault.kind} at {fault.where}")
def test_an_upload_survives_a_fault(s3: FaultyProxy, bucket: str, large: ObjectFile, fault: Fault) -> None:
    store = object_store(bucket, **patience(fault.kind))
    s3.faults = [Fault(**vars(fault))]
    store.upload([large])
    assert s3.faults[0].times == 0, "the fault was met"
    assert arrives(store, large)


@pytest.mark.parametrize("kind", ["busy", "stall", "reset upload", "corrupt upload", "lose answer"])
def test_a_small_file_survives_a_fault(s3: FaultyProxy, bucket: str, tmp_path: Path, kind: str) -> None:
    store, file = object_store(bucket, **patience(kind)), file_of(tmp_path / "small", 300_000)
    s3.faults = [Fault("PUT ", kind)]
    store.upload([file])
    assert s3.faults[0].times == 0
    assert arrives(store, file)


@pytest.mark.parametrize("kind", ["busy", "stall", "reset download", "cut download", "corrupt download"])
def test_a_download_survives_a_fault(s3: FaultyProxy, bucket: str, large: ObjectFile, kind: str) -> None:
    store = object_store(bucket, **patience(kind))
    store.upload([large])
    s3.faults = [Fault("GET .*file.bin", kind, after_bytes=4_000_000), Fault("GET .*file.bin", kind)]
    back = ObjectFile(large.key, large.path.with_name("back"), large.sha256, large.num_bytes)
    store.download(back)
    assert [fault.times for fault in s3.faults] == [0, 0]
    assert back.path.read_bytes() == large.path.read_bytes()
    if kind in ("reset download", "cut download"):
        assert s3.seen.count(s3.seen[-1]) == 3, "it went on where it was"


@pytest.mark.parametrize("kind", ["drip upload", "drip download"])
def test_a_transfer_that_is_slow_but_moves_is_waited_for(
    s3: FaultyProxy, bucket: str, large: ObjectFile, kind: str
) -> None:
    store = object_store(bucket, read_seconds=4, attempts=1)
    start = time.monotonic()
    s3.faults = [Fault("PUT .*partNumber=2", kind)] if kind == "drip upload" else []
    store.upload([large])
    s3.faults += [Fault("GET .*file.bin", kind)] if kind == "drip download" else []
    back = ObjectFile(large.key, large.path.with_name("back"), large.sha256, large.num_bytes)
    store.download(back)
    assert s3.faults[0].times == 0 and time.monotonic() - start > 4, "it was slow, and longer so than a time-out"
    assert back.path.read_bytes() == large.path.read_bytes()
    assert arrives(store, large)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("busy", "the server answered 503 SlowDown Reduce your request rate, 2 times; run the same command again"),
        ("stall", "no answer in time, 2 times; run the same command again"),
        ("reset upload", "the connection broke 2 times"),
        ("corrupt upload", "(attempt 2); run the same command again"),
    ],
)
def test_an_upload_that_goes_on_failing_leaves_nothing(
    s3: FaultyProxy, bucket: str, large: ObjectFile, kind: str, said: str
) -> None:
    store = object_store(bucket, attempts=2, **patience(kind))
    s3.faults = [Fault("PUT .*partNumber=2", kind, FOREVER)]
    with pytest.raises(StorageError) as caught:
        store.upload([large])
    sentence = str(caught.value)
    assert sentence.startswith(f"s3://{bucket}/team/runs/deep/file.bin") and said in sentence and "\n" not in sentence
    assert store.info(large.key) is None
    assert store.unfinished_uploads("") == []


@pytest.mark.parametrize("kind", ["busy", "stall", "reset download", "cut download", "corrupt download"])
def test_a_download_that_goes_on_failing_leaves_nothing(
    s3: FaultyProxy, bucket: str, tmp_path: Path, kind: str
) -> None:
    store, file = object_store(bucket, attempts=2, **patience(kind)), file_of(tmp_path / "file", 200_000)
    store.upload([file])
    s3.faults = [Fault("GET .*file.bin", kind, FOREVER, after_bytes=0)]
    back = ObjectFile(file.key, tmp_path / "back" / "file", file.sha256, file.num_bytes)
    with pytest.raises(StorageError, match=r"s3://.*/deep/file.bin: "):
        store.download(back)
    assert list((tmp_path / "back").iterdir()) == []


def test_a_file_that_is_not_what_its_manifest_says_is_never_uploaded(
    s3: FaultyProxy, bucket: str, large: ObjectFile
) -> None:
    store = object_store(bucket)
    data = bytearray(large.path.read_bytes())
    data[-1] ^= 1
    large.path.write_bytes(data)
    with pytest.raises(StorageError, match=r"large.bin: .* the file was changed and is not uploaded"):
        store.upload([large])
    assert store.info(large.key) is None
    assert store.unfinished_uploads("") == []


def test_uploads_that_another_process_left_are_aborted(s3: FaultyProxy, bucket: str, large: ObjectFile) -> None:
    store = object_store(bucket)
    for key in (large.key, "other.bin"):
        store._client.create_multipart_upload(**store._place(key))
    store.upload([large])
    assert [key for key, *_ in store.unfinished_uploads("")] == ["other.bin"], "it may be another machine's"
    assert store.abort_stale_uploads("") == 0
    assert object_store(bucket, stale_upload_hours=1e-9).abort_stale_uploads("") == 1
    assert arrives(store, large)


def test_objects_are_listed_below_their_prefix(s3: FaultyProxy, bucket: str) -> None:
    store = object_store(bucket)
    for key in ("a/1/x", "a/1/y", "a/12/z", "b/3"):
        store.write(key, key.encode())
    assert store.folders("") == ["a", "b"]
    assert store.folders("a/") == ["1", "12"]
    assert store.folders("a/12") == ["12"]
    assert {key: size for key, (size, _) in store.keys("a/1/").items()} == {"a/1/x": 5, "a/1/y": 5}
    assert store.read("a/12/z") == b"a/12/z"
    assert store.read("a/12/absent") is None
    assert store.digest("absent") is None


def test_what_is_wrong_with_the_settings_is_one_sentence(
    s3: FaultyProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sentence(name: str = bucket) -> str:
        with pytest.raises(ThroughlineError) as caught:
            object_store(name).check()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    object_store(bucket).check()
    assert sentence("no-such-bucket") == "s3://no-such-bucket: no such bucket; create it, or correct the URL"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert "the credentials were refused (SignatureDoesNotMatch" in sentence()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert sentence().startswith(f"s3://{bucket}: no credentials; set AWS_ACCESS_KEY_ID")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    assert f"s3://{bucket}: no connection to http://127.0.0.1:1/" in sentence()
    with FileServer(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url(""))
        assert "the server answered 404" in sentence() and "check URL and endpoint" in sentence()


def test_only_s3_urls_with_a_bucket_are_stores() -> None:
    assert StoreConfig(url="s3://bucket").prefix == ""
    assert StoreConfig(url="s3://bucket/a/b/").prefix == "a/b/"
    for url in ("gs://bucket/x", "s3://", "/folder"):
        with pytest.raises(ValueError, match="expected s3://bucket"):
            StoreConfig(url=url)
