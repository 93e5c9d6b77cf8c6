"""Configurations of the data stages, from LAION metadata to the data set."""

from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.config import FrozenConfig, added_field, execution_field


class WorkersConfig(FrozenConfig):
    """Where the units of a stage are computed: in its own process, or on a Ray cluster. Nothing here changes a byte."""

    ray_address: str | None = execution_field(None, min_length=1)
    """None: in the stage's own process. "local" starts Ray on this machine, "auto" joins the cluster this process runs
    in, ``host:port`` names one. Every node of a cluster must see the folder of outputs at the same path."""
    cpus_per_unit: float = execution_field(1.0, gt=0)
    """Cores that a unit reserves on its node; a unit of `images` has as many decoders."""
    max_units_in_flight: int | None = execution_field(None, ge=1)
    """Units handed to Ray at a time, each held in memory until it is done; None: two for each there is room for."""
    max_deaths_per_unit: int = execution_field(4, ge=0)
    """Times a unit's worker or node may die (killed, out of memory, lost) before the stage gives up."""
    room_timeout_seconds: float = execution_field(600.0, gt=0)
    """Longest wait while no node has room for a unit: an autoscaler takes minutes, a cluster too small for ever."""


class SourceContent(FrozenConfig):
    """One metadata file by content: what makes it the same file on another machine."""

    name: str = Field(min_length=1)
    """Path relative to the source folder, or the file's name where the source is a list or a glob."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class LaionIndexConfig(FrozenConfig):
    """Which LAION metadata files there are. Build it with `scan`, which digests them."""

    source: tuple[str, ...] = execution_field(min_length=1)
    """Folders (searched for ``*.parquet`` at any depth), globs, or files; on disk, by ``s3://``, or files by
    ``https://``."""
    content: tuple[SourceContent, ...] = Field(min_length=1)
    """The files by name and digest, sorted by name; a file's name says which part it is."""
    digest_cache: str | None = execution_field(None)
    """JSON file that remembers digests by path, size and modification time, so that no file is hashed twice."""

    @classmethod
    def scan(cls, source: str | Path | tuple[str, ...] | list[str], digest_cache: Path | None = None) -> Self:
        """Find and digest the parquet files of `source`; each is read once, and never again while it is unchanged.

        Raises ThroughlineError where a folder or file is missing or empty, or no parquet file is found.
        """
        from pipelines.source_files import digest_sources, find_sources

        sources = (str(source),) if isinstance(source, (str, Path)) else tuple(map(str, source))
        content = digest_sources(find_sources(sources), digest_cache)
        return cls(source=sources, content=content, digest_cache=str(digest_cache) if digest_cache else None)


class EntryList(FrozenConfig):
    """A text file of URLs, domains or sample keys, one a line, by content. Build it with `scan`, which digests it."""

    path: str = execution_field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def scan(cls, path: str | Path) -> Self:
        """Digest a list file; raises ThroughlineError where it can't be read."""
        from pipelines.digest import file_sha256
        from pipelines.errors import ThroughlineError

        try:
            return cls(path=str(Path(path).absolute()), sha256=file_sha256(Path(path)))
        except OSError as error:
            raise ThroughlineError(f"{path}: the list can't be read ({error.strerror}); check the path") from error


