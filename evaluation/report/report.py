"""Stage `report`: one HTML file that opens offline and covers the whole run, from rows to scores."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.config import BENCHMARKS, ReportConfig
from evaluation.report.lineage import collect, stages_of
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.registry import load_stage
from pipelines.runner.rows import DERIVED
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun

if TYPE_CHECKING:
    from evaluation.report.data import LossCurve

_TEMPLATE = "report.html.j2"
_FEW_PROMPTS = 10
"""With fewer prompts nothing is coloured: a bootstrap interval says little (equal scores give it zero width)."""
_BENCHMARK_TITLES = {"geneval": "GenEval", "genai_bench": "GenAI-Bench", "drawbench": "DrawBench"}
_METRIC_TITLES = {
    "geneval": "GenEval by judge",
    "genai": "GenAI-Bench VQAScore",
    "unified_style": "UnifiedReward style",
    "unified_alignment": "Alignment",
    "unified_coherence": "Coherence",
}
_ARM_TITLES = {
    "penultimate": ("B1", "penultimate"),
    "uniform": ("B2", "uniform"),
    "static": ("B3", "static"),
    "fuse_dit": ("F", "FuseDiT"),
    "time_wise": ("S1", "time-wise"),
    "time_wise+shift": ("S1+", "time-wise + shift"),
    "depth_wise": ("S2", "depth-wise"),
    "joint": ("S3", "joint"),
    "joint+shift": ("S3+", "joint + shift"),
}


def arm_title(arm: str) -> str:
    """Return an arm's display name."""
    return _ARM_TITLES.get(arm, ("", arm))[1]


def arm_code(arm: str) -> str:
    """Return an arm's short code in the paper's tables."""
    return _ARM_TITLES.get(arm, ("", arm))[0]


def _colour(arm: str) -> int:
    return list(_ARM_TITLES).index(arm) % 8 if arm in _ARM_TITLES else 0


