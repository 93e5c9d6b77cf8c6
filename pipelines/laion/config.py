"""Configurations of the stages `laion_index`, `laion_subset` and `laion_selection`."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, execution_field


class SourceContent(FrozenConfig):
    """One metadata file, identified by content, so that it is the same file on every machine."""

    name: str = Field(min_length=1)
    """Path relative to the source folder, or the file's name where the source is a list or a glob."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class LaionIndexConfig(FrozenConfig):
    """The LAION metadata files. `pipelines.laion.sources.scan_index` builds it."""

    source: tuple[str, ...] = execution_field(min_length=1)
    """Folders (searched for ``*.parquet`` at any depth), globs, or files; on disk, in object stores, or files by
    ``https://``."""
    content: tuple[SourceContent, ...] = Field(min_length=1)
    """The files by name and digest, sorted by name; the name determines the part."""
    digest_cache: str | None = execution_field(None)
    """JSON file that caches digests by path, size and modification time, so that no file is hashed twice."""


class EntryList(FrozenConfig):
    """A text file of URLs, domains or sample keys, one per line, identified by content.

    `scan_entry_list` in `pipelines.laion.sources` builds it.
    """

    path: str = execution_field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class LaionSubsetConfig(FrozenConfig):
    """Filter rules for LAION rows. None switches a rule off; a row is counted under the first rule that drops it.

    Rules apply in the order of `pipelines.laion.rules.REASONS`. A row always needs an http or https URL. A row whose
    value for an active rule is null or NaN is dropped as ``<column>_missing`` unless `keep_missing`. For published rule
    sets, with their sources, see `pipelines.laion.presets`.
    """

    opt_outs: EntryList | None = None
    """Entries to exclude: URLs (with ``://``), sample keys (32 hex digits), domains with their subdomains."""
    urls_denied: EntryList | None = None
    urls_allowed: EntryList | None = None
    """Keep only these URLs, compared byte by byte."""
    domains_denied: EntryList | None = None
    domains_allowed: EntryList | None = None
    """Keep only these domains; ``example.com`` includes ``img.example.com``."""
    min_similarity: float | None = Field(default=None, ge=-1, le=1)
    """CLIP ViT-B/32 similarity of image and text; LAION-400M was published with a threshold of 0.3."""
    min_similarity_l14: float | None = Field(default=None, ge=-1, le=1)
    """CLIP ViT-L/14 similarity, a column of DataComp's tables."""
    min_aesthetic: float | None = None
    """Predicted aesthetic score, about 0 to 10. The v1 and v2 predictors differ; the table's column decides."""
    max_pwatermark: float | None = Field(default=None, ge=0, le=1)
    """Probability of a watermark; a row's value must be below it."""
    max_punsafe: float | None = Field(default=None, ge=0, le=1)
    """Probability of unsafe content; a row's value must be below it."""
    nsfw_allowed: tuple[str, ...] | None = None
    """NSFW labels to keep, case-insensitive: ``UNLIKELY``, ``UNSURE``, ``NSFW``."""
    languages_allowed: tuple[str, ...] | None = None
    """Values of the language column to keep, case-insensitive, such as ``en``."""
    licenses_allowed: tuple[str, ...] | None = None
    """Values of the licence column to keep, case-insensitive; LAION writes ``?`` for unknown."""
    min_side_px: int | None = Field(default=None, ge=1)
    """Minimum of width and height as the metadata states them."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Maximum of longer side / shorter side as the metadata states them."""
    min_text_chars: int | None = Field(default=None, ge=1)
    max_text_chars: int | None = Field(default=None, ge=1)
    """Length of the alt-text in characters (code points)."""
    min_text_words: int | None = Field(default=None, ge=1)
    max_text_words: int | None = Field(default=None, ge=1)
    """Length of the alt-text in words separated by whitespace."""
    where: str | None = None
    """A SQL condition over the columns of the file, see `pipelines.laion.where`."""
    keep_empty_text: bool = False
    """Keep rows with null or blank alt-text; null becomes the empty string."""
    keep_missing: bool = False
    """Let null and NaN pass the rules, and rows for which `where` is unknown pass `where`."""
    drop_duplicate_urls: bool = True
    """Keep the first row of each URL within the part. Rows of the same sample key are always reduced to the first."""
    source: tuple[str, ...] = execution_field(())
    """Location of the metadata files; empty: where the index found them."""
    digest_cache: str | None = execution_field(None)
    """See `LaionIndexConfig.digest_cache`; empty: the index's."""
    workers: WorkersConfig = execution_field(WorkersConfig())
    """A part is one unit, because its rows are deduplicated in order. Parts run in parallel where several are requested
    at once (`throughline subset --ray`, Dagster partitions)."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        for unit in ("chars", "words"):
            least, most = getattr(self, f"min_text_{unit}"), getattr(self, f"max_text_{unit}")
            if least and most and least > most:
                raise ValueError(f"min_text_{unit} {least} exceeds max_text_{unit} {most}")
        return self

    @field_validator("where")
    @classmethod
    def _check_where(cls, where: str | None) -> str | None:
        if where is not None:
            from pipelines.laion.where import Condition, ConditionError

            try:
                Condition(where)
            except ConditionError as error:
                # Wherever the message is shown, the name of the field precedes it.
                raise ValueError(str(error).removeprefix("where, ")) from error
        return where


class LaionSelectionConfig(FrozenConfig):
    """Deduplication across parts, and a sample of a fixed size."""

    drop_duplicate_urls: bool = True
    """Keep one row per URL across all parts: the one with the smallest sample key. Pairs are always deduplicated."""
    limit: int | None = Field(default=None, ge=1)
    """Maximum number of rows to keep: those of the lowest hash rank, however rows are spread over parts."""
    sample_salt: str = "sample-1"
    """A different salt gives a different sample."""
    bucket_rows: int = execution_field(2_000_000, ge=1)
    """Rows deduplicated in memory at a time, at 150 bytes each; the others are on disk, at 40 bytes each. On a cluster
    each part writes one file per bucket: use larger buckets for hundreds of parts."""
    workers: WorkersConfig = execution_field(WorkersConfig())
