"""Shards back to samples: in sequence, or one by its place. Whole samples only; a damaged shard stops at once.

Order and shuffling belong to training; here a shard is a list.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from pipelines.errors import ThroughlineError
from pipelines.shard_format import SUFFIXES, Member, read_members


class BadSampleError(ThroughlineError):
    """One sample contradicts itself; the rest of its shard may be sound."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image-text pair. `image_bytes` is an encoded picture; `provenance` leads back to the LAION row."""

    sample_key: str
    image_bytes: bytes
    caption: str
    provenance: dict[str, Any]


class Shard(Sequence[Sample]):
    """An open shard: `shard[i]` reads one sample, `shard.keys` are all sample keys in order. Closes as a context.

    Opening reads the headers and raises ThroughlineError, naming the shard, where a sample is not
    the three members it should be, keys are out of order, or the archive is cut short. Reading a sample raises
    BadSampleError where its parts contradict each other. Threads and forked processes may share a `Shard`.
    """

    def __init__(self, path: Path, *, verify_digests: bool = False) -> None:
        """With `verify_digests` the SHA-256 that a sample's JSON states are compared whenever it is read."""
        self.path = path
        self._verify = verify_digests
        try:
            self._stream = path.open("rb")
        except FileNotFoundError as error:
            raise ThroughlineError(f"{path}: no such shard; re-run shards") from error
        try:
            self._samples = _group(list(read_members(self._stream, str(path), path.stat().st_size)), path)
        except BaseException:
            self._stream.close()
            raise
        self.keys: tuple[str, ...] = tuple(key for key, _ in self._samples)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        key, members = self._samples[index]
        start, end = members[0].offset, members[-1].offset + members[-1].num_bytes
        # By position, so that threads and forked processes do not move each other's place in the file.
        data = os.pread(self._stream.fileno(), end - start, start)
        if len(data) < end - start:
            raise ThroughlineError(f"{self.path}: cut off inside sample {key}; re-run shards")
        image, provenance, caption = (
            data[member.offset - start : member.offset - start + member.num_bytes] for member in members
        )
        sample = _sample(self.path, key, image, provenance, caption)
        if self._verify:
            _check_digests(self.path, sample, caption)
        return sample


def read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of a shard in the order of their keys; raises ThroughlineError as `Shard` does."""
    with Shard(path) as shard:
        yield from shard


def shard_keys(path: Path) -> tuple[str, ...]:
    """Return the sample keys of a shard in order, reading headers alone."""
    with Shard(path) as shard:
        return shard.keys


def _group(members: list[Member], path: Path) -> list[tuple[str, list[Member]]]:
    samples: list[tuple[str, list[Member]]] = []
    for first in range(0, len(members), len(SUFFIXES)):
        group = members[first : first + len(SUFFIXES)]
        key = group[0].name.partition(".")[0]
        names = [member.name for member in group]
        if names != [f"{key}.{suffix}" for suffix in SUFFIXES]:
            raise ThroughlineError(
                f"{path}: sample {first // len(SUFFIXES)} is {', '.join(names)}, expected "
                f"{', '.join(f'{key}.{suffix}' for suffix in SUFFIXES)}; re-run shards"
            )
        if samples and key <= samples[-1][0]:
            raise ThroughlineError(f"{path}: key {key} does not come after {samples[-1][0]}; re-run shards")
        samples.append((key, group))
    return samples


def _sample(path: Path, key: str, image: bytes, provenance: bytes, caption: bytes) -> Sample:
    try:
        text, record = caption.decode(), json.loads(provenance)
        stated = (record.get("sample_key"), record.get("caption"))
    except (ValueError, AttributeError) as error:
        raise BadSampleError(f"{path}: sample {key}: text is not readable ({error}); re-run shards") from error
    if stated != (key, text):
        raise BadSampleError(
            f"{path}: sample {key}: its JSON is about {stated[0]} and caption {stated[1]!r:.60}, its text is "
            f"{text!r:.60}; re-run shards"
        )
    return Sample(key, image, text, record)


def _check_digests(path: Path, sample: Sample, caption: bytes) -> None:
    for name, data in (("image_sha256", sample.image_bytes), ("caption_sha256", caption)):
        stated = sample.provenance.get(name)
        if stated is not None and stated != hashlib.sha256(data).hexdigest():
            raise BadSampleError(f"{path}: sample {sample.sample_key}: not the {name} that its JSON states")
