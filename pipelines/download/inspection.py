"""Looks into a finished `images` output: its rows for a trace, its first images for a preview."""

from collections.abc import Iterator
from typing import Any

from pipelines.download.status import FetchStatus
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.preview import NUM_IMAGES, thumbnail
from pipelines.runner.rows import FoundRow, RowSearch


def find_image_rows(images: StageOutput, search: RowSearch) -> Iterator[FoundRow]:
    """Yield the wanted rows that have an image. Reads the small status tables, which have a row for each image."""
    for row in search.rows(images, "status-", ["status"]):
        if row["status"] == FetchStatus.OK:
            yield FoundRow(row["sample_key"], row["file"].replace("status-", "images-"), {})


def first_images(images: StageOutput) -> list[dict[str, Any]]:
    """Return sample_key, alt_text and image of the first rows of an output."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for path in images.files(".parquet"):
        if not path.name.startswith("images-"):
            continue
        for batch in pq.ParquetFile(path).iter_batches(NUM_IMAGES, columns=["sample_key", "alt_text", "image"]):
            rows += batch.to_pylist()
            if len(rows) >= NUM_IMAGES:
                return rows[:NUM_IMAGES]
    return rows


def preview_images(images: StageOutput, inputs: Inputs) -> str:
    """Return thumbnails of the first images."""
    return " ".join(thumbnail(row["image"], row["alt_text"] or "") for row in first_images(images))
