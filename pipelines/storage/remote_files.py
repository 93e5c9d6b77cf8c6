"""Source files on web servers and in object stores: found by URL, described without being read, copied whole.

A file's identity is the SHA-256 of its content. Where the server states it (the Hugging Face hub for large files, an
object store for objects with the metadata ``sha256``) it is taken from there and verified when the file is read;
otherwise the file is read once, and again only when its ETag changes.
"""

import glob
import io
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pipelines.core.atomic import atomic_writer, exclusive
from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError
from pipelines.storage.config import StoreConfig, is_store_url
from pipelines.storage.object_store import ObjectStore

_WEB = ("https://", "http://")
_ATTEMPTS = 5
_CONNECT_SECONDS = 10.0
_READ_SECONDS = 60.0
_RANGE_BYTES = 1 << 18
"""Smallest range request; covers most parquet footers."""
_HUB = "huggingface.co"
_NO_HEAD = frozenset({403, 405, 501})
"""Answers to HEAD of servers that support GET only, such as those behind signed URLs."""
_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, with the properties that the server states."""

    url: str
    num_bytes: int
    etag: str
    """ETag, or else time of the last change; empty where the server states neither."""
    sha256: str | None = None
    """Digest of the content, where the server states one."""

    def __str__(self) -> str:
        return self.url

    def copy(self, folder: Path) -> Path:
        """Return a copy of this version of the file under `folder`, downloaded once; raises ThroughlineError."""
        name = digest_json([self.url, self.etag, self.num_bytes])
        path = folder / name / file_name(self.url)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(folder / f"{name}.lock"):
                if not path.is_file():
                    self._download(path)
        return path

    def _download(self, path: Path) -> None:
        with atomic_writer(path) as stream:
            if is_store_url(self.url):
                store, key = _object(self.url)
                if not store.receive(key, stream.write):
                    raise ThroughlineError(f"{self.url}: the object was deleted; name another source")
            else:
                _receive(self, stream.write)
            if stream.num_bytes != self.num_bytes or (self.sha256 and stream.sha256 != self.sha256):
                raise ThroughlineError(
                    f"{self.url}: {stream.num_bytes} bytes of SHA-256 {stream.sha256[:12]}..., the server stated "
                    f"{self.num_bytes}{f' of {self.sha256[:12]}...' if self.sha256 else ''}; run again, or "
                    "download it by hand"
                )

    def read_range(self, start: int, end: int) -> bytes:
        """Return bytes `start` to `end` (exclusive)."""
        if is_store_url(self.url):
            store, key = _object(self.url)
            return store.read_range(key, start, end, self.etag)
        return _get_range(self, start, end)


class RangeReader(io.RawIOBase):
    """A file on a server as a seekable stream, for readers that need a small part of it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._place = 0
        self._start, self._data = 0, b""

    def __str__(self) -> str:
        return self._file.url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.num_bytes}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._place + len(view), self._file.num_bytes)
        if end <= self._place:
            return 0
        if not (self._start <= self._place and end <= self._start + len(self._data)):
            # A footer is read backwards from its end, so the bytes before it are fetched in the same request.
            self._start = max(0, min(self._place, end - _RANGE_BYTES))
            self._data = self._file.read_range(self._start, end)
        data = self._data[self._place - self._start : end - self._start]
        view[: len(data)] = data
        self._place = end
        return len(data)


def is_url(source: str) -> bool:
    """Return whether a source is a URL."""
    return is_store_url(source) or source.startswith(_WEB)


def file_name(url: str) -> str:
    """Return the last segment of a URL's path."""
    return unquote(PurePosixPath(urlsplit(url).path).name)


def find_files(source: str, suffix: str) -> list[tuple[str, RemoteFile]]:
    """Return (name, file) of one file by URL, or of all files ending with `suffix` of a store's prefix or pattern.

    Names are as for local folders and globs. Raises ThroughlineError where nothing is found or access is denied.
    """
    if source.startswith(_WEB):
        if not file_name(source).lower().endswith(suffix):
            raise ThroughlineError(f"{source}: expected the URL of a {suffix} file; a web server can't list a folder")
        return [(file_name(source), _describe(source))]
    store, key = _object(source)
    if key.lower().endswith(suffix) and not glob.has_magic(key):
        info = store.info(key)
        if info is None:
            raise ThroughlineError(f"{source}: no such object; check the URL")
        return [(file_name(source), RemoteFile(source, info.num_bytes, info.etag, info.sha256))]
    is_pattern = glob.has_magic(key)
    prefix = re.split(r"[*?\[]", key, maxsplit=1)[0] if is_pattern else key.rstrip("/") + "/" * bool(key)
    matches = re.compile(_regex(key) if is_pattern else re.escape(prefix) + ".*").fullmatch
    found = []
    for name, (num_bytes, etag) in store.keys(prefix).items():
        relative = name.rpartition("/")[2] if is_pattern else name.removeprefix(prefix)
        is_hidden = any(segment.startswith((".", "_")) for segment in relative.split("/"))
        if name.lower().endswith(suffix) and not is_hidden and matches(name):
            found.append((relative, RemoteFile(store.url(name), num_bytes, etag)))
    if not found:
        raise ThroughlineError(f"{source}: no {suffix} file there; check the URL")
    return found