class LaionSubsetConfig(FrozenConfig):
    """Rules for keeping a LAION row; a rule set to None is off, and a row counts under the first rule that drops it.

    The order of the rules is the order of `pipelines.laion_rules.REASONS`. The URL must always be there and be http or
    https. A row whose value for an active rule is null or NaN is dropped as ``<column>_missing`` unless `keep_missing`.
    Published sets of rules, with their sources, are in `pipelines.laion_presets`.
    """

    opt_outs: EntryList | None = None
    """What must never be in a set: URLs (with ``://``), sample keys (32 hex digits), domains and all below them."""
    urls_denied: EntryList | None = None
    urls_allowed: EntryList | None = None
    """URLs that alone may stay, byte by byte."""
    domains_denied: EntryList | None = None
    domains_allowed: EntryList | None = None
    """Domains that alone may stay; ``example.com`` means ``img.example.com`` too."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    """CLIP ViT-B/32 similarity of picture and text; LAION-400M's own threshold is 0.3, applied before publication."""
    min_similarity_l14: float | None = Field(default=None, ge=-1, le=1)
    """CLIP ViT-L/14 similarity, which DataComp's tables carry."""
    min_aesthetic: float | None = None
    """Predicted aesthetic score, about 0 to 10; v1 and v2 predictors differ, the table's column decides which it is."""
    max_pwatermark: float | None = Field(default=None, ge=0, le=1)
    """Probability of a watermark; the row's must be below."""
    max_punsafe: float | None = Field(default=None, ge=0, le=1)
    """Probability of unsafe content; the row's must be below."""
    nsfw_allowed: tuple[str, ...] | None = None
    """NSFW labels to keep, in any case: ``UNLIKELY``, ``UNSURE``, ``NSFW``."""
    languages_allowed: tuple[str, ...] | None = None
    """Values of the language column to keep, in any case, such as ``en``."""
    licenses_allowed: tuple[str, ...] | None = None
    """Values of the licence column to keep, in any case; ``?`` is LAION's word for unknown."""
    min_side_px: int | None = Field(default=None, ge=1)
    """Least of width and height as LAION states them."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Longer side over shorter side as LAION states them."""
    min_text_chars: int | None = Field(default=None, ge=1)
    max_text_chars: int | None = Field(default=None, ge=1)
    """Length of the alt-text in characters (code points)."""
    min_text_words: int | None = Field(default=None, ge=1)
    max_text_words: int | None = Field(default=None, ge=1)
    """Length of the alt-text in words between white space."""
    where: str | None = None
    """A condition in the manner of SQL over the columns of the file, see `pipelines.row_expression`."""
    keep_empty_text: bool = False
    """Whether rows with null or blank alt-text stay; null then becomes the empty string."""
    keep_missing: bool = False
    """Whether a null or NaN passes a rule instead of failing it; for `where`, whether an unknown condition passes."""
    drop_duplicate_urls: bool = True
    """Keep the first row of each URL within the part. Rows of equal sample key are always reduced to the first."""
    source: tuple[str, ...] = execution_field(())
    """Where the metadata files lie; empty: where the index found them."""
    digest_cache: str | None = execution_field(None)
    """See `LaionIndexConfig.digest_cache`; empty: the index's."""
    workers: WorkersConfig = execution_field(WorkersConfig())
    """A part is one unit: its rows are told apart in their order. Parts run side by side where several are asked for at
    the same time (`throughline subset --ray`, partitions of Dagster)."""

    @model_validator(mode="after")
    def _lengths_in_order(self) -> Self:
        for unit in ("chars", "words"):
            least, most = getattr(self, f"min_text_{unit}"), getattr(self, f"max_text_{unit}")
            if least and most and least > most:
                raise ValueError(f"min_text_{unit} {least} exceeds max_text_{unit} {most}")
        return self

    @field_validator("where")
    @classmethod
    def _where_can_be_read(cls, where: str | None) -> str | None:
        from pipelines.errors import ThroughlineError
        from pipelines.row_expression import Expression

        if where is not None:
            try:
                Expression(where)
            except ThroughlineError as error:
                # The field's name stands before it wherever it is shown.
                raise ValueError(str(error).removeprefix("where, ")) from error
        return where


class LaionSelectionConfig(FrozenConfig):
    """What becomes of the parts' rows taken together: duplicates between parts, and a sample of a fixed size."""

    drop_duplicate_urls: bool = True
    """Keep one row of each URL over all parts: that of the smallest sample key. Pairs are always reduced to one."""
    limit: int | None = Field(default=None, ge=1)
    """Most rows to keep: those of the lowest hash rank, the same rows however they are spread over parts."""
    sample_salt: str = "sample-1"
    """Another salt gives another sample."""
    bucket_rows: int = execution_field(2_000_000, ge=1)
    """Rows whose hashes are held in memory at a time, at 150 bytes each; the others wait on disk, at 40 bytes each.
    On a cluster each part has files of its own for all buckets: for hundreds of parts take larger ones."""
    workers: WorkersConfig = execution_field(WorkersConfig())


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


class DatasetConfig(FrozenConfig):
    """The roll-up over all parts."""

    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples held out, chosen by sample key: the same samples whatever else is in the set."""
    validation_salt: str = "validation-1"
    """Another salt gives another choice."""
    duplicate_images: bool = False
    """Whether of all samples with the same source bytes one alone stays (``duplicate_image``)."""
    near_duplicates: int | None = Field(default=None, ge=0, le=16)
    """Of samples whose perceptual hashes differ in at most this many of 64 bits one alone stays (``near_duplicate``);
    None is off. 4 finds other sizes and qualities of one picture; time grows steeply with it. The winner, of these and
    of `duplicate_images`, is the one with the most source pixels, then the one with the smallest key."""
    withdrawn: EntryList | None = added_field(None)
    """Sample keys, 32 hex digits each, of rows that must no longer be trained on (``withdrawn``); nothing before the
    data set is computed anew for it. `throughline withdraw` writes the list. With `duplicate_images` or
    `near_duplicates`, what is alike a withdrawn picture goes with it."""
    workers: WorkersConfig = execution_field(WorkersConfig())
    """For the search for near duplicates."""
