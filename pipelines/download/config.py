"""Configuration of the stage `images`."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, added_field, execution_field
from pipelines.laion.config import EntryList


class ImageFormat(StrEnum):
    """An image format, recognised by its first bytes and never by its content type."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"


class FetchConfig(FrozenConfig):
    """HTTP settings. Timeouts and retries are part of the result's identity, because they decide which rows succeed."""

    user_agent: str = Field(default="Mozilla/5.0 (compatible; throughline/0.1)", min_length=1)
    opt_out_agent: str | None = None
    """Agent name whose opt-out directives are honoured too (``X-Robots-Tag: <agent>: noai``)."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of X-Robots-Tag that drop an image; the default is img2dataset's. Empty: none is honoured."""
    opt_outs: EntryList | None = added_field(None)
    """URLs and domains that are never requested, redirects included, as in `LaionSubsetConfig`. In a profile this list
    and the next two default to those of `laion_subset`."""
    urls_denied: EntryList | None = added_field(None)
    domains_denied: EntryList | None = added_field(None)
    connect_seconds: float = Field(default=10.0, gt=0)
    read_seconds: float = Field(default=10.0, gt=0)
    """Longest time a server may send nothing."""
    total_seconds: float = Field(default=30.0, gt=0)
    """Longest time for one attempt, redirects included; waiting for a free connection does not count."""
    verify_tls: bool = True
    """Require a valid server certificate."""
    retries: int = Field(default=2, ge=0, le=10)
    """Retries after a transient failure: no connection, 429, 5xx, an incomplete body, timeouts."""
    retry_timeouts: bool = True
    backoff_seconds: float = execution_field(0.5, ge=0)
    """Mean wait before the first retry, doubled for each further one; jitter multiplies it by 0.5 to 1.5."""
    max_retry_after_seconds: float = Field(default=30.0, ge=0)
    """Longest Retry-After that is waited for; the whole host gets no request in that time. A URL whose server asks for
    a longer wait is not requested again before it is over."""
    max_redirects: int = Field(default=5, ge=0)
    max_body_bytes: int = Field(default=20 << 20, ge=1)
    """Limit while streaming, after content decoding."""
    allowed_private_hosts: tuple[str, ...] = ()
    """``host:port`` pairs that may resolve to private or loopback addresses; meant for the demo's web only."""
    total_connections: int = execution_field(64, ge=1)
    connections_per_host: int = execution_field(16, ge=1)
    host_delay_seconds: float = execution_field(0.0, ge=0)
    """Shortest time between the starts of two requests to one host."""


class ImageTransform(FrozenConfig):
    """How a downloaded image becomes a training image: limits, then short side resized, centre crop, RGB."""

    formats: tuple[ImageFormat, ...] = tuple(ImageFormat)
    animation: Literal["drop", "first_frame"] = "drop"
    """Handling of images with more than one frame (GIF, APNG, WebP); frames after the first are never decoded."""
    max_source_pixels: int = Field(default=64_000_000, ge=1)
    """Checked on the header, before pixels are decoded."""
    min_source_side_px: int = Field(default=1, ge=1)
    max_source_aspect: float | None = Field(default=None, ge=1)
    size_px: int = Field(default=256, ge=8)
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    """Resize filter. All of them widen their support when shrinking, so none aliases. The paper's released code uses
    bilinear. Bicubic takes 1.3 times as long, lanczos 1.7 times, box 2.8 times."""
    jpeg_decoding: Literal["whole", "scaled"] = "whole"
    """``scaled`` lets the JPEG decoder shrink an image to 1/2, 1/4 or 1/8 as long as both sides stay at least
    `size_px`, and the filter does the rest. It saves at least a sixth of the time, more for larger images, and changes
    pixels about as much as another filter would (`tests.benchmarks.download`)."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    jpeg_subsampling: Literal["4:4:4", "4:2:0"] = "4:2:0"


class ImagesConfig(FrozenConfig):
    """The download stage: fetching, decoding, and the share of failures that is normal."""

    fetch: FetchConfig = FetchConfig()
    transform: ImageTransform = ImageTransform()
    rows_per_shard: int = Field(default=1000, ge=1)
    """Subset rows per shard; failed rows leave a shard with fewer images."""
    max_failure_share: float = execution_field(0.9, gt=0, le=1)
    """The stage stops if more than this share of `failure_window` consecutive rows fail; 1 never stops it."""
    failure_window: int = execution_field(100, ge=1)
    """Rows over which failures are counted; the whole shard if it is smaller but has at least 20 rows."""
    decode_workers: int = execution_field(2, ge=1)
    decode_seconds: float = Field(default=30.0, gt=0)
    """Longest time to decode one image; the row then fails as ``decode_timeout``."""
    drift: Literal["keep", "drop"] = "keep"
    """Handling of images whose SHA-256 is no longer that of the source table (DataComp has one): drift is always
    recorded, and ``drop`` drops the row as ``drifted``."""
    shards_in_flight: int = execution_field(4, ge=1)
    """Shards fetched at the same time, so that one slow host does not idle the rest; all are held in memory."""
    workers: WorkersConfig = execution_field(WorkersConfig())
    """On Ray each shard is fetched by a process with `total_connections` of its own; `connections_per_host` is divided
    by the number of shards that fit on the cluster (at least one each)."""
    retry_passes: int = Field(default=0, ge=0, le=10)
    """Further passes after the first has requested all rows of the part. Each requests the rows with a transient
    failure again (see `FetchConfig.retries`), in addition to the retries within a pass."""
    retry_pass_seconds: float = execution_field(60.0, ge=0)
    """Pause between passes; on Ray each shard makes its passes independently."""
    later_passes: int = Field(default=0, ge=0)
    """0 downloads. n starts from the finished output of n - 1, requests failed rows that may succeed by now, and copies
    the rest: raise it by one on a later day and change nothing else. It also requests rows with longer-lasting failures
    (bad certificates, broken HTTP, empty bodies)."""
