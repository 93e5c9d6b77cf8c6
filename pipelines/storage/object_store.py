"""Objects under a prefix of S3, Google Cloud Storage or Azure: complete or absent, verified in both directions.

What the objects mean is up to `mirror`. The client is obstore: it aborts a multipart upload whose source fails, where
pyarrow's stream completes a truncated object (apache/arrow issue 40502). obstore's threads do not survive a fork: in a
forked process every method raises StorageError, and `downloads` fetches files through another process.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from pipelines.core.atomic import atomic_writer
from pipelines.storage.clients import connect, is_forked, require_obstore
from pipelines.storage.config import StoreConfig
from pipelines.storage.store_errors import AGAIN, StorageError, parse_error, sentence

SHA256_ATTRIBUTE = "sha256"
"""Metadata of an object in which its uploader notes the digest of the content."""
_MAX_PARTS = 10_000
_CHUNK_BYTES = 1 << 20
_FIX = "fix: throughline run --set verify=digest"
_MD5 = re.compile(r"[0-9a-f]{32}(-\d+)?")
_ResultT = TypeVar("_ResultT")


class _CorruptedError(Exception):
    """Bytes changed or got lost on the way; worth another attempt."""


@dataclass(frozen=True)
class ObjectFile:
    """A local file and its object, before or after the transfer."""

    key: str
    path: Path
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class ObjectInfo:
    """Properties of an object, read without its content."""

    num_bytes: int
    etag: str
    sha256: str | None
    """Digest noted in the object's metadata by its uploader; not verified by the server."""


