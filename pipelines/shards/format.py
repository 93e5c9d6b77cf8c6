"""File format of shards and their indexes: a plain ustar archive that depends only on its samples, and its parser.

A sample consists of members that share its key: the image (``<sample_key>.jpg`` or ``.webp``), ``.json`` (provenance),
``.txt`` (caption), then the declared extra members, in this order. Samples are sorted by key, and all samples of a
shard have the same suffixes. The index, ``<shard>.index.json``, holds the offset and size of each member.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pipelines.core.digest import canonical_json
from pipelines.core.errors import ThroughlineError

IMAGE_SUFFIX, PROVENANCE_SUFFIX, CAPTION_SUFFIX = "jpg", "json", "txt"
IMAGE_SUFFIXES = (IMAGE_SUFFIX, "webp")
_BLOCK = tarfile.BLOCKSIZE
_RECORD = tarfile.RECORDSIZE
_NAME_BYTES = 100
_INDEX_SUFFIX = ".index.json"


class _Writable(Protocol):
    def write(self, data: bytes, /) -> int: ...


@dataclass(frozen=True, slots=True)
class SampleMembers:
    """One sample of a shard: suffix and bytes of each member, in order."""

    sample_key: str
    members: tuple[tuple[str, bytes], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the archive, including headers and padding."""
        return sum(_BLOCK + len(data) + -len(data) % _BLOCK for _, data in self.members)


def sample_members(
    sample_key: str,
    image: bytes,
    caption: str,
    provenance: Mapping[str, object],
    *,
    image_suffix: str = IMAGE_SUFFIX,
    extras: Sequence[tuple[str, bytes]] = (),
) -> SampleMembers:
    """Return the members of one sample; the JSON includes the SHA-256 of the image and caption members."""
    text = caption.encode()
    digests = {"image_sha256": hashlib.sha256(image).hexdigest(), "caption_sha256": hashlib.sha256(text).hexdigest()}
    record = canonical_json({**provenance, **digests})
    members = (image_suffix, image), (PROVENANCE_SUFFIX, record), (CAPTION_SUFFIX, text)
    return SampleMembers(sample_key, (*members, *extras))


class ShardWriter:
    """Writes samples to a stream; the caller provides them in key order and closes the stream.

    Raises ThroughlineError for a key that is out of order, and for a sample whose suffixes differ from the first's.
    """

    def __init__(self, stream: _Writable, name: str) -> None:
        self._stream = stream
        self._name = name
        self._num_bytes = 0
        self._suffixes: tuple[str, ...] = ()
        self._rows: list[list[tuple[int, int]]] = []
        self._keys: list[str] = []
        self._columns: dict[str, list[Any]] = {}

    @property
    def num_samples(self) -> int:
        return len(self._keys)

    @property
    def last_key(self) -> str:
        return self._keys[-1] if self._keys else ""

    def add(self, sample_key: str, image: bytes, caption: str, provenance: Mapping[str, object], **layout: Any) -> None:
        """Append one sample; `layout` are the keyword arguments of `sample_members`."""
        self.add_members(sample_members(sample_key, image, caption, provenance, **layout))

    def add_members(self, sample: SampleMembers, columns: Mapping[str, Any] | None = None) -> None:
        """Append one sample; `columns` are JSON values for the index, with the same names for each sample."""
        key = sample.sample_key
        if key <= self.last_key:
            raise ThroughlineError(f"{self._name}: key {key} does not come after {self.last_key}")
        suffixes = tuple(suffix for suffix, _ in sample.members)
        if suffixes != (self._suffixes or suffixes) or len(set(suffixes)) < len(suffixes):
            raise ThroughlineError(
                f"{self._name}: sample {key} has members {', '.join(suffixes)}, expected {', '.join(self._suffixes)}"
                if self._suffixes
                else f"{self._name}: sample {key} has members {', '.join(suffixes)}; each suffix must be unique"
            )
        self._suffixes = suffixes
        row, pieces = [], []
        for suffix, data in sample.members:
            row.append((self._num_bytes + _BLOCK, len(data)))
            pieces += [_header(f"{key}.{suffix}", len(data)), data, bytes(-len(data) % _BLOCK)]
            self._num_bytes += _BLOCK + len(data) + len(pieces[-1])
        self._stream.write(b"".join(pieces))
        self._keys.append(key)
        self._rows.append(row)
        for name, value in (columns or {}).items():
            self._columns.setdefault(name, []).append(value)

    def num_bytes_with(self, sample: SampleMembers) -> int:
        """Return the size of the finished archive if `sample` were the next and last one."""
        return _finished_bytes(self._num_bytes + sample.num_bytes)

    def finish(self) -> "ShardIndex":
        """Write the end of the archive: two empty blocks, padded to a whole record as GNU tar does."""
        end = _finished_bytes(self._num_bytes)
        self._stream.write(bytes(end - self._num_bytes))
        return ShardIndex(
            num_bytes=end, suffixes=self._suffixes, keys=tuple(self._keys), rows=self._rows, columns=self._columns
        )


