"""Configuration of the stage `images`."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, added_field, execution_field
from pipelines.laion.config import EntryList


class ImageFormat(StrEnum):
    """A picture format, recognised by its first bytes and never by its content type."""

    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    GIF = "gif"


class FetchConfig(FrozenConfig):
    """How pictures are asked for. Time-outs and retries count towards the result: they decide which rows arrive."""

    user_agent: str = Field(default="Mozilla/5.0 (compatible; throughline/0.1)", min_length=1)
    opt_out_agent: str | None = None
    """Agent name whose opt-out directives are obeyed as well (``X-Robots-Tag: <agent>: noai``)."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of X-Robots-Tag that drop a picture; the default is img2dataset's. Empty: none are honoured."""
    opt_outs: EntryList | None = added_field(None)
    """URLs and domains that no request may go to, on any hop of a redirect, as in `LaionSubsetConfig`. In a profile
    this list and the next two are those of its `laion_subset` where nothing else is set."""
    urls_denied: EntryList | None = added_field(None)
    domains_denied: EntryList | None = added_field(None)
    connect_seconds: float = Field(default=10.0, gt=0)
    read_seconds: float = Field(default=10.0, gt=0)
    """Longest silence of a server."""
    total_seconds: float = Field(default=30.0, gt=0)
    """Longest time for one attempt, redirects included; waiting for a free connection doesn't count."""
    verify_tls: bool = True
    """Whether a server's certificate must be valid."""
    retries: int = Field(default=2, ge=0, le=10)
    """Further attempts after a failure that can heal: no connection, 429, 5xx, a broken body, time-outs."""
    retry_timeouts: bool = True
    backoff_seconds: float = execution_field(0.5, ge=0)
    """Mean wait before the first retry, doubled for each further one; jitter is half to one and a half of it."""
    max_retry_after_seconds: float = Field(default=30.0, ge=0)
    """Longest wait a server may ask for (Retry-After): its whole host is left alone for that time. A URL whose server
    asks for more is not asked for again until then."""
    max_redirects: int = Field(default=5, ge=0)
    max_body_bytes: int = Field(default=20 << 20, ge=1)
    """Limit while streaming, after content decoding."""
    allowed_private_hosts: tuple[str, ...] = ()
    """``host:port`` pairs that may resolve to private or loopback addresses; for the demo's web alone."""
    total_connections: int = execution_field(64, ge=1)
    connections_per_host: int = execution_field(16, ge=1)
    host_delay_seconds: float = execution_field(0.0, ge=0)
    """Least time between the starts of two requests to one host."""


class ImageTransform(FrozenConfig):
    """How a downloaded picture becomes a training picture: limits, then short side resized, centre crop, RGB."""

    formats: tuple[ImageFormat, ...] = tuple(ImageFormat)
    animation: Literal["drop", "first_frame"] = "drop"
    """What becomes of a picture with more than one frame (GIF, APNG, WebP); other frames are never decoded."""
    max_source_pixels: int = Field(default=64_000_000, ge=1)
    """Checked on the header, before anything is decoded."""
    min_source_side_px: int = Field(default=1, ge=1)
    max_source_aspect: float | None = Field(default=None, ge=1)
    size_px: int = Field(default=256, ge=8)
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    """Filter of the resize; each widens its support when it shrinks, so none of them aliases. The paper's released code
    resizes with bilinear. Bicubic takes 1.3 times as long, lanczos 1.7 times, box 2.8 times."""
    jpeg_decoding: Literal["whole", "scaled"] = "whole"
    """``scaled`` lets the JPEG decoder itself shrink a picture to a half, a quarter or an eighth while both sides stay
    at least `size_px`, and the filter does the rest. It saves a sixth of the time and more, the larger the pictures,
    and moves pixels as far as another filter would (`tests.benchmarks.download`)."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    jpeg_subsampling: Literal["4:4:4", "4:2:0"] = "4:2:0"


class ImagesConfig(FrozenConfig):
    """The download stage: what is fetched, how it is decoded, and how much failure is normal."""

    fetch: FetchConfig = FetchConfig()
    transform: ImageTransform = ImageTransform()
    rows_per_shard: int = Field(default=1000, ge=1)
    """Subset rows per shard; those that fail are missing from it."""
    max_failure_share: float = execution_field(0.9, gt=0, le=1)
    """A longer share of failures than this over `failure_window` rows in a row stops the stage; 1 never stops it."""
    failure_window: int = execution_field(100, ge=1)
    """Rows over which failures are counted; in a shard of fewer rows, all of it, if it has at least 20."""
    decode_workers: int = execution_field(2, ge=1)
    decode_seconds: float = Field(default=30.0, gt=0)
    """A picture that keeps a decoder busy for longer is given up."""
    drift: Literal["keep", "drop"] = "keep"
    """What becomes of a picture whose bytes no longer have the SHA-256 that the source table states (DataComp does);
    it is recorded either way, and dropped as ``drifted``."""
    shards_in_flight: int = execution_field(4, ge=1)
    """Shards fetched at the same time, so that one slow host doesn't idle the rest; costs their pictures' memory."""
    workers: WorkersConfig = execution_field(WorkersConfig())
    """On Ray a shard is fetched by a process with `total_connections` of its own, and `connections_per_host` is divided
    among the shards there is room for (one at least)."""
    retry_passes: int = Field(default=0, ge=0, le=10)
    """Further passes over the part, once all of it was asked for: each asks again for the rows whose failure can heal
    (see `FetchConfig.retries`), whatever their attempts within a pass came to."""
    retry_pass_seconds: float = execution_field(60.0, ge=0)
    """Rest between the end of a pass and the next; on Ray each shard makes its passes by itself."""
    later_passes: int = Field(default=0, ge=0)
    """0 downloads. n starts from the finished output of n - 1, asks for its failed rows that may have healed since,
    and takes over the rest as it is: raise it by one on a later day, and all else stays as it was. Of failures that
    last (bad certificates, broken HTTP, empty bodies) those are asked for too."""
