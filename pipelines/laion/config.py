"""Configurations of the stages `laion_index`, `laion_subset` and `laion_selection`."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, execution_field


class SourceContent(FrozenConfig):
    """One metadata file by content: what makes it the same file on another machine."""

    name: str = Field(min_length=1)
    """Path relative to the source folder, or the file's name where the source is a list or a glob."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    num_bytes: int = Field(ge=0)


class LaionIndexConfig(FrozenConfig):
    """Which LAION metadata files there are. `pipelines.laion.sources.scan_index` builds it."""

    source: tuple[str, ...] = execution_field(min_length=1)
    """Folders (searched for ``*.parquet`` at any depth), globs, or files; on disk, in object stores, or files by
    ``https://``."""
    content: tuple[SourceContent, ...] = Field(min_length=1)
    """The files by name and digest, sorted by name; a file's name says which part it is."""
    digest_cache: str | None = execution_field(None)
    """JSON file that remembers digests by path, size and modification time, so that no file is hashed twice."""


class EntryList(FrozenConfig):
    """A text file of URLs, domains or sample keys, one a line, by content.

    `scan_entry_list` in `pipelines.laion.sources` builds it.
    """

    path: str = execution_field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class LaionSubsetConfig(FrozenConfig):
    """Rules for keeping a LAION row; a rule set to None is off, and a row counts under the first rule that drops it.

    The order of the rules is the order of `pipelines.laion.rules.REASONS`. The URL must always be there and be http or
    https. A row whose value for an active rule is null or NaN is dropped as ``<column>_missing`` unless `keep_missing`.
    Published sets of rules, with their sources, are in `pipelines.laion.presets`.
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
    """A condition in the manner of SQL over the columns of the file, see `pipelines.laion.where`."""
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
        from pipelines.core.errors import ThroughlineError
        from pipelines.laion.where import Expression

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