def _finished_bytes(num_bytes: int) -> int:
    return num_bytes + 2 * _BLOCK + -(num_bytes + 2 * _BLOCK) % _RECORD


def _empty_header() -> bytes:
    header = tarfile.TarInfo()
    header.mode = 0o644
    return header.tobuf(tarfile.USTAR_FORMAT)


_EMPTY_HEADER = _empty_header()
_AFTER_NAME, _AFTER_SIZE, _AFTER_CHECKSUM = _EMPTY_HEADER[100:124], _EMPTY_HEADER[136:148], _EMPTY_HEADER[156:]
_CHECKSUM = sum(_AFTER_NAME) + sum(_AFTER_SIZE) + sum(_AFTER_CHECKSUM) + 8 * ord(" ")


def _header(name: str, num_bytes: int) -> bytes:
    """Return the header that `tarfile` writes for a plain file of mode 644, in a tenth of the time."""
    encoded, size = name.encode(), b"%011o\0" % num_bytes
    if len(encoded) > _NAME_BYTES or len(size) > 12:
        raise ThroughlineError(f"{name}: {num_bytes} bytes; the name or the content is too long for a plain tar")
    checksum = b"%06o\0 " % (_CHECKSUM + sum(encoded) + sum(size))
    return b"".join((encoded.ljust(_NAME_BYTES, b"\0"), _AFTER_NAME, size, _AFTER_SIZE, checksum, _AFTER_CHECKSUM))


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Contents of a shard with offsets, so that opening it reads no headers."""

    num_bytes: int
    """Size of the archive."""
    suffixes: tuple[str, ...]
    keys: tuple[str, ...]
    rows: Sequence[Sequence[tuple[int, int]]]
    """For each sample the (offset, size) of each member's data."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Values of the samples that stages need without reading the archive."""

    def to_bytes(self) -> bytes:
        rows = [[value for member in row for value in member] for row in self.rows]
        record = {"format": 1, "num_bytes": self.num_bytes, "suffixes": self.suffixes, "keys": self.keys,
                  "members": rows, "columns": self.columns}  # fmt: skip
        return canonical_json(record) + b"\n"


def index_path(shard: Path) -> Path:
    """Return the path of a shard's index."""
    return shard.with_name(shard.name.removesuffix(".tar") + _INDEX_SUFFIX)


def read_index(path: Path) -> ShardIndex:
    """Read an index; raises ThroughlineError if it is unreadable or inconsistent."""
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != 1:
            raise ValueError(f"format {record['format']}")
        suffixes, keys = tuple(record["suffixes"]), tuple(record["keys"])
        rows = [list(zip(row[::2], row[1::2], strict=True)) for row in record["members"]]
        if len(rows) != len(keys) or any(len(row) != len(suffixes) for row in rows):
            raise ValueError(f"{len(keys)} keys, {len(rows)} rows of {len(suffixes)} members")
        if any(len(values) != len(keys) for values in record["columns"].values()):
            raise ValueError("a column of another length")
        return ShardIndex(
            num_bytes=record["num_bytes"], suffixes=suffixes, keys=keys, rows=rows, columns=record["columns"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ThroughlineError(f"{path}: not a readable index of a shard ({error}); re-run shards") from error


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive: `offset` is where its data starts."""

    name: str
    offset: int
    num_bytes: int


def read_members(stream: BinaryIO, name: str, num_bytes: int) -> Iterator[Member]:
    """Yield the members of an archive of `num_bytes`, reading only headers; the caller may seek in between.

    Raises ThroughlineError, naming the archive and the offset, if it is truncated, a header is damaged, or a member is
    not a plain file.
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
                f"{name}: no header of a plain file at byte {offset} ({error}); re-run shards"
            ) from error
        data = offset + _BLOCK
        if data + size > num_bytes:
            raise ThroughlineError(f"{name}: cut off inside {member} at byte {num_bytes}; re-run shards")
        yield Member(member, data, size)
        offset = data + size + -size % _BLOCK


def _parse_header(block: bytes) -> tuple[str, int]:
    """Return name and size from the ustar header of a plain file; raises ValueError for anything else.

    `tarfile` supports every tar feature and takes three times as long; shards hold only plain files with short names.
    """
    checksum = int(block[148:156].strip(b"\0 "), 8)
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise ValueError("bad checksum")
    if block[156:157] not in (b"0", b"\0"):
        raise ValueError(f"type {block[156:157]!r}")
    if block[345:500].strip(b"\0"):
        raise ValueError("a path of more than 100 characters")
    return block[:100].rstrip(b"\0").decode(), int(block[124:136].strip(b"\0 "), 8)
