"""Objects on a real S3 server, behind a proxy that injects network faults."""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.storage.config import StoreConfig
from pipelines.storage.downloads import download_files
from pipelines.storage.object_store import ObjectFile, ObjectStore
from pipelines.storage.store_errors import StorageError
from tests.pipelines.storage.file_server import FileServer
from tests.s3_server import (
    ACCESS_KEY,
    PART_BYTES,
    SECRET_KEY,
    Fault,
    FaultyProxy,
    S3Server,
    boto_client,
    object_store,
    unfinished_uploads,
)  # fmt: skip

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


def timeouts(kind: str) -> dict[str, float]:
    """Return short timeouts for requests that are never answered."""
    return {"read_seconds": 2, "upload_seconds": 2} if kind == "stall" else {}


@pytest.fixture
def unfinished(s3_server: S3Server, bucket: str) -> Callable[[], list[str]]:
    return partial(unfinished_uploads, s3_server, bucket)


@pytest.mark.parametrize("num_bytes", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES])
def test_files_go_up_and_come_down_unchanged(s3: FaultyProxy, bucket: str, tmp_path: Path, num_bytes: int) -> None:
    store, file = object_store(bucket), file_of(tmp_path / "file", num_bytes)
    assert not store.holds(file)
    store.upload([file])
    assert store.holds(file)
    assert store.holds(file, read_bytes=True)
    assert any("uploadId" in line for line in s3.seen) == (num_bytes > PART_BYTES)
    back = ObjectFile(file.key, tmp_path / "back" / "file", file.sha256, num_bytes)
    store.download(back)
    assert back.path.read_bytes() == file.path.read_bytes()
    if num_bytes > 10:
        assert store.read_range(file.key, 3, 9, etag_of(store, file)) == file.path.read_bytes()[3:9]


def etag_of(store: ObjectStore, file: ObjectFile) -> str:
    info = store.info(file.key)
    assert info is not None
    return info.etag


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
def test_an_upload_survives_a_fault(
    s3: FaultyProxy, bucket: str, unfinished: Callable[[], list[str]], large: ObjectFile, fault: Fault
) -> None:
    store = object_store(bucket, **timeouts(fault.kind))
    s3.faults = [Fault(**vars(fault))]
    store.upload([large])
    assert s3.faults[0].times == 0, "the fault occurred"
    assert store.holds(large, read_bytes=True) and unfinished() == []


@pytest.mark.parametrize("kind", ["busy", "stall", "reset upload", "corrupt upload", "lose answer"])
def test_a_small_file_survives_a_fault(s3: FaultyProxy, bucket: str, tmp_path: Path, kind: str) -> None:
    store, file = object_store(bucket, **timeouts(kind)), file_of(tmp_path / "small", 300_000)
    s3.faults = [Fault("PUT ", kind)]
    store.upload([file])
    assert s3.faults[0].times == 0
    assert store.holds(file, read_bytes=True)
    s3.faults = [Fault("PUT ", kind)]
    store.write_new("new", b"first" * 50_000)
    assert s3.faults[0].times == 0
    assert store.read("new") == b"first" * 50_000


@pytest.mark.parametrize("kind", ["busy", "stall", "reset download", "cut download", "corrupt download"])
def test_a_download_survives_a_fault(s3: FaultyProxy, bucket: str, large: ObjectFile, kind: str) -> None:
    store = object_store(bucket, **timeouts(kind))
    store.upload([large])
    s3.faults = [Fault("GET .*file.bin", kind, after_bytes=4_000_000), Fault("GET .*file.bin", kind)]
    back = ObjectFile(large.key, large.path.with_name("back"), large.sha256, large.num_bytes)
    store.download(back)
    assert [fault.times for fault in s3.faults] == [0, 0]
    assert back.path.read_bytes() == large.path.read_bytes()
    if kind in ("reset download", "cut download"):
        starts = [int(start) for head in s3.heads for start in re.findall(r"(?i)^range: bytes=(\d+)-", head, re.M)]
        assert len(starts) == 2 and min(starts) > 0, "it resumed after both breaks"


