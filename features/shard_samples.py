"""Reads the samples of a shard: image and caption by key, in the tar's order."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import ThroughlineError
from pipelines.stage import StageOutput

_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})


@dataclass
class ShardSample:
    """One image-text pair as it lies in a shard."""

    sample_key: str
    image: bytes | None = None
    caption: str | None = None


def shard_units(shards: StageOutput) -> dict[str, Path]:
    """Return unit name ("00000") -> tar file, in order."""
    return {path.stem.rpartition("-")[2]: path for path in shards.files(".tar")}


def read_shard(shards: StageOutput, path: Path, *, images: bool) -> list[ShardSample]:
    """Return the samples of a shard, sorted as in the file; `images` False leaves the pictures unread.

    Raises ThroughlineError where a sample has no caption, or no image though wanted, or the count is not the
    manifest's.
    """
    samples = list(_read(path, images))
    expected = shards.manifest.file(path.name).num_rows
    if expected is not None and len(samples) != expected:
        raise ThroughlineError(
            f"{path}: {len(samples)} samples, manifest says {expected}; re-run shards for part "
            f"{shards.manifest.partition}"
        )
    for sample in samples:
        if sample.caption is None or (images and sample.image is None):
            what = "caption" if sample.caption is None else "image"
            raise ThroughlineError(f"{path}: sample {sample.sample_key} has no {what}; re-run its shards stage")
    return samples


def _read(path: Path, images: bool) -> Iterator[ShardSample]:
    current: ShardSample | None = None
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if current is None or current.sample_key != key:
                    if current is not None:
                        yield current
                    current = ShardSample(key)
                if suffix == "txt":
                    current.caption = _content(tar, member).decode()
                elif suffix in _IMAGE_SUFFIXES and images:
                    current.image = _content(tar, member)
                elif suffix in _IMAGE_SUFFIXES:
                    current.image = b""
    except tarfile.TarError as error:
        raise ThroughlineError(f"{path}: not a readable tar file ({error}); re-run its shards stage") from error
    if current is not None:
        yield current


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    if stream is None:
        raise tarfile.ReadError(f"{member.name} is no file")
    return stream.read()