def show(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """Return a number with a typographic minus sign, or a dash for None."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = ("±" if signed else "") + text.lstrip("+-")
    return text.replace("-", "−")


def grouped(value: int | None) -> str:
    """Return a count with thin spaces between groups of thousands."""
    return "–" if value is None else f"{value:,}".replace(",", "\u202f")


def _score_caption(scores: Sequence[tuple[str, float]]) -> str:
    """Return the caption of an image in the sample grid."""
    values = dict(scores)
    if "geneval_vqa" in values:
        return "✓ all clauses" if values["geneval_vqa"] == 1 else "✗"
    if "vqascore" in values:
        return f"P(Yes) {show(values['vqascore'], 2)}"
    return f"style {show(values['unified_style'], 2)}" if "unified_style" in values else "no score"


def _interval_charts(results: Mapping[str, Any]) -> list[str]:
    from evaluation.analysis.charts import IntervalRow, inline_svg, interval_chart

    charts = []
    for name in ("geneval", "genai", "unified_style"):
        rows = []
        for row in results["table_1"]:
            cell = row[name]
            value = (cell["value"], cell["low"], cell["high"]) if cell else None
            rows.append(IntervalRow(arm_title(row["arm"]), value, _colour(row["arm"])))
        if any(item.value for item in rows):
            title = _METRIC_TITLES[name]
            charts.append(inline_svg([interval_chart(rows, title=title, width=352)], f"{title} by arm"))
    return charts


def _window(curves: Sequence["LossCurve"]) -> int:
    """Return the number of steps over which loss curves are smoothed."""
    return max(1, len(curves[0].losses) // 20) if curves else 1


def _loss_charts(curves: Sequence["LossCurve"]) -> list[str]:
    """Draw the losses, and their differences from those of the first strategy."""
    from evaluation.analysis.charts import Series, inline_svg, line_chart
    from evaluation.report.data import running_mean, subsample

    if not curves:
        return []
    window = _window(curves)
    lines, differences = [], []
    for curve in curves:
        steps, losses = subsample(curve.steps), subsample(running_mean(curve.losses, window))
        lines.append(Series(arm_title(curve.strategy), steps, losses, _colour(curve.strategy)))
        if curve is not curves[0] and list(curve.steps) == list(curves[0].steps):
            gaps = [a - b for a, b in zip(curve.losses, curves[0].losses, strict=True)]
            differences.append(
                Series(arm_title(curve.strategy), steps, subsample(running_mean(gaps, window)), _colour(curve.strategy))
            )
    tail = sorted(value for line in lines for value in line.ys[len(line.ys) // 8 :])
    head = max(tail) * 1.6 if tail else None
    y_range = (min(tail) * 0.94, min(head, max(max(line.ys) for line in lines) * 1.02)) if head else None
    charts = [line_chart(lines, title="Training loss", x_label="step", y_label="loss", width=540, y_range=y_range)]
    if differences:
        title = f"Loss minus that of {arm_title(curves[0].strategy)}"
        charts.append(
            line_chart(differences, title=title, x_label="step", y_label="difference", width=540, rule_at=0.0)
        )
    return [inline_svg([chart], "training losses by strategy") for chart in charts]


def _fusion_charts(analyses: Sequence[StageOutput]) -> list[dict[str, Any]]:
    import numpy as np
    import pyarrow.parquet as pq

    from evaluation.analysis.charts import inline_svg
    from evaluation.analysis.fusion_analysis import weight_panels
    from training.config import Strategy

    order = [strategy.value for strategy in Strategy]
    charts = []
    for output in sorted(analyses, key=lambda item: order.index(item.manifest.partition or "")):
        strategy = Strategy(output.manifest.partition or "")
        table = pq.read_table(output.path("weights.parquet"))
        times = sorted(set(table["t"].to_pylist()))
        summary = output.manifest.summary
        shape = (summary["num_blocks"], len(times), summary["num_layers"])
        weights = np.asarray(table["weight"].to_numpy(), dtype=np.float64).reshape(shape)
        panels = weight_panels(weights, times, strategy, _colour(strategy.value))
        svg = inline_svg(panels, f"fusion of {strategy}")
        charts.append({"strategy": strategy.value, "svg": svg, "summary": summary})
    return charts


def _trajectories(analyses: Sequence[StageOutput]) -> list[dict[str, Any]]:
    """Return each strategy's comparison of gate times, with its charts."""
    from evaluation.analysis.charts import inline_svg
    from evaluation.analysis.trajectory_analysis import trajectory_panels, trajectory_title

    shown = []
    for output in analyses:
        strategy = output.manifest.partition or ""
        comparison = json.loads(output.path("times.json").read_bytes())
        differences = comparison["mean_absolute_difference"]
        panels = trajectory_panels(comparison, strategy)
        shown.append(
            {
                "strategy": strategy,
                "svg": inline_svg(panels, f"times that the gates of {strategy} see"),
                "num_samples": comparison["num_samples"],
                "num_steps": comparison["num_steps"],
                "differences": {trajectory_title(name): value for name, value in differences.items()},
            }
        )
    return shown


def _facts(lineage: Mapping[str, Sequence[StageOutput]], results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the counts in the report's header."""
    checkpoints = [item.manifest.summary for item in lineage.get("checkpoint", ())]
    dataset = next((item for item in lineage.get("dataset", ())), None)
    captioners = {model.id for item in lineage.get("captions", ()) for model in item.manifest.models}
    encoders = {item.manifest.config["text_encoder"]["id"] for item in lineage.get("checkpoint", ())}
    table = dataset.manifest.conservation if dataset else None
    return {
        "dataset_version": dataset.data_version if dataset else None,
        "num_samples": table.rows_out if table else None,
        "num_strategies": len(checkpoints),
        "num_images": sum(item.manifest.summary["num_images"] for item in lineage.get("samples", ())),
        "num_prompts": sum(sum(i.manifest.summary["num_prompts"].values()) for i in lineage.get("prompt_sets", ())),
        "steps": sorted({item["steps"] for item in checkpoints if "steps" in item}),
        "samples_seen": sorted({item["num_samples_seen"] for item in checkpoints if "num_samples_seen" in item}),
        "orders": sorted({item["consumption_digest"] for item in checkpoints if "consumption_digest" in item}),
        "parameters": sorted({item["num_parameters"] for item in checkpoints if "num_parameters" in item}),
        "captioners": sorted(captioners),
        "encoders": sorted(encoders),
        "num_unscored": sum(item["num_scores_wanted"] - item["num_scores"] for item in results["unscored"]),
        "num_scores": sum(item["num_scores"] for item in results["unscored"]),
    }


def render(config: ReportConfig, results_output: StageOutput, lineage: Mapping[str, Sequence[StageOutput]]) -> str:
    """Return the report as HTML. It depends on finished outputs only and contains no times, hosts or paths."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from evaluation.analysis import charts
    from evaluation.report import data as report_data

    results = json.loads(results_output.path("results.json").read_bytes())
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show, "grouped": grouped, "arm_title": arm_title, "arm_code": arm_code}
    environment.filters |= {"score_caption": _score_caption, "colour": _colour}
    size_px = config.thumbnail_px
    grids = [
        report_data.sample_grid(lineage, name, results["arms"], config.num_grid_prompts.get(name, 0), size_px)
        for name in BENCHMARKS
    ]
    curves = report_data.loss_curves(lineage)
    calibration = next(iter(lineage.get("judge_calibration", ())), None)
    return environment.get_template(_TEMPLATE).render(
        config=config,
        note=[paragraph.strip() for paragraph in config.note.split("\n\n") if paragraph.strip()],
        results=results,
        judges_of=lambda benchmarks: _judges_of(results, benchmarks),
        lineage_id=results_output.data_version,
        facts=_facts(lineage, results),
        funnel=report_data.funnel(lineage, stages_of(lineage, config.stages)),
        captions=report_data.sample_captions(lineage, config.num_captions, size_px),
        caption_prompt=next((item.manifest.summary.get("prompt") for item in lineage.get("captions", ())), None),
        interval_charts=_interval_charts(results),
        loss_charts=_loss_charts(curves),
        curves=curves,
        loss_window=_window(curves),
        few_prompts=_FEW_PROMPTS,
        grids=[grid for grid in grids if grid.rows],
        fusion=_fusion_charts(lineage.get("fusion_analysis", ())),
        trajectories=_trajectories(lineage.get("trajectory_analysis", ())),
        calibration=calibration.manifest.summary if calibration else None,
        provenance=report_data.provenance(lineage),
        benchmark_titles=_BENCHMARK_TITLES,
        metric_titles=_METRIC_TITLES,
        palette_light=charts.palette(dark=False),
        palette_dark=charts.palette(dark=True),
        chart_style=charts.CHART_STYLE,
    )


def _judges_of(results: dict[str, Any], benchmarks: Iterable[str]) -> list[dict[str, str]]:
    """Return the judges of some benchmarks; if there are several, each with the benchmarks it judged."""
    by_judge: dict[tuple[str, str], list[str]] = {}
    for benchmark in benchmarks:
        if judge := results["judges"].get(benchmark):
            by_judge.setdefault((judge["id"], judge["revision"]), []).append(_BENCHMARK_TITLES[benchmark])
    return [
        {"id": name, "revision": revision, "benchmarks": ", ".join(titles) if len(by_judge) > 1 else ""}
        for (name, revision), titles in by_judge.items()
    ]


def produce(run: StageRun[ReportConfig]) -> StageResult:
    """Write ``report.html``.

    Input: results, whose upstream outputs are found through the manifests; judge_calibration and trajectory_analysis
    are optional. Raises ThroughlineError if an upstream output is missing, or the file would be too large.
    """
    results = run.input("results")
    order = [load_stage(module).name for module in run.config.stages]
    lineage = collect((output for outputs in run.inputs.values() for output in outputs), order)
    html = render(run.config, results, lineage).encode()
    if len(html) > run.config.max_num_bytes:
        raise ThroughlineError(
            f"report: {len(html)} bytes, allowed are {run.config.max_num_bytes}; lower thumbnail_px, num_captions or "
            "num_grid_prompts"
        )
    with run.unit("report") as unit:
        unit.write("report.html", html)
    return StageResult(summary={"num_bytes": len(html), "results": results.data_version})


def preview_report(report: StageOutput, inputs: Inputs) -> str:
    """Return a link to the HTML file."""
    path = report.path("report.html")
    return f"Open [{path.name}]({path.as_uri()}) in a browser: `{path}`"


STAGE = Stage(
    name="report",
    code_version="1",
    config_type=ReportConfig,
    produce=produce,
    description="One HTML file that opens offline: funnel, captions, loss curves, sample grids, tables, weights.",
    rows=DERIVED,
    checks=(),
    preview=preview_report,
    funnel_label=None,
    cost=None,
)
