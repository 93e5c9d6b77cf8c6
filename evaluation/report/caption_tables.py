"""Finds the tables of captions and of the pictures they were written for, without reading all of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput


@dataclass(frozen=True)
class CaptionTable:
    """A table of captions and the table of pictures that it belongs to."""

    captions_path: Path
    images_path: Path

    def captions(self) -> dict[str, str]:
        """Return sample_key -> caption."""
        import pyarrow.parquet as pq

        table = pq.read_table(self.captions_path, columns=["sample_key", "caption"])
        return dict(zip(table["sample_key"].to_pylist(), table["caption"].to_pylist(), strict=True))

    def pictures(self, sample_keys: Collection[str]) -> dict[str, tuple[str, bytes]]:
        """Return sample_key -> (alt_text, encoded picture) of the keys asked for; other pictures are passed over."""
        import pyarrow.parquet as pq

        found: dict[str, tuple[str, bytes]] = {}
        columns = ["sample_key", "alt_text", "image"]
        for batch in pq.ParquetFile(self.images_path).iter_batches(batch_size=256, columns=columns):
            for index, key in enumerate(batch.column("sample_key").to_pylist()):
                if key in sample_keys:
                    found[key] = (batch.column("alt_text")[index].as_py() or "", batch.column("image")[index].as_py())
        missing = sorted(set(sample_keys) - set(found))
        if missing:
            raise ThroughlineError(f"{self.images_path}: no picture for the caption of {missing[0]}; re-run captions")
        return found


def caption_tables(images: Sequence[StageOutput], captions: Sequence[StageOutput]) -> list[CaptionTable]:
    """Return every table of captions with its pictures, by part and name.

    Raises ThroughlineError where the pictures of some captions are not among the inputs.
    """
    by_version = {item.data_version: item for item in images}
    tables = []
    for output in sorted(captions, key=lambda item: (item.manifest.partition or "", item.data_version)):
        for ref in output.manifest.inputs.get("images", ()):
            if ref.data_version not in by_version:
                raise ThroughlineError(
                    f"captions {output.manifest.partition}: made for images {ref.data_version}, which are not given; "
                    "give the images that the captions were made for"
                )
            pictures = by_version[ref.data_version]
            for path in output.files(".parquet"):
                if path.name.startswith("captions-"):
                    images_path = pictures.path(f"images-{path.name.removeprefix('captions-')}")
                    tables.append(CaptionTable(path, images_path))
    return tables


def evenly(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` indices spread evenly over range(count)."""
    if wanted >= count:
        return list(range(count))
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]
