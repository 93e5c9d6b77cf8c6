"""The tables of the ``images`` stage, for the stages that read them: units, schemas, reading."""

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
"""`image` is the encoded square; format, size and digest describe the downloaded original; `perceptual_hash` is that of
the square, 16 hex digits (`pipelines.download.perceptual_hash`); `drifted` is true if the SHA-256 of the downloaded
bytes differs from the source table's, null if the table states none."""

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
"""One row per subset row, in the same order; `status` is a `pipelines.download.status.FetchStatus`; `num_passes` is the
number of passes that requested the row. Attempts within a pass are not stored: they would make the bytes depend on
timing."""


@dataclass(frozen=True)
class ImageUnit:
    """The images of one shard; `name` is the unit's name in all later stages."""

    name: str
    path: Path
    num_rows: int

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """Return the images; raises ThroughlineError if the file is damaged or lacks a column."""
        return read_table(self.path, IMAGES_SCHEMA if columns is None else pa.schema(map(IMAGES_SCHEMA.field, columns)))


def image_units(images: StageOutput) -> Iterator[ImageUnit]:
    """Yield the units of an ``images`` output that contain at least one image, in order."""
    for path in images.files(".parquet"):
        if path.name.startswith(PREFIX):
            yield image_unit(images, path.stem.removeprefix(PREFIX))


def image_unit(images: StageOutput, name: str) -> ImageUnit:
    """Return the unit called `name`."""
    entry = images.manifest.file(f"{PREFIX}{name}.parquet")
    return ImageUnit(name, images.path(entry.path), entry.num_rows or 0)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Return the columns of `schema` from a stage's table.

    Raises ThroughlineError, naming the file, if it is damaged or lacks a column.
    """
    try:
        return pq.read_table(path, columns=schema.names).cast(schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ThroughlineError(f"{path}: not a readable table of {', '.join(schema.names)} ({reason})") from error