@pytest.mark.parametrize("kind", ["drip upload", "drip download"])
def test_a_slow_transfer_is_not_a_stalled_one(s3: FaultyProxy, bucket: str, large: ObjectFile, kind: str) -> None:
    store = object_store(bucket, read_seconds=4, attempts=1)
    start = time.monotonic()
    s3.faults = [Fault("PUT .*partNumber=2", kind)] if kind == "drip upload" else []
    store.upload([large])
    s3.faults += [Fault("GET .*file.bin", kind)] if kind == "drip download" else []
    back = ObjectFile(large.key, large.path.with_name("back"), large.sha256, large.num_bytes)
    store.download(back)
    assert s3.faults[0].times == 0 and time.monotonic() - start > 4, "it took longer than the read timeout"
    assert back.path.read_bytes() == large.path.read_bytes()
    assert store.holds(large, read_bytes=True)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("busy", "the server answered 503 SlowDown Reduce your request rate, 2 times; run the same command again"),
        ("stall", "no answer in time, 2 times; run the same command again"),
        ("reset upload", "the connection broke"),
        ("corrupt upload", "(attempt 2); run the same command again"),
    ],
)
def test_an_upload_that_keeps_failing_leaves_nothing(
    s3: FaultyProxy, bucket: str, unfinished: Callable[[], list[str]], large: ObjectFile, kind: str, text: str
) -> None:
    store = object_store(bucket, attempts=2, **timeouts(kind))
    s3.faults = [Fault("PUT .*partNumber=2", kind, FOREVER)]
    with pytest.raises(StorageError) as caught:
        store.upload([large])
    sentence = str(caught.value)
    assert sentence.startswith(f"s3://{bucket}/team/runs/deep/file.bin") and text in sentence and "\n" not in sentence
    assert not store.holds(large)
    assert kind == "corrupt upload" or store.info(large.key) is None
    assert unfinished() == []


@pytest.mark.parametrize("kind", ["busy", "stall", "reset download", "cut download", "corrupt download"])
def test_a_download_that_keeps_failing_leaves_nothing(s3: FaultyProxy, bucket: str, tmp_path: Path, kind: str) -> None:
    store, file = object_store(bucket, attempts=2, **timeouts(kind)), file_of(tmp_path / "file", 200_000)
    store.upload([file])
    s3.faults = [Fault("GET .*file.bin", kind, FOREVER, after_bytes=0)]
    back = ObjectFile(file.key, tmp_path / "back" / "file", file.sha256, file.num_bytes)
    with pytest.raises(StorageError, match=r"s3://.*/deep/file.bin: "):
        store.download(back)
    assert list((tmp_path / "back").iterdir()) == []


def test_a_file_that_differs_from_its_manifest_is_never_uploaded(
    s3: FaultyProxy, bucket: str, unfinished: Callable[[], list[str]], large: ObjectFile
) -> None:
    store = object_store(bucket)
    data = bytearray(large.path.read_bytes())
    data[-1] ^= 1
    large.path.write_bytes(data)
    with pytest.raises(StorageError, match=r"large.bin: .* the file was changed and is not uploaded"):
        store.upload([large])
    assert store.info(large.key) is None, "obstore completes nothing that was not read to its end"
    assert unfinished() == []


def test_an_upload_whose_file_fails_midway_leaves_nothing(
    s3: FaultyProxy, bucket: str, unfinished: Callable[[], list[str]], large: ObjectFile
) -> None:
    """A truncated file is shorter than its manifest says; pyarrow's stream would complete the shorter object."""
    with large.path.open("r+b") as stream:
        stream.truncate(PART_BYTES + 5)
    store = object_store(bucket)
    with pytest.raises(StorageError, match="the file was changed and is not uploaded"):
        store.upload([large])
    large.path.unlink()
    with pytest.raises(FileNotFoundError):
        store.upload([large])
    assert store.info(large.key) is None and unfinished() == []


def test_a_failing_file_stops_the_others(
    s3: FaultyProxy, bucket: str, tmp_path: Path, unfinished: Callable[[], list[str]], large: ObjectFile
) -> None:
    store, other = object_store(bucket), file_of(tmp_path / "other", PART_BYTES + 1, "other.bin")
    large.path.write_bytes(b"changed")
    with pytest.raises(StorageError, match="the file was changed"):
        store.upload([large, other])
    assert store.info("other.bin") is None and unfinished() == []


def test_objects_uploaded_by_the_earlier_client_are_recognised(
    s3: FaultyProxy, s3_server: S3Server, bucket: str, tmp_path: Path
) -> None:
    """Earlier versions used boto3; the noted digest kept its place."""
    store, file = object_store(bucket), file_of(tmp_path / "small", 1000)
    boto_client(s3_server).put_object(
        Bucket=bucket, Key=f"team/runs/{file.key}", Body=file.path.read_bytes(), Metadata={"sha256": file.sha256}
    )
    assert store.holds(file)
    assert store.holds(file, read_bytes=True)


