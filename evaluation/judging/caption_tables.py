"""Finds captions and the images they describe among finished outputs, reading only the tables that are needed."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput


@dataclass(frozen=True)
class CaptionTable:
    """A table of captions and the table of images that it was made from."""

    captions_path: Path
    images_path: Path

    def captions(self) -> dict[str, str]:
        """Return sample_key -> caption."""
        import pyarrow.parquet as pq

        table = pq.read_table(self.captions_path, columns=["sample_key", "caption"])
        return dict(zip(table["sample_key"].to_pylist(), table["caption"].to_pylist(), strict=True))

    def images(self, sample_keys: Collection[str]) -> dict[str, tuple[str, bytes]]:
        """Return sample_key -> (alt_text, encoded image) for the given keys.

        Raises ThroughlineError if an image is missing.
        """
        import pyarrow.parquet as pq

        images: dict[str, tuple[str, bytes]] = {}
        columns = ["sample_key", "alt_text", "image"]
        for batch in pq.ParquetFile(self.images_path).iter_batches(batch_size=256, columns=columns):
            for index, key in enumerate(batch.column("sample_key").to_pylist()):
                if key in sample_keys:
                    images[key] = (batch.column("alt_text")[index].as_py() or "", batch.column("image")[index].as_py())
        missing = sorted(set(sample_keys) - set(images))
        if missing:
            raise ThroughlineError(f"{self.images_path}: no image for the caption of {missing[0]}; re-run captions")
        return images


def caption_tables(images: Sequence[StageOutput], captions: Sequence[StageOutput]) -> list[CaptionTable]:
    """Return all caption tables with their image tables, ordered by part and name.

    Raises ThroughlineError if the images of some captions are not among the inputs.
    """
    by_version = {item.data_version: item for item in images}
    tables = []
    for output in sorted(captions, key=lambda item: (item.manifest.partition or "", item.data_version)):
        for ref in output.manifest.inputs.get("images", ()):
            if ref.data_version not in by_version:
                raise ThroughlineError(
                    f"captions {output.manifest.partition}: made from images {ref.data_version}, which is not among "
                    "the inputs; add it"
                )
            images_output = by_version[ref.data_version]
            for path in output.files(".parquet"):
                if path.name.startswith("captions-"):
                    images_path = images_output.path(f"images-{path.name.removeprefix('captions-')}")
                    tables.append(CaptionTable(path, images_path))
    return tables


def even_indices(count: int, limit: int) -> list[int]:
    """Return at most `limit` indices, spread evenly over range(count)."""
    if limit >= count:
        return list(range(count))
    return [(2 * index + 1) * count // (2 * limit) for index in range(limit)]
