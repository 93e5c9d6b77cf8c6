"""Configuration of the stage `shards`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, execution_field


class ExtraMember(FrozenConfig):
    """An additional member of every sample: a column of the images or captions table."""

    suffix: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", max_length=40)
    """Part of the member name after the key and a dot, such as ``clip.npy``."""
    source: Literal["images", "captions"]
    column: str = Field(min_length=1)
    """Bytes are written unchanged and text as UTF-8, with null as empty; other types are written as JSON."""

    @model_validator(mode="after")
    def _is_free_and_safe(self) -> Self:
        if self.suffix in ("jpg", "webp", "json", "txt"):
            raise ValueError(f"the suffix {self.suffix} is reserved for standard members; choose another suffix")
        if self.suffix.rpartition(".")[2] in ("pkl", "pickle", "pyd", "pt", "pth"):
            raise ValueError(f"readers unpickle {self.suffix}, which runs code; choose another suffix")
        return self


class ShardsConfig(FrozenConfig):
    """The WebDataset stage."""

    drop_truncated: bool = True
    """Drop captions that were cut off (finish reason other than ``stop``)."""
    min_caption_chars: int = Field(default=1, ge=1)
    """Captions with fewer characters, leading and trailing whitespace aside, are dropped as empty."""
    max_samples_per_shard: int = Field(default=10_000, ge=1)
    max_shard_bytes: int = Field(default=1 << 30, ge=10_240)
    """Limit on the size of a finished tar; a single larger sample gets a tar of its own. A unit that exceeds either
    limit is split into several shards, in key order."""
    image_format: Literal["keep", "jpeg", "webp"] = "keep"
    """``keep`` copies the bytes of the stage `images`; the others re-encode them, which costs some quality (to change
    only the JPEG quality, set that of `images`)."""
    image_quality: int = Field(default=90, ge=1, le=100)
    """Quality of re-encoded images."""
    extra_members: tuple[ExtraMember, ...] = ()
    workers: WorkersConfig = execution_field(WorkersConfig())

    @model_validator(mode="after")
    def _suffixes_differ(self) -> Self:
        suffixes = [member.suffix for member in self.extra_members]
        if len(set(suffixes)) < len(suffixes):
            raise ValueError(f"extra_members: suffixes {', '.join(suffixes)}; each must be unique")
        return self
