"""Stage `fusion_analysis`: the weight of each text encoder layer in a checkpoint, by block and flow time."""

import json
import math
from collections.abc import Sequence
from typing import Any

from evaluation.config import FusionAnalysisConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import DERIVED
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun
from training.config import ModelConfig, Strategy

_NEAR_UNIFORM = 0.25
"""If the largest deviation from uniform is below this, bars show the deviation instead of the weight."""

WEIGHTS = "weights"
SHARED_LAYERS = "shared_layers"
"""The kind of fuse_dit, which has no weights: each block shares the keys and values of one decoder layer."""


def flow_times(num_times: int) -> list[float]:
    """Return evenly spaced flow times from 0 (noise) to 1 (data), both ends included."""
    return [round(index / (num_times - 1), 6) for index in range(num_times)]


def fusion_weights(checkpoint: StageOutput, strategy: Strategy, times: Sequence[float]) -> Any:
    """Return the weights alpha (D, T, L), fp64, of L encoder layers in each of D blocks at each of T flow times.

    Index l belongs to hidden_states[l + 1] of the encoder. For fuse_dit the weight is one for the decoder layer whose
    keys and values the block shares, and zero elsewhere. Reads only the fusion's parameters, however large the model.
    """
    import numpy as np

    config = ModelConfig.model_validate(json.loads(checkpoint.path("config.json").read_bytes()))
    if strategy is Strategy.FUSE_DIT:
        weights = np.zeros((config.num_blocks, len(times), config.num_text_layers))
        for block, layer in enumerate(config.shared_layers):
            weights[block, :, layer] = 1.0
        return weights
    import torch

    from training.models.fusion import Fusion
    from training.models.weight_files import read_weights

    fusion = Fusion(
        strategy,
        config.num_text_layers,
        config.num_blocks,
        gate_embedding_size=config.gate_embedding_size,
        gate_width=config.gate_width,
        gate_time_scale=config.gate_time_scale,
    )
    prefix = "fusion."
    state = {name.removeprefix(prefix): tensor for name, tensor in read_weights(checkpoint, prefix).items()}
    try:
        fusion.load_state_dict(state)
    except RuntimeError as error:
        raise ThroughlineError(
            f"checkpoint {checkpoint.data_version}: its fusion parameters do not match {strategy} "
            f"({str(error).splitlines()[-1].strip()}); re-run checkpoint {strategy}"
        ) from error
    with torch.no_grad():
        alpha = fusion.all_weights(torch.tensor(times, dtype=torch.float32))
    return alpha.expand(config.num_blocks, -1, -1).double().numpy()


def summarise(weights: Any, strategy: Strategy) -> dict[str, Any]:
    """Return summary statistics of the weights (D, T, L), rounded so that they are the same on every machine."""
    import numpy as np

    num_blocks, _, num_layers = weights.shape
    safe = np.where(weights > 0, weights, 1.0)
    entropy = -(weights * np.log(safe)).sum(-1)
    profile = weights.mean((0, 1))
    layers = np.arange(1, num_layers + 1)
    return {
        "kind": SHARED_LAYERS if strategy is Strategy.FUSE_DIT else WEIGHTS,
        "num_blocks": num_blocks,
        "num_layers": num_layers,
        "varies_with_block": bool(np.ptp(weights, axis=0).max() > 1e-7),
        "varies_with_time": bool(np.ptp(weights, axis=1).max() > 1e-7),
        "mean_weight_by_layer": [round(float(value), 5) for value in profile],
        "mean_layer": round(float((profile * layers).sum() / profile.sum()), 3),
        "effective_num_layers": round(float(np.exp(entropy).mean()), 3),
        "largest_deviation_from_uniform": round(float(np.abs(weights * num_layers - 1).max()), 4),
    }


def weight_panels(weights: Any, times: Sequence[float], strategy: Strategy, colour: int = 0) -> list[Any]:
    """Return charts of the weights (D, T, L): a profile over layers, and heatmaps by block and time if they vary."""
    from evaluation.analysis.charts import heatmap

    num_blocks, _, num_layers = weights.shape
    names: dict[str, Any] = {"column_names": [str(layer) for layer in range(1, num_layers + 1)]}
    blocks = [str(block) for block in range(num_blocks)]
    by_block, by_time = weights.mean(1), weights.mean(0)
    if strategy is Strategy.FUSE_DIT:
        title = "fuse_dit: the decoder layer whose keys and values each block shares"
        labels: dict[str, Any] = {"title": title, "x_label": "decoder layer, from 1", "y_label": "block"}
        height = _cell_height(num_blocks)
        return [
            heatmap(by_block.tolist(), row_names=blocks, centre=0.0, scale=1.0, cell_height=height, **labels, **names)
        ]
    uniform = 1 / num_layers
    summary = summarise(weights, strategy)
    axes = [axis for axis in ("block", "time") if summary[f"varies_with_{axis}"]]
    panels = [_profile(weights, strategy, axes, colour)]
    shown = [values for axis, values in (("block", by_block), ("time", by_time)) if axis in axes]
    deviation = max((float(abs(values * num_layers - 1).max()) for values in shown), default=0.0)
    colours = {
        "centre": uniform,
        "scale": uniform * max(deviation, 1e-9),
        "x_label": "layer (warm: above uniform, cold: below)",
    }
    note = f"full colour at {_percent(deviation)}"
    if "block" in axes:
        title = f"by block ({note})"
        height = _cell_height(num_blocks)
        panels.append(
            heatmap(
                by_block.tolist(),
                title=title,
                y_label="block",
                row_names=blocks,
                cell_height=height,
                **colours,
                **names,
            )
        )
    if "time" in axes:
        title = "by time, t = 0 noise, t = 1 data" + (" (same colours)" if "block" in axes else f" ({note})")
        height, rows = _cell_height(len(times)), [f"{t:.2f}" for t in times]
        panels.append(
            heatmap(by_time.tolist(), title=title, y_label="t", row_names=rows, cell_height=height, **colours, **names)
        )
    return panels


