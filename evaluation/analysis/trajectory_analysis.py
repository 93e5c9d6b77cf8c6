"""Stage `trajectory_analysis`: the time that gates estimate from the latents during sampling, against the schedule."""

import json
from collections.abc import Mapping
from typing import Any

from evaluation.analysis.gate_time import FORWARD, compare, read_held_out
from evaluation.config import TrajectoryAnalysisConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.rows import DERIVED
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun
from training.config import CheckpointConfig

_UNIT = "times"
_NOMINAL_COLOUR = 0
_NUM_COLOURS = 8


def trajectory_title(name: str) -> str:
    """Return the display name of a column of the comparison."""
    return "held out, noised" if name == FORWARD else f"guidance {name.removeprefix('cfg_')}"


def trajectory_panels(comparison: Mapping[str, Any], strategy: str) -> list[Any]:
    """Return charts of a comparison: the mean estimated time, and its mean absolute difference from the nominal t."""
    from evaluation.analysis.charts import Series, legend, line_chart

    steps, names = comparison["steps"], list(comparison["mean_absolute_difference"])
    times = [step["t"] for step in steps]
    colours = {name: 1 + index % (_NUM_COLOURS - 1) for index, name in enumerate(names)}

    def lines(field: str) -> list[Series]:
        return [
            Series(trajectory_title(name), times, [step[name][field] for step in steps], colours[name])
            for name in names
        ]

    nominal = Series("nominal t", times, times, _NOMINAL_COLOUR)
    means = [nominal, *lines("mean")]
    return [
        line_chart(
            means, title=f"{strategy}: mean time read off the latents", x_label="nominal t (0 noise, 1 data)",
            y_label="time read",
        ),
        line_chart(
            lines("mean_absolute_difference"), title="mean absolute difference from the nominal t",
            x_label="nominal t (0 noise, 1 data)", y_label="difference", rule_at=0.0,
        ),
        legend(means),
    ]  # fmt: skip


def produce(run: StageRun[TrajectoryAnalysisConfig]) -> StageResult:
    """Write ``times.json``, ``times.parquet`` (t, trajectory, mean, ...) and ``times.svg`` for a strategy's checkpoint.

    Inputs: the checkpoint, and the dataset, shards, latents and text features it was trained on. Raises
    ThroughlineError if its gates follow the schedule, or no samples are held out.
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
            f"{run.label}: the checkpoint was trained on dataset {', '.join(trained_on)}, got "
            f"{run.input('dataset').data_version}, which holds out other samples; use the former"
        )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ThroughlineError(f"{run.label}: configured for cuda, which this machine does not have; set device to cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    training = CheckpointConfig.model_validate(checkpoint.manifest.execution)
    training = training.model_copy(update={"text_encoder": config.text_encoder})
    model = load_model(checkpoint, config.text_encoder).model
    held_out = read_held_out(training, run.inputs, model, config.num_samples)
    return compare(model.to(config.device), held_out, config.sampler, config.guidance_scales, config.seed)


def _write(run: StageRun[TrajectoryAnalysisConfig], comparison: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from evaluation.analysis.charts import standalone_svg

    rows = [
        {"t": step["t"], "trajectory": name, **step[name]}
        for name in comparison["mean_absolute_difference"]
        for step in comparison["steps"]
    ]
    svg = standalone_svg(
        trajectory_panels(comparison, run.partition or ""), f"times that the gates of {run.partition} see"
    )
    with run.unit(_UNIT) as unit:
        unit.write("times.json", json.dumps(comparison, indent=1).encode() + b"\n")
        with unit.open("times.parquet", num_rows=len(rows)) as stream:
            pq.write_table(pa.Table.from_pylist(rows), stream)
        unit.write("times.svg", svg.encode())
        unit.notes.update({name: value for name, value in comparison.items() if name != "steps"})


def preview_trajectories(analysis: StageOutput, inputs: Inputs) -> str:
    """Return a table of the mean differences between estimated and true time."""
    differences = analysis.manifest.summary["mean_absolute_difference"]
    rows = [f"| {name} | {value} |" for name, value in differences.items()]
    return "| latents | mean absolute difference from t |\n|---|---:|\n" + "\n".join(rows)


STAGE = Stage(
    name="trajectory_analysis",
    code_version="1",
    config_type=TrajectoryAnalysisConfig,
    produce=produce,
    description="The time that gates estimate from the latents along sampling, against the schedule's.",
    rows=DERIVED,
    checks=(),
    preview=preview_trajectories,
    funnel_label=None,
    cost=None,
)
