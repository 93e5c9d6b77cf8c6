"""Digests of JSON values in one canonical form, of files while they are written, and of model folders."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

VERSION_HEX_DIGITS = 32
_READ_BYTES = 1 << 20
LOCAL_PREFIX = "sha256:"
"""Prefix of a local model's revision; a digest of its file names and contents follows."""


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON bytes that depend only on its content: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_json(value: Any) -> str:
    """Return the 128-bit digest of a JSON value as 32 hex digits; equal values give equal digests on any machine."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:VERSION_HEX_DIGITS]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits, reading it once."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_files(folder: Path) -> list[Path]:
    """Return the files that make up a model, sorted: no hidden files, model cards, locks or caches."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if _belongs_to_model(path.relative_to(folder))]


def _belongs_to_model(relative: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
    return not hidden and relative.suffix not in {".md", ".lock", ".tmp"}


def local_revision(folder: Path) -> str:
    """Return the revision of a local model folder; reads all its files."""
    digests = {path.relative_to(folder).as_posix(): file_sha256(path) for path in model_files(folder)}
    return LOCAL_PREFIX + digest_json(digests)


class HashingWriter(io.RawIOBase):
    """A write-only stream that hashes its bytes as they are written, so that no file is read back to be hashed."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._stream.write(view)
        self.num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        return self.num_bytes

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()
