"""Stage ``shards``: joins images and captions by sample key into WebDataset tars, byte-identical when rebuilt.

A unit of images becomes ``shard-<unit>.tar``; if that would exceed a limit, the rest goes to ``shard-<unit>_001.tar``
and so on. Each shard has an index. `pipelines.shards.format` defines the file format.
"""

import io
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipelines.cluster.units import ray_tasks, run_units
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import Conservation
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import RowReader
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun, Unit
from pipelines.shards.config import ShardsConfig
from pipelines.shards.cost import shards_cost
from pipelines.shards.shard_rows import find_shard_rows

if TYPE_CHECKING:
    from pipelines.download.tables import ImageUnit
    from pipelines.shards.format import SampleMembers, ShardWriter

_PROVENANCE_COLUMNS = (
    "sample_key", "url", "alt_text", "format", "width_px", "height_px", "source_sha256", "source_num_bytes",
    "perceptual_hash", "drifted",
)  # fmt: skip


def produce(run: StageRun[ShardsConfig]) -> StageResult:
    from pipelines.download.tables import image_units

    units = list(image_units(run.input("images")))
    _captioner(run.input("captions"))  # fail before any unit starts
    num_done = sum(unit.num_rows for unit in units if run.is_finished(unit.name))
    with (
        ray_tasks(run, run.config.workers) as tasks,
        run.progress(sum(unit.num_rows for unit in units), "samples", initial=num_done) as progress,
    ):
        for finished_unit in run_units(run, tasks, ((unit.name, None) for unit in units), _make_unit):
            progress.advance(finished_unit.rows[0] if finished_unit.rows else 0)
    finished = run.finished_units()
    return StageResult(
        summary={
            "num_shards": sum(entry.path.endswith(".tar") for unit in finished for entry in unit.files),
            "num_samples": sum(unit.rows[1] for unit in finished if unit.rows),
        },
        conservation=None if finished else Conservation(rows_in=0, rows_out=0),
    )


def _make_unit(run: StageRun[ShardsConfig], name: str, _: None) -> None:
    from pipelines.download.tables import image_unit

    captions, unit = run.input("captions"), image_unit(run.input("images"), name)
    rows = _captions_of(captions, unit)
    with run.unit(name) as output:
        _write_unit(run, output, unit, rows, _captioner(captions))


def _captioner(captions: StageOutput) -> dict[str, str] | None:
    """Return the model that wrote the captions; None if they were not made by a model."""
    models = captions.manifest.models
    if len(models) > 1:
        roles = ", ".join(model.role for model in models)
        raise ThroughlineError(f"{captions.manifest_path}: expected one captioner, found models for {roles}")
    return {"id": models[0].id, "revision": models[0].revision} if models else None


def _captions_of(captions: StageOutput, unit: "ImageUnit") -> dict[str, dict[str, Any]]:
    """Return sample key -> caption row; raises ThroughlineError for a duplicate key or one without an image."""
    import pyarrow as pa

    from pipelines.download.tables import read_table

    path = captions.path(f"captions-{unit.name}.parquet")
    names = ("sample_key", "caption", "prompt_version", "finish_reason")
    rows = read_table(path, pa.schema([(name, pa.string()) for name in names])).to_pylist()
    by_key = {row["sample_key"]: row for row in rows}
    if len(by_key) != len(rows):
        raise ThroughlineError(f"{path}: {len(rows) - len(by_key)} duplicate sample keys; re-run captions")
    unknown = by_key.keys() - set(unit.read(["sample_key"])["sample_key"].to_pylist())
    if unknown:
        raise ThroughlineError(
            f"{path}: {len(unknown)} captions without an image in {unit.path.name}, such as {min(unknown)}; "
            "re-run captions"
        )
    return by_key


def _bad_caption(row: dict[str, Any] | None, config: ShardsConfig) -> tuple[str, str] | None:
    """Return (reason, detail) for a caption that is unusable for training, or None."""
    if row is None:
        return "caption_missing", ""
    if len((row["caption"] or "").strip()) < config.min_caption_chars:
        return "caption_empty", f"finish reason {row['finish_reason']}"
    if config.drop_truncated and row["finish_reason"] != "stop":
        return "caption_truncated", f"finish reason {row['finish_reason']}"
    return None