def test_encrypted_objects_whose_etag_is_no_md5_are_accepted(
    s3: FaultyProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SSE-KMS an ETag has the form of an MD5 without being one; this server has no KMS."""
    monkeypatch.setattr("pipelines.storage.object_store._md5", lambda data: b"0" * 16)
    store, files = object_store(bucket), [file_of(tmp_path / name, 10_000, name) for name in ("one", "two")]
    store.upload(files[:1])
    assert any(line.startswith("GET ") for line in s3.seen), "the first one was read back"
    s3.seen.clear()
    store.upload(files[1:])
    assert not any(line.startswith("GET ") for line in s3.seen)
    assert all(store.holds(file, read_bytes=True) for file in files)


def test_a_conditional_write_loses_to_an_earlier_one(s3: FaultyProxy, bucket: str) -> None:
    """rclone ignores the condition, so the proxy answers as a server that honours it."""
    store = object_store(bucket)
    assert store.write_new("pointer", b"first")
    put = next(head for head in s3.heads if head.startswith("PUT "))
    assert "if-none-match: *" in put.lower()
    s3.faults = [Fault("PUT .*pointer", "exists")]
    assert not store.write_new("pointer", b"second")
    assert store.read("pointer") == b"first"
    s3.faults = [Fault("PUT .*other", "no conditions")]
    assert store.write_new("other", b"third"), "a server without conditional writes gets an unconditional one"
    assert store.read("other") == b"third"


def test_a_forked_process_downloads_through_another_one(
    s3: FaultyProxy, bucket: str, tmp_path: Path, large: ObjectFile
) -> None:
    store = object_store(bucket)
    store.upload([large])
    back = ObjectFile(large.key, tmp_path / "back", large.sha256, large.num_bytes)
    absent = ObjectFile("absent.bin", tmp_path / "absent", large.sha256, large.num_bytes)

    def in_child(results: "SimpleQueue[str]") -> None:
        done: list[None] = []
        download_files(store, [back], lambda: done.append(None))
        for attempt in (lambda: download_files(store, [absent], lambda: None), lambda: store.read("x")):
            try:
                attempt()
            except StorageError as error:
                results.put(str(error))
        results.put(str(len(done)))

    context = get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=in_child, args=(results,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert results.get() == (
        f"s3://{bucket}/team/runs/absent.bin: no such object; fix: throughline run --set verify=digest"
    )
    assert "start it with 'spawn'" in results.get()
    assert results.get() == "1"
    assert back.path.read_bytes() == large.path.read_bytes()


def test_objects_are_listed_by_prefix(s3: FaultyProxy, bucket: str) -> None:
    store = object_store(bucket)
    for key in ("a/1/x", "a/1/y", "a/12/z", "b/3"):
        store.write(key, key.encode())
    assert store.folders("") == ["a", "b"]
    assert store.folders("a/") == ["1", "12"]
    assert store.folders("a/12") == ["12"]
    assert store.folders("a/1") == ["1", "12"], "a prefix may end within a name"
    assert set(store.keys("a/1")) == {"a/1/x", "a/1/y", "a/12/z"}
    assert {key: size for key, (size, _) in store.keys("a/1/").items()} == {"a/1/x": 5, "a/1/y": 5}
    assert store.read("a/12/z") == b"a/12/z"
    assert store.read("a/12/absent") is None
    assert store.digest("absent") is None


def test_wrong_settings_are_reported_in_one_sentence(
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


@pytest.mark.parametrize("in_environment", [True, False])
def test_profile_files_of_aws_give_credentials_endpoint_and_region(
    s3: FaultyProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_environment: bool
) -> None:
    keys = tmp_path / "credentials"
    keys.write_text(f"[team]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    config = tmp_path / "config"
    config.write_text(f"[profile team]\nregion = eu-west-1\nendpoint_url = {s3.endpoint}\n")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "team")
    if in_environment:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        monkeypatch.setenv("AWS_REGION", "eu-west-1")
        config.write_text("[profile team]\nregion = us-west-1\nendpoint_url = http://127.0.0.1:1\n")
    object_store(bucket).write("key", b"x")
    assert "/eu-west-1/s3/" in s3.heads[-1]
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(StorageError, match=r"The config profile \(absent\) could not be found; check the AWS settings"):
        object_store(bucket).check()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.clients.find_spec", lambda name: None)
    with pytest.raises(ThroughlineError, match=r"gs://bucket: the package obstore is not installed; install the extra"):
        ObjectStore(StoreConfig(url="gs://bucket")).write_new("key", b"")


def test_urls_of_stores() -> None:
    assert StoreConfig(url="s3://bucket").prefix == ""
    assert StoreConfig(url="s3://bucket/a/b/").prefix == "a/b/"
    for url in ("gs://bucket/x", "az://container/x"):
        config = StoreConfig(url=url)
        assert (config.prefix, ObjectStore(config).url("key")) == ("x/", f"{url}/key")
    for url in ("hdfs://bucket/x", "s3://", "/folder", "s3:bucket"):
        with pytest.raises(ValueError, match=r"expected s3://bucket, gs://bucket or az://container"):
            StoreConfig(url=url)


@pytest.mark.parametrize(
    ("url", "variable"), [("gs://bucket", "GOOGLE_APPLICATION_CREDENTIALS"), ("az://box", "AZURE_STORAGE_ACCOUNT_NAME")]
)
def test_missing_credentials_of_google_and_azure_are_one_sentence(
    url: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    if url.startswith("gs"):
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "absent.json"))
    with pytest.raises(StorageError) as caught:
        ObjectStore(StoreConfig(url=url)).check()
    assert str(caught.value).startswith(f"{url}: ") and variable in str(caught.value)
