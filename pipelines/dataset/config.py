"""Configuration of the stage `dataset`."""

from pydantic import Field

from pipelines.cluster.config import WorkersConfig
from pipelines.core.config import FrozenConfig, added_field, execution_field
from pipelines.laion.config import EntryList


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
