"""Durable, atomic file writes (temporary name, fsync, rename, fsync of the folder) and locks between processes."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.core.digest import HashingWriter


def sync_folder(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_writer(path: Path, suffix: str = ".tmp") -> Iterator[HashingWriter]:
    """Yield a hashing stream whose bytes appear at `path` completely or not at all.

    On an exception the temporary file is removed and `path` is untouched. A kill leaves a file with `suffix`, which the
    next writer of the same path overwrites. Concurrent writers need different suffixes.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        with temporary.open("wb") as stream:
            writer = HashingWriter(stream)
            yield writer
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically. With concurrent writers, one of them wins and bytes are never mixed."""
    with atomic_writer(path, f".{secrets.token_hex(4)}.tmp") as stream:
        stream.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON to `path` atomically; raises ValueError for NaN."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock that the operating system releases when the process dies, however it dies."""
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
