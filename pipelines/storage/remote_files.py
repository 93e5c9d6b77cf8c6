"""Files on web servers and in object stores: found by URL, described without being read, copied to a folder whole.

What makes a file the same file is its content: where a server vouches for its SHA-256 (S3 for objects uploaded with
that checksum, the Hugging Face hub for large files) it is taken from there and checked when the file is read;
elsewhere the file is read once. An ETag only says whether it has to be read again.
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
from pipelines.storage.s3 import SCHEME, ObjectStore, StoreConfig

_WEB = ("https://", "http://")
_ATTEMPTS = 5
_CONNECT_SECONDS = 10.0
_READ_SECONDS = 60.0
_RANGE_BYTES = 1 << 18
"""Least that is asked for at a time: a parquet file's footer, most often."""
_HUB = "huggingface.co"
_NO_HEAD = frozenset({403, 405, 501})
"""Answers of servers that know GET alone, such as those behind signed URLs."""
_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server, as the server describes it."""

    url: str
    num_bytes: int
    etag: str
    """ETag, or the time of its last change; empty where the server states neither."""
    sha256: str | None = None
    """Digest of the content, where the server vouches for one."""

    def __str__(self) -> str:
        return self.url

    def copy(self, folder: Path) -> Path:
        """Return a copy under `folder`, made if there is none of this very file; raises ThroughlineError."""
        place = digest_json([self.url, self.etag, self.num_bytes])
        path = folder / place / file_name(self.url)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(folder / f"{place}.lock"):
                if not path.is_file():
                    self._download(path)
        return path

    def _download(self, path: Path) -> None:
        with atomic_writer(path) as stream:
            if self.url.startswith(SCHEME):
                store, key = _object(self.url)
                if not store.receive(key, stream.write):
                    raise ThroughlineError(f"{self.url}: no such object any more; name another source")
            else:
                _receive(self, stream.write)
            if stream.num_bytes != self.num_bytes or (self.sha256 and stream.sha256 != self.sha256):
                raise ThroughlineError(
                    f"{self.url}: {stream.num_bytes} bytes of SHA-256 {stream.sha256[:12]}..., the server announced "
                    f"{self.num_bytes}{f' of {self.sha256[:12]}...' if self.sha256 else ''}; run again, or fetch it by "
                    "hand"
                )

    def read_range(self, start: int, end: int) -> bytes:
        """Return bytes `start` to `end` (exclusive)."""
        if self.url.startswith(SCHEME):
            store, key = _object(self.url)
            return store.read_range(key, start, end, self.etag)
        return _get_range(self, start, end)


class RangeReader(io.RawIOBase):
    """A file on a server as a stream that can be read anywhere, for what needs a small part of it."""

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
            # A footer is read from its end: what lies before it comes along, and is asked for next.
            self._start = max(0, min(self._place, end - _RANGE_BYTES))
            self._data = self._file.read_range(self._start, end)
        data = self._data[self._place - self._start : end - self._start]
        view[: len(data)] = data
        self._place = end
        return len(data)


def is_url(source: str) -> bool:
    """Whether a source is named by URL."""
    return source.startswith((SCHEME, *_WEB))


def file_name(url: str) -> str:
    """Return the last piece of a URL's path."""
    return unquote(PurePosixPath(urlsplit(url).path).name)


def find_files(source: str, suffix: str) -> list[tuple[str, RemoteFile]]:
    """Return (name, file) of one file by URL, or of all files of an S3 prefix or pattern that end with `suffix`.

    Names are as for folders and globs on a disk. Raises ThroughlineError where there is nothing, or no access.
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
    fixed = re.split(r"[*?\[]", key, maxsplit=1)[0] if glob.has_magic(key) else key.rstrip("/") + "/" * bool(key)
    matches = re.compile(_pattern(key) if glob.has_magic(key) else re.escape(fixed) + ".*").fullmatch
    found = []
    for name, (num_bytes, etag) in store.keys(fixed).items():
        below = name.removeprefix(fixed) if not glob.has_magic(key) else name.rpartition("/")[2]
        hidden = any(piece.startswith((".", "_")) for piece in below.split("/"))
        if name.lower().endswith(suffix) and not hidden and matches(name):
            found.append((below, RemoteFile(store.url(name), num_bytes, etag)))
    if not found:
        raise ThroughlineError(f"{source}: no {suffix} file there; check the URL")
    return found


def with_stated_digest(file: RemoteFile) -> RemoteFile:
    """Return the file with the digest that its server vouches for; a listing of many files doesn't say it."""
    if file.sha256 is not None or not file.url.startswith(SCHEME):
        return file
    store, key = _object(file.url)
    info = store.info(key)
    if info is None or info.etag != file.etag:
        raise ThroughlineError(f"{file.url}: was replaced or deleted meanwhile; run again")
    return RemoteFile(file.url, file.num_bytes, file.etag, info.sha256)


