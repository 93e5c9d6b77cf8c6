"""What Dagster shows beside an output: counts, the conservation table, and pictures small enough to lie in its log."""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from pipelines.runner.outputs import StageOutput

if TYPE_CHECKING:
    from orchestration.graph.resolution import Task

_NUM_PICTURES = 8
_PICTURE_PX = 96


def describe(task: "Task", *, reused: bool, pictures: bool = True) -> dict[str, Any]:
    """Return Dagster metadata of a finished task."""
    output = task.output
    assert output is not None
    manifest = output.manifest
    metadata: dict[str, Any] = {
        "manifest": dg.MetadataValue.path(str(output.manifest_path)),
        "data_version": manifest.data_version,
        "fingerprint": manifest.fingerprint,
        "code_version": manifest.code_version,
        "reused": reused,
        "num_files": len(manifest.files),
        "num_bytes": sum(entry.num_bytes for entry in manifest.files),
    }
    if manifest.conservation is not None:
        metadata["dagster/row_count"] = manifest.conservation.rows_out
        metadata["conservation"] = dg.MetadataValue.md(conservation_table(output))
    if manifest.summary:
        metadata["summary"] = dg.MetadataValue.json(dict(manifest.summary))
    for name, value in manifest.measurements.items():
        if isinstance(value, int | float):
            metadata[f"measured/{name}"] = value
    if manifest.models:
        metadata["models"] = dg.MetadataValue.md(
            "\n".join(f"- {model.role}: `{model.id}` @ `{model.revision[:20]}`" for model in manifest.models)
        )
    if manifest.environment is not None:
        metadata["seconds"] = manifest.environment.seconds
        metadata["git_commit"] = manifest.environment.git_commit or "not in a git repository"
    if pictures and manifest.stage in _PREVIEWS and _is_here(task):
        metadata["preview"] = dg.MetadataValue.md(_PREVIEWS[manifest.stage](task))
    return metadata


def _is_here(task: "Task") -> bool:
    """Whether nothing need be fetched from an object store for a preview."""
    outputs = [task.output, *(item for items in (task.inputs or {}).values() for item in items)]
    return all(output is None or output.is_here for output in outputs)


def conservation_table(output: StageOutput) -> str:
    """Return the conservation of an output as a markdown table."""
    table = output.manifest.conservation
    assert table is not None
    rows = [("in", table.rows_in), *((f"dropped: {reason}", n) for reason, n in table.dropped.items())]
    rows.append(("out", table.rows_out))
    return "| rows | number |\n|---|---:|\n" + "\n".join(f"| {name} | {number:,} |" for name, number in rows)


def picture(image_bytes: bytes, alt: str) -> str:
    """Return an encoded picture as a small markdown image that carries its own bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(image_bytes)) as image:
        small = image.convert("RGB")
        small.thumbnail((_PICTURE_PX, _PICTURE_PX))
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=80)
    safe = "".join(character for character in alt if character.isalnum() or character in " ,.-")
    return f"![{safe}](data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()})"


def _first_images(images: StageOutput) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for path in images.files(".parquet"):
        if not path.name.startswith("images-"):
            continue
        for batch in pq.ParquetFile(path).iter_batches(_NUM_PICTURES, columns=["sample_key", "alt_text", "image"]):
            rows += batch.to_pylist()
            if len(rows) >= _NUM_PICTURES:
                return rows[:_NUM_PICTURES]
    return rows


def _show_images(task: "Task") -> str:
    assert task.output is not None
    return " ".join(picture(row["image"], row["alt_text"] or "") for row in _first_images(task.output))


def _show_captions(task: "Task") -> str:
    import pyarrow.parquet as pq

    assert task.output is not None and task.inputs is not None
    captions: dict[str, str] = {}
    for path in task.output.files(".parquet")[:1]:
        table = pq.read_table(path, columns=["sample_key", "caption"]).slice(0, 64)
        captions = dict(zip(table["sample_key"].to_pylist(), table["caption"].to_pylist(), strict=True))
    rows = [
        f"| {picture(row['image'], '')} | {_cell(row['alt_text'])} | {_cell(captions.get(row['sample_key'], ''))} |"
        for row in _first_images(task.inputs["images"][0])
    ]
    return "| picture | alt-text | caption |\n|---|---|---|\n" + "\n".join(rows)


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "/").replace("\n", " ")


def _show_samples(task: "Task") -> str:
    assert task.output is not None
    files = task.output.files(".png")[:_NUM_PICTURES]
    return " ".join(picture(path.read_bytes(), path.stem) for path in files)


def _show_trajectories(task: "Task") -> str:
    assert task.output is not None
    differences = task.output.manifest.summary["mean_absolute_difference"]
    rows = [f"| {name} | {value} |" for name, value in differences.items()]
    return "| latents | mean absolute difference from t |\n|---|---:|\n" + "\n".join(rows)


def _show_report(task: "Task") -> str:
    assert task.output is not None
    path: Path = task.output.path("report.html")
    return f"Open [{path.name}]({path.as_uri()}) in a browser: `{path}`"


def _show_card(task: "Task") -> str:
    assert task.output is not None
    _, _, card = task.output.path("README.md").read_text().split("---\n", 2)
    return f"`ThroughlinePipeline.from_pretrained({str(task.output.folder)!r})`\n\n{card.strip()}"


_PREVIEWS: Mapping[str, Callable[["Task"], str]] = {
    "images": _show_images,
    "captions": _show_captions,
    "pipeline_export": _show_card,
    "samples": _show_samples,
    "trajectory_analysis": _show_trajectories,
    "report": _show_report,
}
