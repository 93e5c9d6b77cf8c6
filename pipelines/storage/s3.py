"""Objects under one S3 prefix: whole or not there, checked on the way in and out, faults healed or told in a sentence.

What the objects mean is the business of `mirror`. The client is boto3, from the extra ``s3``: pyarrow's S3
stream completes a truncated object when its writer fails, and has no way to abort (apache/arrow issue 40502).
Credentials, region and endpoint come from the variables and files that every AWS tool reads.
"""

import base64
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator

from pipelines.core.atomic import atomic_writer
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.storage.s3_errors import AGAIN, StorageError, error_code, sentence

SCHEME = "s3://"
_SHA256 = "sha256"
_MOST_PARTS = 10_000
_CHUNK_BYTES = 1 << 20
_AWS_HOST = ".amazonaws.com"
_ResultT = TypeVar("_ResultT")

_ABSENT = frozenset({"NoSuchKey", "404", "NotFound"})
_MANGLED = frozenset({"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"})
"""Answers after which the same bytes sent once more may arrive; boto3 repeats what is merely busy or unreachable."""
_UPLOAD_LOST = frozenset({"NoSuchUpload", "InvalidPart"})
"""Answers after which a multipart upload has to begin anew: another process aborted it."""
_EXISTS = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
_MEND = "`throughline run --set verify=digest` mends it"


class _MangledError(Exception):
    """Bytes changed or were lost on the way; worth another attempt."""


class TransferConfig(FrozenConfig):
    """How objects travel. Nothing here changes a result."""

    connect_seconds: float = Field(default=10.0, gt=0)
    """Longest wait for a connection, and for the server to take bytes."""
    read_seconds: float = Field(default=60.0, gt=0)
    """Longest silence of the server."""
    attempts: int = Field(default=6, ge=1, le=20)
    """Tries of one request, waiting up to 1, 2, 4, ... 20 seconds in between."""
    part_bytes: int = Field(default=16 << 20, ge=5 << 20, le=5 << 30)
    """Files above this are uploaded in parts of this size (more where there would be over 10,000); S3 takes no less
    than 5 MiB. Each of `threads` holds one part in memory."""
    threads: int = Field(default=8, ge=1, le=128)
    stale_upload_hours: float = Field(default=24.0, gt=0)
    """Unfinished multipart uploads older than this are aborted; younger ones may be another machine's."""


class StoreConfig(FrozenConfig):
    """An S3 prefix, ``s3://bucket`` or ``s3://bucket/prefix``."""

    url: str
    transfer: TransferConfig = TransferConfig()

    @field_validator("url")
    @classmethod
    def _is_s3(cls, url: str) -> str:
        if not url.startswith(SCHEME) or not url.removeprefix(SCHEME).strip("/"):
            raise ValueError(f"{url}: expected s3://bucket or s3://bucket/prefix")
        return url.rstrip("/")

    @property
    def bucket(self) -> str:
        return self.url.removeprefix(SCHEME).partition("/")[0]

    @property
    def prefix(self) -> str:
        """What every key begins with, closed by a slash; empty for a whole bucket."""
        path = self.url.removeprefix(SCHEME).partition("/")[2].strip("/")
        return f"{path}/" if path else ""


@dataclass(frozen=True)
class ObjectFile:
    """A local file and the object it is, or is to become."""

    key: str
    path: Path
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class ObjectInfo:
    """What a server says of an object without sending it."""

    num_bytes: int
    etag: str
    metadata: dict[str, str]
    sha256: str | None
    """Digest of the whole content where the server itself vouches for one."""


