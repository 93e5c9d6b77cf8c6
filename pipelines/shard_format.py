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
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise ThroughlineError(f"{name}: no tar header at byte {offset} ({error}); re-run shards") from error
        if not header.isreg():
            raise ThroughlineError(f"{name}: member {header.name} at byte {offset} is not a plain file; re-run shards")
        data = offset + _BLOCK
        if data + header.size > num_bytes:
            raise ThroughlineError(f"{name}: cut off inside {header.name} at byte {num_bytes}; re-run shards")
        yield Member(header.name, data, header.size)
        offset = data + header.size + -header.size % _BLOCK
