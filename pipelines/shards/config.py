"""Configuration of the stage `shards`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, execution_field


class ExtraMember(FrozenConfig):
    """One more member of every sample: a column of the pictures' or the captions' table."""

    suffix: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", max_length=40)
    """What follows the key and a dot: ``clip.npy``."""
    source: Literal["images", "captions"]
    column: str = Field(min_length=1)
    """Bytes are written as they are, text as UTF-8, both empty where null; every other type as JSON."""

    @model_validator(mode="after")
    def _is_free_and_safe(self) -> Self:
        if self.suffix in ("jpg", "webp", "json", "txt"):
            raise ValueError(f"every sample has a member {self.suffix} or may have one; choose another suffix")
        if self.suffix.rpartition(".")[2] in ("pkl", "pickle", "pyd", "pt", "pth"):
            raise ValueError(f"readers unpickle {self.suffix}, which runs code; choose another suffix")
        return self


class ShardsConfig(FrozenConfig):
    """The WebDataset stage."""

    drop_truncated: bool = True
    """Drop captions that did not end by themselves (finish reason other than ``stop``)."""
    min_caption_chars: int = Field(default=1, ge=1)
    """Shorter captions, blank ends not counted, are dropped as empty."""
    max_samples_per_shard: int = Field(default=10_000, ge=1)
    max_shard_bytes: int = Field(default=1 << 30, ge=10_240)
    """Size of a finished tar; a sample that exceeds it alone gets a tar of its own. A unit of pictures that exceeds
    either bound is cut into several shards, in the order of keys."""
    image_format: Literal["keep", "jpeg", "webp"] = "keep"
    """``keep`` leaves the bytes of the stage `images` as they are; the others encode its pictures once more, which
    loses a little (for another JPEG quality alone, set that of `images`)."""
    image_quality: int = Field(default=90, ge=1, le=100)
    """Quality where pictures are encoded once more."""
    extra_members: tuple[ExtraMember, ...] = ()
    workers: WorkersConfig = execution_field(WorkersConfig())

    @model_validator(mode="after")
    def _suffixes_differ(self) -> Self:
        suffixes = [member.suffix for member in self.extra_members]
        if len(set(suffixes)) < len(suffixes):
            raise ValueError(f"extra_members: suffixes {', '.join(suffixes)}; each may stand once")
        return self