def _profile(weights: Any, strategy: Strategy, axes: Sequence[str], colour: int) -> Any:
    """Draw the weight of each layer or, if all are near uniform, its deviation from uniform."""
    from evaluation.analysis.charts import bar_chart

    num_layers = weights.shape[-1]
    deviation = float(abs(weights * num_layers - 1).max())
    is_near_uniform = 1e-6 < deviation < _NEAR_UNIFORM
    values = 100 * (weights * num_layers - 1) if is_near_uniform else weights
    ranges = f", mean and range over {'s and '.join(axes)}s" if axes else ""
    return bar_chart(
        values.mean((0, 1)).tolist(),
        title=f"{strategy.value}: weight of each layer{' against uniform' if is_near_uniform else ''}{ranges}",
        x_label="layer",
        y_label="% of uniform" if is_near_uniform else "weight",
        colour=colour,
        lows=values.min((0, 1)).tolist(),
        highs=values.max((0, 1)).tolist(),
        rule_at=0.0 if is_near_uniform else 1 / num_layers,
        rule_label=f"- - uniform, 1/{num_layers}",
    )


def _cell_height(num_rows: int) -> float:
    return min(max(190.0 / num_rows, 6.0), 16.0)


def _percent(share: float) -> str:
    return f"±{100 * share:.0f} %" if share >= 0.1 else f"±{100 * share:.2g} %"


def _strategy_of(partition: str | None) -> Strategy:
    try:
        return Strategy(partition or "")
    except ValueError as error:
        known = ", ".join(strategy.value for strategy in Strategy)
        raise ThroughlineError(f"fusion_analysis: partition {partition!r} is not a strategy; known: {known}") from error


def produce(run: StageRun[FusionAnalysisConfig]) -> StageResult:
    """Write ``weights.parquet`` (block, t, layer, weight) and ``weights.svg`` for the checkpoint of one strategy.

    `layer` counts from 1, as the encoder's hidden_states do; blocks count from 0. Raises ThroughlineError if the
    weights are not finite.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from evaluation.analysis.charts import standalone_svg

    strategy = _strategy_of(run.partition)
    checkpoint = run.input("checkpoint")
    if checkpoint.manifest.partition != run.partition:
        raise ThroughlineError(
            f"fusion_analysis {run.partition}: got the checkpoint of {checkpoint.manifest.partition}, expected that of "
            f"{run.partition}"
        )
    times = flow_times(run.config.num_times)
    weights = fusion_weights(checkpoint, strategy, times)
    if not math.isfinite(float(weights.sum())):
        raise ThroughlineError(
            f"checkpoint {checkpoint.data_version}: its fusion weights are not finite; check its losses"
        )
    num_blocks, num_times, num_layers = weights.shape
    rows = [(b, t, layer) for b in range(num_blocks) for t in range(num_times) for layer in range(num_layers)]
    table = pa.table(
        {
            "block": pa.array([b for b, _, _ in rows], pa.int16()),
            "t": pa.array([times[t] for _, t, _ in rows], pa.float64()),
            "layer": pa.array([layer + 1 for _, _, layer in rows], pa.int16()),
            "weight": pa.array(weights.reshape(-1), pa.float32()),
        }
    )
    with run.unit("weights") as unit:
        with unit.open("weights.parquet", num_rows=len(rows)) as stream:
            pq.write_table(table, stream)
        panels = weight_panels(weights, times, strategy)
        unit.write("weights.svg", standalone_svg(panels, f"fusion of {strategy}").encode())
    return StageResult(summary=summarise(weights, strategy))


STAGE = Stage(
    name="fusion_analysis",
    code_version="1",
    config_type=FusionAnalysisConfig,
    produce=produce,
    description="The fusion weight of each layer, by block and time.",
    rows=DERIVED,
    checks=(),
    preview=None,
    funnel_label=None,
    cost=None,
)