class ObjectStore:
    """The objects under one prefix; keys are relative to it. Safe to share between threads, and across a fork.

    Every method raises StorageError where the server can't be reached, refuses, or goes on failing.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self._transfer = config.transfer
        self._clients: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[StoreConfig]]:
        return type(self), (self.config,)

    def url(self, key: str) -> str:
        """Return how an object is named to people."""
        return f"{SCHEME}{self.config.bucket}/{self.config.prefix}{key}"

    def check(self) -> None:
        """Ask the server one question; raises StorageError that says what is wrong with bucket, endpoint or keys."""
        with self._told(""):
            self._client.list_objects_v2(Bucket=self.config.bucket, Prefix=self.config.prefix, MaxKeys=1)

    def info(self, key: str) -> ObjectInfo | None:
        """Return what the server says of an object, or None where there is none."""
        with self._told(key):
            answer = self._unless_absent(lambda: self._client.head_object(ChecksumMode="ENABLED", **self._place(key)))
        if answer is None:
            return None
        return ObjectInfo(
            answer["ContentLength"],
            answer["ETag"].strip('"'),
            {name.lower(): value for name, value in answer.get("Metadata", {}).items()},
            _stated_sha256(answer),
        )

    def receive(self, key: str, take: Callable[[bytes], Any]) -> bool:
        """Hand an object's bytes on in order, each once, going on after a break; return whether there is an object."""
        received, total, etag = 0, None, ""

        def attempt() -> bool:
            nonlocal received, total, etag
            from botocore.exceptions import BotoCoreError

            options = {"Range": f"bytes={received}-", "IfMatch": etag} if received else {}
            answer = self._unless_absent(lambda: self._client.get_object(**self._place(key), **options))
            if answer is None:
                return False
            if received and not answer.get("ContentRange", "").startswith(f"bytes {received}-"):
                raise _MangledError(f"the answer broke off after {received} bytes, and the server can't go on there")
            total, etag = received + answer["ContentLength"], answer["ETag"]
            try:
                for piece in answer["Body"].iter_chunks(_CHUNK_BYTES):
                    take(piece)
                    received += len(piece)
            except BotoCoreError as error:
                raise _MangledError(f"the answer broke off after {received} of {total} bytes ({error})") from error
            finally:
                answer["Body"].close()
            if received != total:
                raise _MangledError(f"the answer ended after {received} of {total} bytes")
            return True

        return self._heal(key, lambda: total == received or attempt())

    def read(self, key: str) -> bytes | None:
        """Return a small object whole, or None where there is none."""
        pieces: list[bytes] = []
        return b"".join(pieces) if self.receive(key, pieces.append) else None

    def digest(self, key: str) -> tuple[str, int] | None:
        """Return SHA-256 and size of what the server sends, keeping none of it; None where there is no object."""
        content, num_bytes = hashlib.sha256(), 0

        def take(piece: bytes) -> None:
            nonlocal num_bytes
            content.update(piece)
            num_bytes += len(piece)

        return (content.hexdigest(), num_bytes) if self.receive(key, take) else None

    def download(self, file: ObjectFile) -> None:
        """Put an object's bytes at the file's path, whole and with the stated digest, or not at all.

        Raises StorageError where the object is missing or is another; the wrong bytes are never seen at the path.
        """
        file.path.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> None:
            with atomic_writer(file.path) as stream:
                if not self.receive(file.key, stream.write):
                    raise StorageError(f"{self.url(file.key)}: no such object; {_MEND}")
                if (stream.num_bytes, stream.sha256) != (file.num_bytes, file.sha256):
                    raise _MangledError(
                        f"{stream.num_bytes} bytes of SHA-256 {stream.sha256[:12]}..., the manifest says "
                        f"{file.num_bytes} of {file.sha256[:12]}..."
                    )

        self._heal(file.key, attempt, f"the object is damaged; {_MEND}")

    def read_range(self, key: str, start: int, end: int, etag: str) -> bytes:
        """Return bytes `start` to `end` (exclusive) of the object that has this ETag."""
        from botocore.exceptions import BotoCoreError

        def attempt() -> bytes:
            answer = self._client.get_object(Range=f"bytes={start}-{end - 1}", IfMatch=f'"{etag}"', **self._place(key))
            try:
                data = answer["Body"].read()
            except BotoCoreError as error:
                raise _MangledError(f"the answer broke off ({error})") from error
            if len(data) != end - start:
                raise _MangledError(f"{len(data)} bytes of a range of {end - start}")
            return data

        return self._heal(key, attempt)

    def write(self, key: str, data: bytes) -> None:
        """Write a small object, whatever was there."""
        self._put(key, data, hashlib.sha256(data).hexdigest())

    def write_new(self, key: str, data: bytes) -> bool:
        """Write a small object unless there is one, and return whether it was written.

        A server without conditional writes is asked to write plainly: of two equal writers the last one stays.
        """
        from botocore.exceptions import ClientError

        try:
            self._put(key, data, hashlib.sha256(data).hexdigest(), IfNoneMatch="*")
        except StorageError as error:
            code = error_code(error.__cause__) if isinstance(error.__cause__, ClientError) else ""
            if code in _EXISTS:
                return False
            if code != "NotImplemented":
                raise
            self.write(key, data)
        return True

    def upload(self, files: Sequence[ObjectFile], on_done: Callable[[ObjectFile], None] = lambda file: None) -> None:
        """Upload files in parallel, those in parts that exceed `part_bytes`, and verify each.

        At the first failure nothing more is begun and every multipart upload of this call is aborted; what was
        uploaded whole stays, for the next attempt to find with `holds`.
        """
        small = [file for file in files if file.num_bytes <= self._transfer.part_bytes]
        large = [file for file in files if file.num_bytes > self._transfer.part_bytes]
        with ThreadPoolExecutor(self._transfer.threads) as pool:
            try:
                waiting = {pool.submit(self._upload_whole, file): file for file in small}
                for future, file in waiting.items():
                    future.result()
                    on_done(file)
                for file in large:
                    self._heal(file.key, partial(self._upload_in_parts, file, pool), codes=_UPLOAD_LOST)
                    on_done(file)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def holds(self, file: ObjectFile, *, read_bytes: bool = False) -> bool:
        """Whether the store has this very file: by size and the digest noted at its upload, or by all its bytes."""
        if read_bytes:
            return self.digest(file.key) == (file.sha256, file.num_bytes)
        info = self.info(file.key)
        return info is not None and (info.num_bytes, info.metadata.get(_SHA256)) == (file.num_bytes, file.sha256)

    def folders(self, prefix: str) -> list[str]:
        """Return the names, up to the next slash, of what lies below keys that begin with `prefix`."""
        start = len(self.config.prefix) + len(prefix.rpartition("/")[0]) + ("/" in prefix)
        pages = self._pages("list_objects_v2", Prefix=self.config.prefix + prefix, Delimiter="/")
        return sorted(item["Prefix"][start:].rstrip("/") for page in pages for item in page.get("CommonPrefixes", []))

    def keys(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Return key -> (size, ETag) of all objects whose keys begin with `prefix`."""
        pages = self._pages("list_objects_v2", Prefix=self.config.prefix + prefix)
        start = len(self.config.prefix)
        return {
            item["Key"][start:]: (item["Size"], item["ETag"].strip('"'))
            for page in pages
            for item in page.get("Contents", [])
        }

    def unfinished_uploads(self, prefix: str) -> list[tuple[str, str, datetime]]:
        """Return (key, upload id, start) of the multipart uploads that were begun and neither finished nor aborted."""
        from botocore.exceptions import ClientError

        pages = self._pages("list_multipart_uploads", Prefix=self.config.prefix + prefix)
        start = len(self.config.prefix)
        try:
            return [
                (item["Key"][start:], item["UploadId"], item["Initiated"])
                for page in pages
                for item in page.get("Uploads", [])
            ]
        except StorageError as error:
            # What some servers answer instead of an empty list.
            if isinstance(error.__cause__, ClientError) and error_code(error.__cause__) == "NoSuchUpload":
                return []
            raise

    def abort_stale_uploads(self, prefix: str) -> int:
        """Abort multipart uploads under `prefix` that are older than `stale_upload_hours`; return how many."""
        oldest = datetime.now(UTC) - timedelta(hours=self._transfer.stale_upload_hours)
        stale = [(key, upload) for key, upload, begun in self.unfinished_uploads(prefix) if begun < oldest]
        for key, upload in stale:
            self._abort(key, upload)
        return len(stale)

    @property
    def _client(self) -> Any:
        client = self._clients.get(os.getpid())
        if client is None:
            client = self._clients[os.getpid()] = self._connect()
        return client

    def _connect(self) -> Any:
        try:
            from boto3.session import Session
            from botocore.config import Config
        except ModuleNotFoundError as error:
            raise ThroughlineError(
                f"{self.config.url}: the package boto3 is not installed; install the extra 's3' of this project"
            ) from error

        def config(addressing: str) -> Any:
            return Config(
                connect_timeout=self._transfer.connect_seconds,
                read_timeout=self._transfer.read_seconds,
                retries={"mode": "standard", "total_max_attempts": self._transfer.attempts},
                max_pool_connections=2 * self._transfer.threads,
                # Newer checksums are trailers that many servers don't know. Content-MD5, and a signature over the
                # body's SHA-256 even where the connection is encrypted, have every server check what it receives.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": addressing, "payload_signing_enabled": True},
            )

        with self._told(""):
            session = Session()
            region = session.region_name or "us-east-1"
            client = session.client("s3", region_name=region, config=config("auto"))
            if _AWS_HOST in client.meta.endpoint_url:
                return client
            # Servers of one's own seldom have a host name for each bucket.
            return session.client("s3", region_name=region, config=config("path"))

    def _place(self, key: str) -> dict[str, str]:
        return {"Bucket": self.config.bucket, "Key": self.config.prefix + key}

    def _pages(self, operation: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        with self._told(arguments["Prefix"].removeprefix(self.config.prefix)):
            yield from self._client.get_paginator(operation).paginate(Bucket=self.config.bucket, **arguments)

    def _unless_absent(self, ask: Callable[[], _ResultT]) -> _ResultT | None:
        from botocore.exceptions import ClientError

        try:
            return ask()
        except ClientError as error:
            if error_code(error) in _ABSENT:
                return None
            raise

    def _put(self, key: str, data: bytes, sha256: str, **options: str) -> None:
        def attempt() -> None:
            answer = self._client.put_object(
                Body=data, ContentMD5=_md5(data), Metadata={_SHA256: sha256}, **self._place(key), **options
            )
            _compare_etag(answer, data)

        self._heal(key, attempt)

    def _upload_whole(self, file: ObjectFile) -> None:
        data = file.path.read_bytes()
        _expect(file, hashlib.sha256(data).hexdigest(), len(data))
        self._put(file.key, data, file.sha256)
        self._verify(file)

    def _upload_in_parts(self, file: ObjectFile, pool: ThreadPoolExecutor) -> None:
        for key, upload, _ in self.unfinished_uploads(file.key):
            if key == file.key:
                self._abort(key, upload)  # left by a process that was killed
        upload = self._client.create_multipart_upload(Metadata={_SHA256: file.sha256}, **self._place(file.key))
        upload_id = upload["UploadId"]
        running: deque[Future[dict[str, Any]]] = deque()
        try:
            parts: list[dict[str, Any]] = []
            content, num_bytes = hashlib.sha256(), 0
            part_bytes = max(self._transfer.part_bytes, -(-file.num_bytes // _MOST_PARTS))
            with file.path.open("rb") as stream:
                while data := stream.read(part_bytes):
                    content.update(data)
                    num_bytes += len(data)
                    running.append(
                        pool.submit(self._upload_part, file.key, upload_id, len(parts) + len(running) + 1, data)
                    )
                    if len(running) == self._transfer.threads:
                        parts.append(running.popleft().result())
            parts += [future.result() for future in running]
            # Only now is it certain that the file was the one that the manifest lists; until here nothing is visible.
            _expect(file, content.hexdigest(), num_bytes)
            self._complete(file, upload_id, parts)
        except BaseException as error:
            for future in running:
                future.cancel()
            wait(running)  # a part that arrives after the abort would stay
            try:
                self._abort(file.key, upload_id)
            except StorageError as failure:
                error.add_note(f"and its multipart upload could not be aborted: {failure}")
            raise
        self._verify(file)

    def _upload_part(self, key: str, upload_id: str, number: int, data: bytes) -> dict[str, Any]:
        def attempt() -> dict[str, Any]:
            answer = self._client.upload_part(
                UploadId=upload_id, PartNumber=number, Body=data, ContentMD5=_md5(data), **self._place(key)
            )
            _compare_etag(answer, data)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        return self._heal(f"{key} (part {number})", attempt)

    def _complete(self, file: ObjectFile, upload_id: str, parts: list[dict[str, Any]]) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.complete_multipart_upload(
                UploadId=upload_id, MultipartUpload={"Parts": parts}, **self._place(file.key)
            )
        except ClientError as error:
            # The first answer was lost and boto3 asked again: the upload is gone because it is the object now.
            if error_code(error) != "NoSuchUpload" or not self.holds(file):
                raise

    def _verify(self, file: ObjectFile) -> None:
        info = self.info(file.key)
        if info is None or info.num_bytes != file.num_bytes:
            found = "nothing" if info is None else f"{info.num_bytes} bytes"
            raise _MangledError(f"uploaded {file.num_bytes} bytes, the store has {found}")

    def _abort(self, key: str, upload_id: str) -> None:
        with self._told(key):
            from botocore.exceptions import ClientError

            try:
                self._client.abort_multipart_upload(UploadId=upload_id, **self._place(key))
            except ClientError as error:
                if error_code(error) != "NoSuchUpload":
                    raise

    def _heal(
        self,
        key: str,
        attempt: Callable[[], _ResultT],
        next_step: str = AGAIN,
        codes: frozenset[str] = _MANGLED,
    ) -> _ResultT:
        """Return what `attempt` returns, trying again where bytes were changed or lost on the way."""
        from botocore.exceptions import ClientError

        for number in range(1, self._transfer.attempts + 1):
            try:
                with self._told(key):
                    return attempt()
            except _MangledError as error:
                seen: Exception = error
            except StorageError as error:
                if not isinstance(error.__cause__, ClientError) or error_code(error.__cause__) not in codes:
                    raise
                seen = error.__cause__
            if number < self._transfer.attempts:
                time.sleep(min(0.1 * 2**number, 5.0))
        raise StorageError(
            f"{self.url(key)}: {str(seen).rstrip('.')} (attempt {self._transfer.attempts}); {next_step}"
        ) from seen

    @contextmanager
    def _told(self, key: str) -> Iterator[None]:
        """Turn the client's exceptions into one sentence about the object."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError

        try:
            yield
        except (BotoCoreError, ClientError, ResponseParserError) as error:
            bucket, attempts = f"{SCHEME}{self.config.bucket}", self._transfer.attempts
            raise StorageError(sentence(self.url(key), bucket, error, attempts)) from error


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _compare_etag(answer: dict[str, Any], data: bytes) -> None:
    """Compare the MD5 that a server answers with, where its ETag is one, with that of what was sent."""
    etag = answer["ETag"].strip('"')
    encrypted = answer.get("ServerSideEncryption") in ("aws:kms", "aws:kms:dsse") or "SSECustomerAlgorithm" in answer
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if not encrypted and len(etag) == len(found) and etag != found:
        raise _MangledError(f"the server received bytes of MD5 {etag}, sent were {found}")


def _expect(file: ObjectFile, sha256: str, num_bytes: int) -> None:
    if (num_bytes, sha256) != (file.num_bytes, file.sha256):
        raise StorageError(
            f"{file.path}: {num_bytes} bytes of SHA-256 {sha256[:12]}..., its manifest says {file.num_bytes} of "
            f"{file.sha256[:12]}...; the file was changed and is not uploaded, delete its folder and re-run its stage"
        )


def _stated_sha256(answer: dict[str, Any]) -> str | None:
    """Return the SHA-256 of a whole object that S3 computed itself, not one made of its parts' digests."""
    stated = answer.get("ChecksumSHA256")
    if stated is None or answer.get("ChecksumType") == "COMPOSITE" or "-" in stated:
        return None
    return base64.b64decode(stated).hex()
