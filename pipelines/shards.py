"""Stage ``shards``: joins pictures and captions by sample key into WebDataset tars, byte-identical when rebuilt."""

from typing import TYPE_CHECKING, Any

from pipelines.errors import ThroughlineError
from pipelines.manifest import Conservation
from pipelines.stage import Stage, StageOutput, StageResult, StageRun, Unit
from pipelines.stage_configs import ShardsConfig

if TYPE_CHECKING:
    from pipelines.image_rows import ImageUnit

_PROVENANCE_COLUMNS = (
    "sample_key", "url", "alt_text", "format", "width_px", "height_px", "source_sha256", "source_num_bytes",
)  # fmt: skip


def produce(run: StageRun[ShardsConfig]) -> StageResult:
    from pipelines.image_rows import image_units

    images, captions = run.input("images"), run.input("captions")
    units = list(image_units(images))
    captioner = _captioner(captions)
    with run.progress(sum(unit.num_rows for unit in units), "samples") as progress:
        for unit in units:
            if not run.is_finished(unit.name):
                rows = _captions_of(captions, unit)
                with run.unit(unit.name) as output:
                    _write_shard(run, output, unit, rows, captioner)
            progress.advance(unit.num_rows)
    finished = run.finished_units()
    return StageResult(
        summary={
            "num_shards": sum(bool(unit.files) for unit in finished),
            "num_samples": sum(unit.rows[1] for unit in finished if unit.rows),
        },
        conservation=None if finished else Conservation(rows_in=0, rows_out=0),
    )


def _captioner(captions: StageOutput) -> dict[str, str] | None:
    """Return the model that wrote the captions; None where the captions came from no model."""
    models = captions.manifest.models
    if len(models) > 1:
        roles = ", ".join(model.role for model in models)
        raise ThroughlineError(f"{captions.manifest_path}: expected one captioner, found models for {roles}")
    return {"id": models[0].id, "revision": models[0].revision} if models else None


def _captions_of(captions: StageOutput, unit: "ImageUnit") -> dict[str, dict[str, Any]]:
    """Return sample key -> caption row; raises ThroughlineError for a key that is there twice or has no picture."""
    import pyarrow as pa

    from pipelines.image_rows import read_table

    path = captions.path(f"captions-{unit.name}.parquet")
    names = ("sample_key", "caption", "prompt_version", "finish_reason")
    rows = read_table(path, pa.schema([(name, pa.string()) for name in names])).to_pylist()
    by_key = {row["sample_key"]: row for row in rows}
    if len(by_key) != len(rows):
        raise ThroughlineError(f"{path}: {len(rows) - len(by_key)} sample keys stand there twice; re-run captions")
    strangers = by_key.keys() - set(unit.read(["sample_key"])["sample_key"].to_pylist())
    if strangers:
        raise ThroughlineError(
            f"{path}: {len(strangers)} captions without a picture in {unit.path.name}, such as {min(strangers)}; "
            "re-run captions"
        )
    return by_key


def _bad_caption(row: dict[str, Any] | None, config: ShardsConfig) -> tuple[str, str] | None:
    """Return (reason, detail) for a caption that must not be trained on."""
    if row is None:
        return "caption_missing", ""
    if len((row["caption"] or "").strip()) < config.min_caption_chars:
        return "caption_empty", f"finish reason {row['finish_reason']}"
    if config.drop_truncated and row["finish_reason"] != "stop":
        return "caption_truncated", f"finish reason {row['finish_reason']}"
    return None


def _write_shard(
    run: StageRun[ShardsConfig],
    output: Unit,
    unit: "ImageUnit",
    captions: dict[str, dict[str, Any]],
    captioner: dict[str, str] | None,
) -> None:
    from pipelines.shard_format import ShardWriter

    table = unit.read([*_PROVENANCE_COLUMNS, "image"]).sort_by("sample_key")
    kept: list[int] = []
    for index, key in enumerate(table["sample_key"].to_pylist()):
        problem = _bad_caption(captions.get(key), run.config)
        if problem is None:
            kept.append(index)
        else:
            output.drop(key, *problem)
    output.account(rows_in=table.num_rows, rows_out=len(kept))
    if not kept:
        return
    name = f"shard-{unit.name}.tar"
    rows = table.select(_PROVENANCE_COLUMNS).to_pylist()
    with output.open(name, num_rows=len(kept)) as stream:
        writer = ShardWriter(stream, name)
        for index in kept:
            row = rows[index]
            caption = captions[row["sample_key"]]
            provenance = row | {
                "caption": caption["caption"],
                "prompt_version": caption["prompt_version"],
                "captioner": captioner,
                "part": run.partition,
            }
            writer.add(row["sample_key"], table["image"][index].as_py(), caption["caption"], provenance)
        writer.finish()


STAGE = Stage(name="shards", code_version="1", config_type=ShardsConfig, produce=produce)

if __name__ == "__main__":
    from pipelines.shards import STAGE as stage

    stage.main()
