"""Reads samples from shards, in sequence or by index. A damaged shard is an error at once.

Order and shuffling belong to training; here a shard is a list.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, overload

from pipelines.core.errors import ThroughlineError
from pipelines.shards.format import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIX,
    IMAGE_SUFFIXES,
    PROVENANCE_SUFFIX,
    Member,
    ShardIndex,
    index_path,
    read_index,
    read_members,
)

_FIXED_SUFFIXES = (PROVENANCE_SUFFIX, CAPTION_SUFFIX)


class BadSampleError(ThroughlineError):
    """One sample is inconsistent; the rest of its shard may be intact."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-text pair. `image_bytes` is the encoded image; `provenance` leads back to the LAION row."""

    sample_key: str
    image_bytes: bytes
    caption: str
    provenance: dict[str, Any]
    extras: dict[str, bytes] = field(default_factory=dict)
    """Suffix -> bytes of additional members."""


class Shard(Sequence[Sample]):
    """An open shard: `shard[i]` reads one sample, `shard.keys` are all sample keys in order. A context manager.

    Opening reads the index, or the headers if there is none, into `contents`. It raises ThroughlineError, naming the
    shard, if a sample has unexpected members, keys are out of order, or the archive is truncated or does not match the
    index. Reading a sample raises BadSampleError if its parts contradict each other. Threads and forked processes may
    share a `Shard`.
    """

    def __init__(self, path: Path, *, verify_digests: bool = False) -> None:
        """With `verify_digests`, every sample read is compared with the SHA-256 digests in its JSON."""
        self.path = path
        self._verify = verify_digests
        try:
            self._stream = path.open("rb")
        except FileNotFoundError as error:
            raise ThroughlineError(f"{path}: no such shard; re-run shards") from error
        try:
            self.contents = _open_index(path) or scan_index(self._stream, path)
        except BaseException:
            self._stream.close()
            raise
        self.keys = self.contents.keys

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        key, row = self.keys[index], self.contents.rows[index]
        start, end = row[0][0], row[-1][0] + row[-1][1]
        # A positional read, so that threads and forked processes do not move each other's file offset.
        data = os.pread(self._stream.fileno(), end - start, start)
        if len(data) < end - start:
            raise ThroughlineError(f"{self.path}: cut off inside sample {key}; re-run shards")
        image, provenance, caption, *others = (data[offset - start : offset - start + size] for offset, size in row)
        extras = dict(zip(self.contents.suffixes[3:], others, strict=True))
        sample = _sample(self.path, key, image, provenance, caption, extras)
        if self._verify:
            _check_digests(self.path, sample, caption)
        return sample


def read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard in key order; raises ThroughlineError as `Shard` does."""
    with Shard(path) as shard:
        yield from shard


def shard_keys(path: Path) -> tuple[str, ...]:
    """Return the sample keys of a shard in order, without reading samples."""
    with Shard(path) as shard:
        return shard.keys


def _open_index(path: Path) -> ShardIndex | None:
    """Return a shard's index, or None; raises ThroughlineError if it belongs to another archive."""
    location = index_path(path)
    if not location.exists():
        return None
    index, num_bytes = read_index(location), path.stat().st_size
    if index.num_bytes != num_bytes:
        raise ThroughlineError(f"{path}: {num_bytes} bytes, its index says {index.num_bytes}; re-run shards")
    if any(second <= first for first, second in itertools.pairwise(index.keys)) or not _is_sample(index.suffixes):
        raise ThroughlineError(f"{location}: keys out of order, or not samples of this project; re-run shards")
    return index


def scan_index(stream: BinaryIO, path: Path) -> ShardIndex:
    """Build a shard's index from its headers; raises ThroughlineError unless its samples are complete and in order."""
    num_bytes = path.stat().st_size
    keys: list[str] = []
    rows: list[list[tuple[int, int]]] = []
    suffixes: tuple[str, ...] = ()
    for key, members in _groups(read_members(stream, str(path), num_bytes)):
        found = tuple(member.name.partition(".")[2] for member in members)
        if not _is_sample(found) or found != (suffixes or found):
            expected = suffixes or (IMAGE_SUFFIX, *_FIXED_SUFFIXES)
            raise ThroughlineError(
                f"{path}: sample {len(keys)} is {', '.join(member.name for member in members)}, expected "
                f"{', '.join(f'{key}.{suffix}' for suffix in expected)}; re-run shards"
            )
        if keys and key <= keys[-1]:
            raise ThroughlineError(f"{path}: key {key} does not come after {keys[-1]}; re-run shards")
        suffixes = found
        keys.append(key)
        rows.append([(member.offset, member.num_bytes) for member in members])
    return ShardIndex(num_bytes=num_bytes, suffixes=suffixes, keys=tuple(keys), rows=rows)


def _is_sample(suffixes: Sequence[str]) -> bool:
    return not suffixes or (suffixes[0] in IMAGE_SUFFIXES and tuple(suffixes[1:3]) == _FIXED_SUFFIXES)


def _groups(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Yield (key, members) of consecutive members with the same key; a repeated suffix begins another sample."""
    group: list[Member] = []
    for member in members:
        if group and (
            member.name.partition(".")[0] != group[0].name.partition(".")[0]
            or any(member.name == earlier.name for earlier in group)
        ):
            yield group[0].name.partition(".")[0], group
            group = []
        group.append(member)
    if group:
        yield group[0].name.partition(".")[0], group


def _sample(path: Path, key: str, image: bytes, provenance: bytes, caption: bytes, extras: dict[str, bytes]) -> Sample:
    try:
        text, record = caption.decode(), json.loads(provenance)
        stated = (record.get("sample_key"), record.get("caption"))
    except (ValueError, AttributeError) as error:
        raise BadSampleError(f"{path}: sample {key}: text is not readable ({error}); re-run shards") from error
    if stated != (key, text):
        raise BadSampleError(
            f"{path}: sample {key}: its JSON has key {stated[0]} and caption {stated[1]!r:.60}, its text is "
            f"{text!r:.60}; re-run shards"
        )
    return Sample(key, image, text, record, extras)


def _check_digests(path: Path, sample: Sample, caption: bytes) -> None:
    for name, data in (("image_sha256", sample.image_bytes), ("caption_sha256", caption)):
        stated = sample.provenance.get(name)
        if stated is not None and stated != hashlib.sha256(data).hexdigest():
            raise BadSampleError(f"{path}: sample {sample.sample_key}: does not have the {name} of its JSON")
