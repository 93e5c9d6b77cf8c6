"""The stage `pipeline_export`: a checkpoint as a diffusers folder with a manifest."""

import json
import shutil

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.rows import DERIVED
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun
from training.config import PipelineExportConfig

_UNIT = "pipeline"


def produce(run: StageRun[PipelineExportConfig]) -> StageResult:
    """Write the pipeline's files; `from_pretrained` loads the output's folder.

    Input: the checkpoint of the partition's strategy.
    """
    if not run.is_finished(_UNIT):
        _export(run)
    (notes,) = (unit.notes for unit in run.finished_units() if unit.name == _UNIT)
    return StageResult(summary=notes)


def _export(run: StageRun[PipelineExportConfig]) -> None:
    from training.export.export import export_pipeline

    config, checkpoint = run.config, run.input("checkpoint")
    if checkpoint.manifest.partition != run.partition:
        raise ThroughlineError(
            f"{run.label}: got the checkpoint of {checkpoint.manifest.partition}, expected that of {run.partition}"
        )
    folder = run.scratch / "pipeline"
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed while moving files
    export_pipeline(
        checkpoint, config.text_encoder, config.autoencoder, config.sampler, folder,
        save_text_encoder=config.save_text_encoder,
    )  # fmt: skip
    lineage = json.loads((folder / "model_index.json").read_bytes())["lineage"]
    with run.unit(_UNIT) as unit:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            unit.adopt(path, path.relative_to(folder).as_posix())
        unit.notes.update({name: lineage[name] for name in ("strategy", "checkpoint", "num_parameters", "size_px")})
        unit.notes["text_encoder"] = lineage["text_encoder"]


def preview_card(output: StageOutput, inputs: Inputs) -> str:
    """Return the line that loads the pipeline, and its model card."""
    _, _, card = output.path("README.md").read_text().split("---\n", 2)
    return f"`ThroughlinePipeline.from_pretrained({str(output.folder)!r})`\n\n{card.strip()}"


STAGE = Stage(
    name="pipeline_export",
    code_version="2",
    config_type=PipelineExportConfig,
    produce=produce,
    description="The checkpoint as a folder that diffusers loads, with a card that states its lineage.",
    rows=DERIVED,
    checks=(),
    preview=preview_card,
    funnel_label=None,
    cost=None,
)
