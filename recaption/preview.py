"""Preview of a finished `captions` output: images with their alt-text and caption."""

from pipelines.download.inspection import first_images
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.preview import table_cell, thumbnail

_NUM_ROWS = 64
"""Rows of the first caption table in which captions of the first images are looked up."""


def preview_captions(captions: StageOutput, inputs: Inputs) -> str:
    """Return a table of the first images, their alt-texts and their captions."""
    import pyarrow.parquet as pq

    by_key: dict[str, str] = {}
    for path in captions.files(".parquet")[:1]:
        table = pq.read_table(path, columns=["sample_key", "caption"]).slice(0, _NUM_ROWS)
        by_key = dict(zip(table["sample_key"].to_pylist(), table["caption"].to_pylist(), strict=True))
    rows = [
        f"| {thumbnail(row['image'], '')} | {table_cell(row['alt_text'])} "
        f"| {table_cell(by_key.get(row['sample_key'], ''))} |"
        for row in first_images(inputs["images"][0])
    ]
    return "| image | alt-text | caption |\n|---|---|---|\n" + "\n".join(rows)
