"""Output roots in an Azure container, against the emulator azurite (`npm install -g azurite`); skipped without it."""

import base64
import hmac
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from pipelines.storage.config import StoreConfig
from pipelines.storage.mirror import bind, store_of
from pipelines.storage.object_store import ObjectStore
from pipelines.storage.store_errors import StorageError
from tests.pipelines.runner.toy_stage import ToyConfig
from tests.pipelines.storage.store_stage import STAGE
from tests.s3_server import TRANSFER, free_port

PROGRAM = shutil.which("azurite-blob")
ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"a key of the tests, 32 bytes long").decode()

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="azurite is not installed")]


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    port = free_port()
    monkeypatch.setenv("AZURITE_ACCOUNTS", f"{ACCOUNT}:{KEY}")
    command = [str(PROGRAM), "--blobPort", str(port), "--location", str(tmp_path / "azurite")]
    process = subprocess.Popen([*command, "--silent", "--skipApiVersionCheck", "--disableTelemetry"])
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "azurite did not start"
            time.sleep(0.1)
    endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
    _create_container(endpoint, "box")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
    yield "az://box/team/runs"
    process.kill()
    process.wait()


def _create_container(endpoint: str, name: str) -> None:
    date, version = formatdate(usegmt=True), "2021-08-06"
    resource = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n{resource}"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), signed.encode(), "sha256")).decode()
    headers = {"x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
    request = urllib.request.Request(f"{endpoint}/{name}?restype=container", b"", headers, method="PUT")
    request.add_unredirected_header("Content-type", "")
    urllib.request.urlopen(request).close()


def test_an_output_root_in_a_container(container: str, tmp_path: Path) -> None:
    roots = [tmp_path / "here", tmp_path / "there"]
    for root in roots:
        bind(root, StoreConfig(url=container, transfer=TRANSFER))
    made = STAGE.run(ToyConfig(count_file=str(tmp_path / "count")), {}, roots[0])
    found = STAGE.run(ToyConfig(count_file=str(tmp_path / "count")), {}, roots[1])
    assert (tmp_path / "count").read_text() == "x", "the second machine computed nothing"
    assert not found.is_here
    assert found.path("large.bin").read_bytes() == made.path("large.bin").read_bytes()
    store = store_of(roots[0])
    assert store is not None and store.damaged(found.manifest) == []
    assert store.stages() == ["stored"]


def test_conditional_writes_and_reads(container: str) -> None:
    store = ObjectStore(StoreConfig(url=container, transfer=TRANSFER))
    assert store.write_new("pointer", b"first") and not store.write_new("pointer", b"second")
    info = store.info("pointer")
    assert info is not None and store.read_range("pointer", 1, 3, info.etag) == b"ir"
    store.write("pointer", b"third")
    with pytest.raises(StorageError, match="the object was replaced while it was read"):
        store.read_range("pointer", 1, 3, info.etag)


def test_a_missing_container_is_one_sentence(container: str) -> None:
    with pytest.raises(StorageError, match=r"^az://absent: no such bucket; create it, or correct the URL$"):
        ObjectStore(StoreConfig(url="az://absent")).check()
