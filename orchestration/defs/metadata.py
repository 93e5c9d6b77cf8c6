"""Dagster metadata of finished outputs: counts, the conservation table, and the stage's preview."""

from typing import Any

import dagster as dg

from orchestration.graph.resolution import Task
from pipelines.runner.outputs import StageOutput


def describe(task: Task, *, reused: bool, with_preview: bool = True) -> dict[str, Any]:
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
    preview = task.node.stage.preview
    if with_preview and preview is not None and _is_local(task):
        metadata["preview"] = dg.MetadataValue.md(preview(output, task.inputs or {}))
    return metadata


def _is_local(task: Task) -> bool:
    """Return whether a preview can be made without downloading from an object store."""
    outputs = [task.output, *(item for items in (task.inputs or {}).values() for item in items)]
    return all(output is None or output.is_here for output in outputs)


def conservation_table(output: StageOutput) -> str:
    """Return the conservation of an output as a markdown table."""
    table = output.manifest.conservation
    assert table is not None
    rows = [("in", table.rows_in), *((f"dropped: {reason}", n) for reason, n in table.dropped.items())]
    rows.append(("out", table.rows_out))
    return "| rows | number |\n|---|---:|\n" + "\n".join(f"| {name} | {number:,} |" for name, number in rows)
