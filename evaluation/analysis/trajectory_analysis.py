"""Owns the view into time gates that follow the latents: the time they see along sampling, beside the schedule's."""

import json
from collections.abc import Mapping
from typing import Any

from evaluation.analysis.gate_time import FORWARD, compare, read_held_out
from evaluation.config import TrajectoryAnalysisConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun
from training.config import CheckpointConfig

_UNIT = "times"
_NOMINAL_COLOUR = 0
_NUM_COLOURS = 8


def trajectory_title(name: str) -> str:
    """Return a column of the comparison for people."""
    return "held out, noised" if name == FORWARD else f"guidance {name.removeprefix('cfg_')}"


def draw(found: Mapping[str, Any], strategy: str) -> list[Any]:
    """Return the panels of a comparison: the mean time read, and its mean absolute difference from the nominal t."""
    from evaluation.report.charts import Series, legend, line_chart

    steps, names = found["steps"], list(found["mean_absolute_difference"])
    times = [step["t"] for step in steps]
    colours = {name: 1 + index % (_NUM_COLOURS - 1) for index, name in enumerate(names)}

    def lines(field: str) -> list[Series]:
        return [
            Series(trajectory_title(name), times, [step[name][field] for step in steps], colours[name])
            for name in names
        ]

    nominal = Series("nominal t", times, times, _NOMINAL_COLOUR)
    read = [nominal, *lines("mean")]
    return [
        line_chart(
            read, title=f"{strategy}: mean time read off the latents", x_label="nominal t (0 noise, 1 data)",
            y_label="time read",
        ),
        line_chart(
            lines("mean_absolute_difference"), title="mean absolute difference from the nominal t",
            x_label="nominal t (0 noise, 1 data)", y_label="difference", rule_at=0.0,
        ),
        legend(read),
    ]  # fmt: skip


def produce(run: StageRun[TrajectoryAnalysisConfig]) -> StageResult:
    """Write ``times.json``, ``times.parquet`` (t, trajectory, mean, ...) and ``times.svg`` for a strategy's checkpoint.

    Inputs: the checkpoint, and the dataset, shards, latents and text features it was trained on. Raises
    ThroughlineError where its gates follow the schedule, or nothing is held out.
    """
    if not run.is_finished(_UNIT):
        _write(run, _compare(run))
    (notes,) = (unit.notes for unit in run.finished_units() if unit.name == _UNIT)
    return StageResult(summary=notes, seeds={"noise": run.config.seed})


def _compare(run: StageRun[TrajectoryAnalysisConfig]) -> dict[str, Any]:
    import torch

    from training.models.saved_model import load_model

    config, checkpoint = run.config, run.input("checkpoint")
    if checkpoint.manifest.partition != run.partition:
        raise ThroughlineError(
            f"{run.label}: got the checkpoint of {checkpoint.manifest.partition}, expected that of {run.partition}"
        )
    trained_on = [item.data_version for item in checkpoint.manifest.inputs.get("dataset", ())]
    if trained_on != [run.input("dataset").data_version]:
        raise ThroughlineError(
            f"{run.label}: the checkpoint was trained on dataset {', '.join(trained_on)}, given "
            f"{run.input('dataset').data_version}, where other samples are held out; give the former"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ThroughlineError(f"{run.label}: configured for cuda, and this machine has none; set device to cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    trained = CheckpointConfig.model_validate(checkpoint.manifest.execution)
    trained = trained.model_copy(update={"text_encoder": config.text_encoder})
    model = load_model(checkpoint, config.text_encoder).model
    held_out = read_held_out(trained, run.inputs, model, config.num_samples)
    return compare(model.to(config.device), held_out, config.sampler, config.guidance_scales, config.seed)


def _write(run: StageRun[TrajectoryAnalysisConfig], found: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from evaluation.report.charts import standalone_svg

    rows = [
        {"t": step["t"], "trajectory": name, **step[name]}
        for name in found["mean_absolute_difference"]
        for step in found["steps"]
    ]
    svg = standalone_svg(draw(found, run.partition or ""), f"times that the gates of {run.partition} see")
    with run.unit(_UNIT) as unit:
        unit.write("times.json", json.dumps(found, indent=1).encode() + b"\n")
        with unit.open("times.parquet", num_rows=len(rows)) as stream:
            pq.write_table(pa.Table.from_pylist(rows), stream)
        unit.write("times.svg", svg.encode())
        unit.notes.update({name: value for name, value in found.items() if name != "steps"})


STAGE = Stage(name="trajectory_analysis", code_version="1", config_type=TrajectoryAnalysisConfig, produce=produce)