def _pattern(key: str) -> str:
    """Return a glob as a regular expression: ``*`` and ``?`` stay within a folder, ``**/`` crosses any number."""
    pieces = re.split(r"(\*\*/|\*|\?|\[[^\]]+\])", key)
    known = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(piece) or (piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )


def _object(url: str) -> tuple[ObjectStore, str]:
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    return _store(f"{SCHEME}{bucket}"), key


@lru_cache
def _store(url: str) -> ObjectStore:
    return ObjectStore(StoreConfig(url=url))


def _client(url: str) -> Any:
    import httpx

    headers = {"Accept-Encoding": "identity"}
    if urlsplit(url).hostname == _HUB:
        from huggingface_hub import get_token

        if token := get_token():  # published sets that ask for consent are given to accounts alone
            headers["Authorization"] = f"Bearer {token}"
    timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
    return httpx.Client(headers=headers, timeout=timeout, follow_redirects=True)


def _healing(url: str, attempt: Callable[[], _ResultT]) -> _ResultT:
    """Return what `attempt` returns, trying again after broken connections and busy answers."""
    import httpx

    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status not in (408, 429) and status < 500:
                hint = "; it asks for a login" if status in (401, 403) else ""
                raise ThroughlineError(f"{url}: the server answered {status}{hint}; check the URL") from error
            seen = f"the server answered {status}"
        except httpx.HTTPError as error:
            seen = f"{type(error).__name__} {error}".strip()
        if number < _ATTEMPTS:
            time.sleep(0.25 * 2**number)
    raise ThroughlineError(f"{url}: {seen}, {_ATTEMPTS} times; run the same command again")


def _describe(url: str) -> RemoteFile:
    def attempt() -> RemoteFile:
        with _client(url) as client:
            answer = client.head(url)
            if answer.status_code in _NO_HEAD:
                with client.stream("GET", url, headers={"Range": "bytes=0-0"}) as answer:
                    pass
            answer.raise_for_status()
            # The hub states the digest of a large file before it leads on to where that lies.
            stated = {name: value for step in (*answer.history, answer) for name, value in step.headers.items()}
        whole = answer.headers.get("content-range", "").rpartition("/")[2] or answer.headers.get("content-length", "")
        if not whole.isdigit():
            raise ThroughlineError(f"{url}: the server doesn't say how large the file is; fetch it by hand")
        digest = stated.get("x-linked-etag", "").strip('"')
        etag = answer.headers.get("etag") or answer.headers.get("last-modified") or ""
        return RemoteFile(url, int(whole), etag, digest if re.fullmatch("[0-9a-f]{64}", digest) else None)

    return _healing(url, attempt)


def _receive(file: RemoteFile, take: Callable[[bytes], Any]) -> None:
    """Hand a file's bytes on in order, each once, going on after a break."""
    received = 0

    def attempt() -> None:
        nonlocal received
        headers = {"Range": f"bytes={received}-"} if received else {}
        with _client(file.url) as client, client.stream("GET", file.url, headers=headers) as answer:
            answer.raise_for_status()
            _check_unchanged(file, answer)
            if received and answer.status_code != 206:
                raise ThroughlineError(f"{file.url}: broke off, and the server can't go on there; fetch it by hand")
            for piece in answer.iter_bytes():
                take(piece)
                received += len(piece)

    _healing(file.url, lambda: None if received == file.num_bytes else attempt())


def _get_range(file: RemoteFile, start: int, end: int) -> bytes:
    def attempt() -> bytes:
        with _client(file.url) as client:
            answer = client.get(file.url, headers={"Range": f"bytes={start}-{end - 1}"})
        answer.raise_for_status()
        _check_unchanged(file, answer)
        data = answer.content if answer.status_code == 206 else answer.content[start:end]
        if len(data) != end - start:
            raise ThroughlineError(f"{file.url}: {len(data)} bytes of a range of {end - start}; fetch it by hand")
        return data

    return _healing(file.url, attempt)


def _check_unchanged(file: RemoteFile, answer: Any) -> None:
    etag = answer.headers.get("etag") or answer.headers.get("last-modified") or ""
    if etag != file.etag:
        raise ThroughlineError(f"{file.url}: was replaced while it was read; run again")