class ObjectStore:
    """The objects under one prefix; keys are relative to it. Threads may share a store.

    Every method raises StorageError where the server is unreachable, refuses, or keeps failing.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self._transfer = config.transfer
        self._etags_are_md5 = True

    def __reduce__(self) -> tuple[type[Self], tuple[StoreConfig]]:
        return type(self), (self.config,)

    def url(self, key: str) -> str:
        """Return the URL of an object."""
        return f"{self.config.bucket_url}/{self.config.prefix}{key}"

    def check(self) -> None:
        """Send one request; raises StorageError that tells what is wrong with bucket, endpoint or credentials."""
        with self._translate_errors(""):
            next(iter(self._reader.list(self._path("") or None, chunk_size=1)), None)

    def info(self, key: str) -> ObjectInfo | None:
        """Return the properties of an object, or None where there is none."""
        answer = self._get(key, {"head": True})
        if answer is None:
            return None
        return ObjectInfo(answer.meta["size"], _bare(answer.meta["e_tag"]), _noted_sha256(answer.attributes))

    def receive(self, key: str, write: Callable[[Any], Any]) -> bool:
        """Pass an object's bytes to `write`, in order, each once; return whether there is an object.

        obstore resumes a broken download with a range request, as long as the object is the same.
        """
        answer = self._get(key, {})
        if answer is None:
            return False
        with self._translate_errors(key):
            for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES):
                write(chunk)
        return True

    def read(self, key: str) -> bytes | None:
        """Return the content of a small object, or None where there is none."""
        chunks: list[bytes] = []
        return b"".join(chunks) if self.receive(key, chunks.append) else None

    def digest(self, key: str) -> tuple[str, int] | None:
        """Return SHA-256 and size of an object by reading it; None where there is no object."""
        content, num_bytes = hashlib.sha256(), 0

        def count(chunk: bytes) -> None:
            nonlocal num_bytes
            content.update(chunk)
            num_bytes += len(chunk)

        return (content.hexdigest(), num_bytes) if self.receive(key, count) else None

    def download(self, file: ObjectFile) -> None:
        """Put an object's bytes at the file's path, complete and with the stated digest, or not at all.

        Raises StorageError where the object is missing or differs; wrong bytes never appear at the path.
        """
        file.path.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> None:
            with atomic_writer(file.path) as stream:
                if not self.receive(file.key, stream.write):
                    raise StorageError(f"{self.url(file.key)}: no such object; {_FIX}")
                if (stream.num_bytes, stream.sha256) != (file.num_bytes, file.sha256):
                    raise _CorruptedError(
                        f"{stream.num_bytes} bytes of SHA-256 {stream.sha256[:12]}..., the manifest says "
                        f"{file.num_bytes} of {file.sha256[:12]}..."
                    )

        self._retry(file.key, attempt, f"the object is damaged; {_FIX}")

    def download_all(self, files: Sequence[ObjectFile], on_done: Callable[[], None] = lambda: None) -> None:
        """Download files in parallel; at the first failure no further one is begun."""
        with ThreadPoolExecutor(self._transfer.threads) as pool:
            try:
                for _ in pool.map(self.download, files):
                    on_done()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def read_range(self, key: str, start: int, end: int, etag: str) -> bytes:
        """Return bytes `start` to `end` (exclusive) of the object with this ETag."""

        def attempt() -> bytes:
            answer = self._get(key, {"range": (start, end), "if_match": f'"{etag}"'})
            if answer is None:
                raise StorageError(f"{self.url(key)}: the object was deleted while it was read; {AGAIN}")
            data = bytes(answer.bytes())
            if len(data) != end - start:
                raise _CorruptedError(f"{len(data)} bytes of a range of {end - start}")
            return data

        return self._retry(key, attempt)

    def write(self, key: str, data: bytes) -> None:
        """Write a small object, replacing any other."""
        self._put(key, data, "overwrite")

    def write_new(self, key: str, data: bytes) -> bool:
        """Write a small object unless the key exists, and return whether it was written.

        On a server without conditional writes the write is unconditional: of two writers the last one wins. An attempt
        whose answer got lost counts as another writer's.
        """
        try:
            self._put(key, data, "create")
        except StorageError as error:
            from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

            cause = error.__cause__
            if isinstance(cause, (AlreadyExistsError, PreconditionError)):
                return False
            is_unsupported = cause is not None and parse_error(cause).code == "NotImplemented"
            if not (is_unsupported or isinstance(cause, NotSupportedError)):
                raise
            self.write(key, data)
        return True

    def upload(self, files: Sequence[ObjectFile], on_done: Callable[[ObjectFile], None] = lambda file: None) -> None:
        """Upload files in parallel, those above `part_bytes` one after another in parallel parts, and verify each.

        At the first failure no further file is begun and running multipart uploads are aborted; finished objects stay,
        and the next attempt finds them with `holds`.
        """
        small = [file for file in files if file.num_bytes <= self._transfer.part_bytes]
        large = [file for file in files if file.num_bytes > self._transfer.part_bytes]
        stop = threading.Event()
        with ThreadPoolExecutor(self._transfer.threads) as pool:
            try:
                for future, file in {pool.submit(self._upload, file, stop): file for file in small}.items():
                    future.result()
                    on_done(file)
                for file in large:
                    pool.submit(self._upload, file, stop).result()  # in a thread, so that Ctrl-C is seen at once
                    on_done(file)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def holds(self, file: ObjectFile, *, read_bytes: bool = False) -> bool:
        """Return whether the store has this file: by size and noted digest, or by reading every byte."""
        if read_bytes:
            return self.digest(file.key) == (file.sha256, file.num_bytes)
        info = self.info(file.key)
        return info is not None and (info.num_bytes, info.sha256) == (file.num_bytes, file.sha256)

    def folders(self, prefix: str) -> list[str]:
        """Return the names, up to the next slash, of the folders whose keys begin with `prefix`."""
        parent, _, start = prefix.rpartition("/")
        with self._translate_errors(prefix):
            found = self._reader.list_with_delimiter(self._path(parent) or None)["common_prefixes"]
        names = [path.rstrip("/").rpartition("/")[2] for path in found]
        return sorted(name for name in names if name.startswith(start))

    def keys(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Return key -> (size, ETag) of all objects whose keys begin with `prefix`."""
        skipped = len(self.config.prefix)
        with self._translate_errors(prefix):
            found = self._reader.list(self._path(prefix.rpartition("/")[0]) or None, chunk_size=1000).collect()
        objects = {item["path"][skipped:]: (item["size"], _bare(item["e_tag"])) for item in found}
        return {key: objects[key] for key in sorted(objects) if key.startswith(prefix)}

    @cached_property
    def _reader(self) -> Any:
        return connect(self.config, self._transfer.read_seconds)

    @cached_property
    def _writer(self) -> Any:
        return connect(self.config, self._transfer.upload_seconds)

    def _path(self, key: str) -> str:
        return f"{self.config.prefix}{key}".rstrip("/")

    def _get(self, key: str, options: dict[str, Any]) -> Any:
        """Return obstore's answer, or None where there is no such object."""
        with self._translate_errors(key):
            try:
                return self._reader.get(self._path(key), options=options)
            except FileNotFoundError as error:
                if parse_error(error).is_missing_bucket:
                    raise
                return None

    def _put(self, key: str, data: bytes, mode: str) -> None:
        sha256, md5 = hashlib.sha256(data).hexdigest(), _md5(data).hex()

        def attempt() -> None:
            nonlocal mode
            attributes = {SHA256_ATTRIBUTE: sha256}
            result = self._writer.put(self._path(key), data, attributes=attributes, mode=mode, use_multipart=False)
            mode = "overwrite"  # the object is ours now, even if its content has to be sent again
            if not self._is_intact(key, _bare(result["e_tag"]), md5, sha256, len(data)):
                raise _CorruptedError(f"sent bytes of MD5 {md5}, the server received {_bare(result['e_tag'])}")

        self._retry(key, attempt, retry_unanswered=mode == "create")  # which obstore does not

    def _upload(self, file: ObjectFile, stop: threading.Event) -> None:
        part_bytes = max(self._transfer.part_bytes, -(-file.num_bytes // _MAX_PARTS))
        in_parts = file.num_bytes > part_bytes

        def attempt() -> None:
            parts = _CheckedParts(file, part_bytes, stop)
            try:
                self._writer.put(
                    self._path(file.key),
                    iter(parts) if in_parts else b"".join(parts),
                    attributes={SHA256_ATTRIBUTE: file.sha256},
                    use_multipart=in_parts,
                    chunk_size=part_bytes,
                    max_concurrency=self._transfer.threads,
                )
            except FileNotFoundError as error:
                # The answer to the last request got lost: the upload is gone because it is the object now.
                if error.errno is not None or not self.holds(file):
                    raise
            self._verify(file, parts.md5)

        self._retry(file.key, attempt)

    def _verify(self, file: ObjectFile, md5: str) -> None:
        """Compare the object with its file; empty one that differs, so that `holds` never takes it for the file."""
        info = self.info(file.key)
        if info is None or info.num_bytes != file.num_bytes:
            found = "nothing" if info is None else f"{info.num_bytes} bytes"
        elif self._is_intact(file.key, info.etag, md5, file.sha256, file.num_bytes):
            return
        else:
            found = f"MD5 {info.etag}"
        self._writer.put(self._path(file.key), b"", use_multipart=False)
        raise _CorruptedError(f"sent {file.num_bytes} bytes of MD5 {md5}, the store has {found}")

    def _is_intact(self, key: str, etag: str, md5: str, sha256: str, num_bytes: int) -> bool:
        """Return whether an ETag, which many servers make of the MD5 of the content, fits what was sent.

        ETags of encrypted objects look like an MD5 and are none: the first such object is read back, and from then on
        ETags are not compared.
        """
        if not (self._etags_are_md5 and _MD5.fullmatch(etag)) or etag == md5:
            return True
        if self.digest(key) != (sha256, num_bytes):
            return False
        self._etags_are_md5 = False
        return True

    def _retry(
        self, key: str, attempt: Callable[[], _ResultT], next_step: str = AGAIN, *, retry_unanswered: bool = False
    ) -> _ResultT:
        """Return the result of `attempt`, trying again where bytes were changed or lost on the way."""
        for number in range(1, self._transfer.attempts + 1):
            try:
                with self._translate_errors(key):
                    return attempt()
            except _CorruptedError as error:
                failure: Exception = StorageError(
                    f"{self.url(key)}: {str(error).rstrip('.')} (attempt {number}); {next_step}"
                )
                failure.__cause__ = error
            except StorageError as error:
                answer = None if error.__cause__ is None else parse_error(error.__cause__)
                if answer is None or not (answer.is_retryable or (retry_unanswered and answer.is_unanswered)):
                    raise
                failure = error
            if number < self._transfer.attempts:
                time.sleep(min(0.1 * 2**number, 5.0))
        raise failure

    @contextmanager
    def _translate_errors(self, key: str) -> Iterator[None]:
        """Turn obstore's exceptions into one sentence about the object."""
        if is_forked():
            raise StorageError(
                f"{self.url(key)}: this process was forked from one that used the store; start it with 'spawn'"
            )
        require_obstore(self.config)
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError, ValueError) as error:
            if isinstance(error, FileNotFoundError) and error.errno is not None:
                raise  # a local file
            answer = parse_error(error)
            text = sentence(self.config.scheme, self.url(key), self.config.bucket_url, answer)
            raise StorageError(text) from error


class _CheckedParts:
    """Parts of a file, read once; the last one is followed by StorageError if the file is not the manifest's.

    The exception makes obstore abort the upload before anything is visible.
    """

    def __init__(self, file: ObjectFile, part_bytes: int, stop: threading.Event) -> None:
        self._file, self._part_bytes, self._stop = file, part_bytes, stop
        self.md5 = ""
        """MD5 as S3 puts it into ETags: of one part, or of the digests of several. Known after the last part."""

    def __iter__(self) -> Iterator[bytes]:
        file, content, num_bytes, digests = self._file, hashlib.sha256(), 0, []
        with file.path.open("rb") as stream:
            while data := stream.read(self._part_bytes):
                if self._stop.is_set():
                    raise StorageError(f"{file.path}: its upload was stopped")
                content.update(data)
                digests.append(_md5(data))
                num_bytes += len(data)
                yield data
        sha256 = content.hexdigest()
        if (num_bytes, sha256) != (file.num_bytes, file.sha256):
            raise StorageError(
                f"{file.path}: {num_bytes} bytes of SHA-256 {sha256[:12]}..., its manifest says {file.num_bytes} of "
                f"{file.sha256[:12]}...; the file was changed and is not uploaded, delete its folder and re-run its "
                "stage"
            )
        if num_bytes > self._part_bytes:
            self.md5 = f"{_md5(b''.join(digests)).hex()}-{len(digests)}"
        else:
            self.md5 = (digests or [_md5(b"")])[0].hex()


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _bare(etag: str | None) -> str:
    return (etag or "").strip('"')


def _noted_sha256(attributes: Any) -> str | None:
    stated = {name.lower(): value for name, value in attributes.items()}.get(SHA256_ATTRIBUTE, "")
    return stated if re.fullmatch("[0-9a-f]{64}", stated) else None
