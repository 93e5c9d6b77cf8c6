"""Strict streaming reader for any tar: raises errors for damage that `tarfile` silently skips.

`pipelines.shards.format` reads the shards of this project; this module reads any: ustar, GNU and PAX headers.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

_BLOCK = tarfile.BLOCKSIZE
_READ_BYTES = 1 << 20
_FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_OTHER_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_MAX_EXTENSION_BYTES = 1 << 20


class DamagedTarError(Exception):
    """Damage at byte `offset`: `kind` classifies it, `detail` describes it."""

    def __init__(self, kind: str, offset: int, detail: str) -> None:
        super().__init__(f"{detail} at byte {offset}")
        self.kind = kind


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One member: `kind` is ``file``, ``folder`` or a description ("a symbolic link"), `data` the content of a file."""

    name: str
    kind: str
    data: bytes
    offset: int
    """Offset of the data."""


class _Source:
    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.offset = 0

    def read(self, size: int) -> bytes:
        pieces, missing = [], size
        while missing:
            piece = self._stream.read(min(missing, _READ_BYTES))
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        self.offset += size - missing
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def walk(stream: Readable) -> Iterator[Entry]:
    """Yield the members of a tar in order, and read the stream to its last byte.

    Raises DamagedTarError: `header` for an invalid header, `cut_short` if the file ends inside a member, `no_end_mark`
    if it ends without two empty blocks, `bytes_after_end` if data follows them (such as a second tar appended to the
    first, which every reader misses).
    """
    source = _Source(stream)
    extended: dict[str, str] = {}
    while True:
        start = source.offset
        block = source.read(_BLOCK)
        if len(block) < _BLOCK:
            kind, detail = ("cut_short", "truncated header") if block else ("no_end_mark", "no end mark")
            raise DamagedTarError(kind, source.offset, detail)
        if not any(block):
            _check_end(source)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedTarError("header", start, f"invalid tar header ({error})") from error
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            records = _pax_records(_content(source, header.size, "a PAX header", _MAX_EXTENSION_BYTES), start)
            if header.type != tarfile.XGLTYPE:
                extended |= records
            continue
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            long_name = _content(source, header.size, "a long name", _MAX_EXTENSION_BYTES).rstrip(b"\0")
            if header.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = long_name.decode("utf-8", "surrogateescape")
            continue
        name = extended.get("path", header.name)
        try:
            size = int(extended.get("size", header.size))
        except ValueError as error:
            raise DamagedTarError("header", start, f"the size {extended['size']!r} is not a number") from error
        if any(keyword.startswith("GNU.sparse.") for keyword in extended):
            header.type = tarfile.GNUTYPE_SPARSE
        extended = {}
        offset = source.offset
        has_data = header.type in (*_FILE_TYPES, tarfile.GNUTYPE_SPARSE)
        data = _content(source, size, name) if has_data else b""
        if header.isdir():
            yield Entry(name, "folder", b"", offset)
        elif header.type in _FILE_TYPES:
            yield Entry(name, "file", data, offset)
        else:
            yield Entry(name, _OTHER_TYPES.get(header.type, f"of unknown type {header.type!r}"), b"", offset)


def _content(source: _Source, size: int, name: str, limit: int | None = None) -> bytes:
    if size < 0 or (limit is not None and size > limit):
        raise DamagedTarError("header", source.offset, f"{name} of {size} bytes")
    data = source.read(size)
    padding = -size % _BLOCK
    if len(data) < size or len(source.read(padding)) < padding:
        raise DamagedTarError("cut_short", source.offset, f"{name} is truncated")
    return data


def _pax_records(data: bytes, start: int) -> dict[str, str]:
    """Parse ``<length> <keyword>=<value>\\n`` records (POSIX.1-2001, pax interchange format)."""
    records = {}
    offset = 0
    while offset < len(data) and data[offset]:
        digits, space, _ = data[offset : offset + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = data[offset + len(digits) + 1 : offset + length]
        keyword, equals, value = record.partition(b"=")
        if not equals or not record.endswith(b"\n"):
            raise DamagedTarError("header", start, "invalid PAX header")
        records[keyword.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        offset += length
    return records


def _check_end(source: _Source) -> None:
    if len(block := source.read(_BLOCK)) < _BLOCK:
        raise DamagedTarError("no_end_mark", source.offset, "incomplete end mark")
    while True:
        if any(block):
            raise DamagedTarError("bytes_after_end", source.offset - len(block), "data after the end mark")
        if not (block := source.read(_READ_BYTES)):
            return