def with_stated_digest(file: RemoteFile) -> RemoteFile:
    """Return the file with the digest that its server states; a listing of objects lacks it."""
    if file.sha256 is not None or not is_store_url(file.url):
        return file
    store, key = _object(file.url)
    info = store.info(key)
    if info is None or info.etag != file.etag:
        raise ThroughlineError(f"{file.url}: the object was replaced or deleted since it was listed; run again")
    return RemoteFile(file.url, file.num_bytes, file.etag, info.sha256)


def _regex(pattern: str) -> str:
    """Return a glob as a regular expression: ``*`` and ``?`` match within a folder, ``**/`` any number of folders."""
    tokens = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", pattern)
    wildcards = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        wildcards.get(token) or (token.replace("[!", "[^") if token.startswith("[") else re.escape(token))
        for token in tokens
    )


def _object(url: str) -> tuple[ObjectStore, str]:
    scheme, _, path = url.partition("://")
    bucket, _, key = path.partition("/")
    return _store(f"{scheme}://{bucket}"), key


@lru_cache
def _store(url: str) -> ObjectStore:
    return ObjectStore(StoreConfig(url=url))


def _client(url: str) -> Any:
    import httpx

    headers = {"Accept-Encoding": "identity"}
    if urlsplit(url).hostname == _HUB:
        from huggingface_hub import get_token

        if token := get_token():  # gated data sets are served to logged-in accounts only
            headers["Authorization"] = f"Bearer {token}"
    timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
    return httpx.Client(headers=headers, timeout=timeout, follow_redirects=True)


def _retry(url: str, attempt: Callable[[], _ResultT]) -> _ResultT:
    """Return the result of `attempt`, trying again after broken connections and busy answers."""
    import httpx

    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status not in (408, 429) and status < 500:
                hint = "; it requires a login" if status in (401, 403) else ""
                raise ThroughlineError(f"{url}: the server answered {status}{hint}; check the URL") from error
            failure = f"the server answered {status}"
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__} {error}".strip()
        if number < _ATTEMPTS:
            time.sleep(0.25 * 2**number)
    raise ThroughlineError(f"{url}: {failure}, {_ATTEMPTS} times; run the same command again")


def _describe(url: str) -> RemoteFile:
    def attempt() -> RemoteFile:
        with _client(url) as client:
            answer = client.head(url)
            if answer.status_code in _NO_HEAD:
                with client.stream("GET", url, headers={"Range": "bytes=0-0"}) as answer:
                    pass
            answer.raise_for_status()
            # The hub states the digest of a large file in the redirect to its content.
            headers = {name: value for step in (*answer.history, answer) for name, value in step.headers.items()}
        size = answer.headers.get("content-range", "").rpartition("/")[2] or answer.headers.get("content-length", "")
        if not size.isdigit():
            raise ThroughlineError(f"{url}: the server doesn't state the size of the file; download it by hand")
        digest = headers.get("x-linked-etag", "").strip('"')
        etag = answer.headers.get("etag") or answer.headers.get("last-modified") or ""
        return RemoteFile(url, int(size), etag, digest if re.fullmatch("[0-9a-f]{64}", digest) else None)

    return _retry(url, attempt)


def _receive(file: RemoteFile, write: Callable[[bytes], Any]) -> None:
    """Pass a file's bytes to `write`, in order, each once, resuming after a broken connection."""
    received = 0

    def attempt() -> None:
        nonlocal received
        headers = {"Range": f"bytes={received}-"} if received else {}
        with _client(file.url) as client, client.stream("GET", file.url, headers=headers) as answer:
            answer.raise_for_status()
            _check_unchanged(file, answer)
            if received and answer.status_code != 206:
                raise ThroughlineError(f"{file.url}: broke off, and the server can't resume; download it by hand")
            for chunk in answer.iter_bytes():
                write(chunk)
                received += len(chunk)

    _retry(file.url, lambda: None if received == file.num_bytes else attempt())


def _get_range(file: RemoteFile, start: int, end: int) -> bytes:
    def attempt() -> bytes:
        with _client(file.url) as client:
            answer = client.get(file.url, headers={"Range": f"bytes={start}-{end - 1}"})
        answer.raise_for_status()
        _check_unchanged(file, answer)
        data = answer.content if answer.status_code == 206 else answer.content[start:end]
        if len(data) != end - start:
            raise ThroughlineError(f"{file.url}: {len(data)} bytes of a range of {end - start}; download it by hand")
        return data

    return _retry(file.url, attempt)


def _check_unchanged(file: RemoteFile, answer: Any) -> None:
    etag = answer.headers.get("etag") or answer.headers.get("last-modified") or ""
    if etag != file.etag:
        raise ThroughlineError(f"{file.url}: the file was replaced while it was read; run again")