def _write_unit(
    run: StageRun[ShardsConfig],
    output: Unit,
    unit: "ImageUnit",
    captions: dict[str, dict[str, Any]],
    captioner: dict[str, str] | None,
) -> None:
    from pipelines.shards.format import IMAGE_SUFFIX, sample_members

    config = run.config
    table = unit.read([*_PROVENANCE_COLUMNS, "image"]).sort_by("sample_key")
    kept: list[int] = []
    for index, key in enumerate(table["sample_key"].to_pylist()):
        problem = _bad_caption(captions.get(key), config)
        if problem is None:
            kept.append(index)
        else:
            output.drop(key, *problem)
    output.account(rows_in=table.num_rows, rows_out=len(kept))
    caption_path = run.input("captions").path(f"captions-{unit.name}.parquet")
    paths = {"images": unit.path, "captions": caption_path}
    extras = [(item.suffix, _column(paths[item.source], item.column)) for item in config.extra_members]
    image_suffix = "webp" if config.image_format == "webp" else IMAGE_SUFFIX
    rows = table.select(_PROVENANCE_COLUMNS).to_pylist()
    with _ShardSeries(output, unit.name, config) as series:
        for index in kept:
            row = rows[index]
            key = row["sample_key"]
            caption = captions[key]
            provenance = row | {
                "caption": caption["caption"],
                "prompt_version": caption["prompt_version"],
                "captioner": captioner,
                "part": run.partition,
            }
            image = _encoded(table["image"][index].as_py(), config)
            more = [(suffix, values[key]) for suffix, values in extras]
            sample = sample_members(key, image, caption["caption"], provenance, image_suffix=image_suffix, extras=more)
            series.add(sample, {"perceptual_hash": row["perceptual_hash"], "source_sha256": row["source_sha256"],
                                "source_pixels": row["width_px"] * row["height_px"]})  # fmt: skip


class _ShardSeries:
    """The shards of one unit; starts a new one when the next sample would exceed a limit."""

    def __init__(self, output: Unit, unit_name: str, config: ShardsConfig) -> None:
        self._output, self._unit_name, self._config = output, unit_name, config
        self._stack = ExitStack()
        self._writer: ShardWriter | None = None
        self._name = ""
        self._num_shards = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        else:
            self._stack.__exit__(kind, error, trace)

    def add(self, sample: "SampleMembers", columns: dict[str, Any]) -> None:
        """Append a sample to the current shard or a new one, and `columns` to its index."""
        from pipelines.shards.format import ShardWriter

        writer = self._writer
        if writer is not None and (
            writer.num_samples >= self._config.max_samples_per_shard
            or writer.num_bytes_with(sample) > self._config.max_shard_bytes
        ):
            self._finish()
            writer = None
        if writer is None:
            piece = f"_{self._num_shards:03d}" if self._num_shards else ""
            self._name = f"shard-{self._unit_name}{piece}.tar"
            self._num_shards += 1
            writer = self._writer = ShardWriter(self._stack.enter_context(self._output.open(self._name)), self._name)
        writer.add_members(sample, columns)

    def _finish(self) -> None:
        from pipelines.shards.format import index_path

        if self._writer is None:
            return
        index = self._writer.finish()
        self._stack.close()
        self._output.count_rows(self._name, len(index.keys))
        self._output.write(index_path(Path(self._name)).name, index.to_bytes(), num_rows=len(index.keys))
        self._writer = None


def _encoded(image: bytes, config: ShardsConfig) -> bytes:
    """Return the image in the configured format."""
    from PIL import Image

    if config.image_format == "keep":
        return image
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(image)) as decoded:
        decoded.convert("RGB").save(buffer, config.image_format.upper(), quality=config.image_quality)
    return buffer.getvalue()


def _column(path: Path, column: str) -> dict[str, bytes]:
    """Return sample key -> bytes of an extra member; raises ThroughlineError if the table has no such column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.core.digest import canonical_json

    names = pq.read_schema(path).names
    if column not in names:
        raise ThroughlineError(f"{path}: no column {column} for an extra member; it has {', '.join(names)}")
    table = pq.read_table(path, columns=["sample_key", column])
    kind, values = table.schema.field(column).type, table[column].to_pylist()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        encoded = [value or b"" for value in values]
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        encoded = [(value or "").encode() for value in values]
    else:
        encoded = [canonical_json(value) for value in values]
    return dict(zip(table["sample_key"].to_pylist(), encoded, strict=True))


STAGE = Stage(
    name="shards",
    code_version="2",
    config_type=ShardsConfig,
    produce=produce,
    description="Images, captions and their provenance as WebDataset tar files.",
    rows=RowReader(find_shard_rows),
    checks=(),
    preview=None,
    funnel_label="Pairs written to shards",
    cost=shards_cost,
)
