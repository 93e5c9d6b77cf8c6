"""The bytes of a shard: a plain ustar archive that depends on its samples alone, and the parsing of such an archive.

A sample is three members that share its key: ``<sample_key>.jpg``, ``.json`` (provenance), ``.txt`` (caption), in this
order; samples follow each other in the order of their keys.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from pipelines.digest import canonical_json
from pipelines.errors import ThroughlineError

IMAGE_SUFFIX, PROVENANCE_SUFFIX, CAPTION_SUFFIX = "jpg", "json", "txt"
SUFFIXES = (IMAGE_SUFFIX, PROVENANCE_SUFFIX, CAPTION_SUFFIX)
_BLOCK = tarfile.BLOCKSIZE
_RECORD = tarfile.RECORDSIZE


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


class ShardWriter:
    """Writes samples to a stream; the caller brings them in the order of their keys and closes the stream.

    Raises ThroughlineError for a key that does not come after the one before it.
    """

    def __init__(self, stream: _Writable, name: str) -> None:
        self._stream = stream
        self._name = name
        self._last_key = ""
        self._num_bytes = 0
        self.num_samples = 0

    def add(self, sample_key: str, image: bytes, caption: str, provenance: dict[str, object]) -> None:
        """Append one sample."""
        if sample_key <= self._last_key:
            raise ThroughlineError(f"{self._name}: key {sample_key} does not come after {self._last_key}")
        self._last_key = sample_key
        self._member(f"{sample_key}.{IMAGE_SUFFIX}", image)
        self._member(f"{sample_key}.{PROVENANCE_SUFFIX}", canonical_json(provenance))
        self._member(f"{sample_key}.{CAPTION_SUFFIX}", caption.encode())
        self.num_samples += 1

    def finish(self) -> None:
        """Write the end of the archive: two empty blocks, filled up to a whole record as GNU tar does."""
        end = 2 * _BLOCK
        end += -(self._num_bytes + end) % _RECORD
        self._write(bytes(end))

    def _member(self, name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)
        header.size = len(data)
        header.mode = 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        self._write(data + bytes(-len(data) % _BLOCK))

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._num_bytes += len(data)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive: `offset` is where its data starts."""

    name: str
    offset: int
    num_bytes: int


def read_members(stream: BinaryIO, name: str, num_bytes: int) -> Iterator[Member]:
    """Yield the members of an archive of `num_bytes`, reading headers alone; the stream may be moved in between.

    Raises ThroughlineError, naming the archive and the place, where it is cut short, a header is damaged, or a member
    is not a plain file.
    """
    offset = 0
    while True:
        stream.seek(offset)
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise ThroughlineError(f"{name}: ends at byte {offset + len(block)} without an end mark; re-run shards")
        if not any(block):
            return
        try:
            member, size = _parse_header(block)
        except ValueError as error:
            raise ThroughlineError(
                f"{name}: no plain file's header at byte {offset} ({error}); re-run shards"
            ) from error
        data = offset + _BLOCK
        if data + size > num_bytes:
            raise ThroughlineError(f"{name}: cut off inside {member} at byte {num_bytes}; re-run shards")
        yield Member(member, data, size)
        offset = data + size + -size % _BLOCK


def _parse_header(block: bytes) -> tuple[str, int]:
    """Return name and size from the ustar header of a plain file; raises ValueError for anything else.

    `tarfile` reads all that tars may hold and takes three times as long; shards hold plain files with short names.
    """
    checksum = int(block[148:156].strip(b"\0 "), 8)
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise ValueError("bad checksum")
    if block[156:157] not in (b"0", b"\0"):
        raise ValueError(f"type {block[156:157]!r}")
    if block[345:500].strip(b"\0"):
        raise ValueError("a path of more than 100 characters")
    return block[:100].rstrip(b"\0").decode(), int(block[124:136].strip(b"\0 "), 8)
