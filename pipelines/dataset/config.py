"""Configuration of the stage `dataset`."""

from pydantic import Field

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, added_field, execution_field
from pipelines.laion.config import EntryList


class DatasetConfig(FrozenConfig):
    """The table of samples over all parts."""

    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of samples held out, chosen by sample key: independent of the other samples in the set."""
    validation_salt: str = "validation-1"
    """Another salt selects other samples."""
    duplicate_images: bool = False
    """Keep only one of all samples with the same source bytes (others: ``duplicate_image``)."""
    near_duplicates: int | None = Field(default=None, ge=0, le=16)
    """Keep only one of all samples whose perceptual hashes differ in at most this many of 64 bits (others:
    ``near_duplicate``); None is off. 4 finds other sizes and qualities of an image; time grows steeply with it. Of
    these and of `duplicate_images`, the sample with the most source pixels is kept, then that with the smallest key."""
    withdrawn: EntryList | None = added_field(None)
    """Sample keys, 32 hex digits each, of rows that must no longer be trained on (``withdrawn``). No stage before the
    dataset is recomputed. `throughline withdraw` writes the list. With `duplicate_images` or `near_duplicates`,
    duplicates of a withdrawn image are dropped too."""
    workers: WorkersConfig = execution_field(WorkersConfig())
    """Used for the search for near-duplicates."""
