"""The tables of the ``images`` stage, for the stages that read them: units, columns, iteration."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput

PREFIX = "images-"

IMAGES_SCHEMA = pa.schema(
    [
        pa.field("sample_key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("alt_text", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("source_num_bytes", pa.int64(), nullable=False),
        pa.field("perceptual_hash", pa.string(), nullable=False),
        pa.field("drifted", pa.bool_()),
        pa.field("content_type", pa.string()),
        pa.field("final_url", pa.string(), nullable=False),
    ]
)
"""`image` is the encoded square; `format`, sides and digest are those of the picture as it was downloaded;
`perceptual_hash` is the square's, 16 hex digits (`pipelines.download.perceptual_hash`); `drifted` says whether the
downloaded bytes have another SHA-256 than the source table states, null where it states none."""

STATUS_SCHEMA = pa.schema(
    [
        pa.field("sample_key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("http_status", pa.int32()),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("num_passes", pa.int32(), nullable=False),
    ]
)
"""One row per subset row, in its order; `status` is a word of `pipelines.download.status.FetchStatus`; `num_passes` is
the number of passes that asked for it (attempts within a pass are left out: the same web would give other bytes)."""


@dataclass(frozen=True)
class ImageUnit:
    """One shard's worth of pictures; `name` is the unit's name in every stage after."""

    name: str
    path: Path
    num_rows: int

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Return the pictures; raises ThroughlineError where the file is not what the stage wrote."""
        return read_table(self.path, IMAGES_SCHEMA if columns is None else pa.schema(map(IMAGES_SCHEMA.field, columns)))


def image_units(images: StageOutput) -> Iterator[ImageUnit]:
    """Yield the units of an ``images`` output that hold at least one picture, in order."""
    for path in images.files(".parquet"):
        if path.name.startswith(PREFIX):
            yield image_unit(images, path.stem.removeprefix(PREFIX))


def image_unit(images: StageOutput, name: str) -> ImageUnit:
    """Return the unit of that name."""
    entry = images.manifest.file(f"{PREFIX}{name}.parquet")
    return ImageUnit(name, images.path(entry.path), entry.num_rows or 0)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Return the columns of `schema` from a table that a stage wrote.

    Raises ThroughlineError that names the file where it is damaged or lacks a column.
    """
    try:
        return pq.read_table(path, columns=schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ThroughlineError(f"{path}: not a readable table of {', '.join(schema.names)} ({reason})") from error
