"""Owns the view into a checkpoint's fusion: which layers each block listens to, at which times."""

import json
import math
from collections.abc import Sequence
from typing import Any

from evaluation.config import FusionAnalysisConfig
from pipelines.errors import ThroughlineError
from pipelines.stage import Stage, StageOutput, StageResult, StageRun
from training.config import ModelConfig, Strategy

WEIGHTS = "weights"
SHARED_LAYERS = "shared_layers"
"""What fuse_dit has in place of weights: each block shares the keys and values of one decoder layer."""


def flow_times(num_times: int) -> list[float]:
    """Return evenly spaced flow times from 0 (noise) to 1 (data), ends included."""
    return [round(index / (num_times - 1), 6) for index in range(num_times)]


def fusion_weights(checkpoint: StageOutput, strategy: Strategy, times: Sequence[float]) -> Any:
    """Return the layer weights alpha (D, T, L), fp64: of each block, at each flow time, over the layers.

    Column l belongs to hidden_states[l + 1] of the encoder. For fuse_dit a row is one at the decoder layer whose keys
    and values the block shares, and zero elsewhere. Reads the fusion's own parameters alone, however large the model.
    """
    import numpy as np

    config = ModelConfig.model_validate(json.loads(checkpoint.path("config.json").read_bytes()))
    if strategy is Strategy.FUSE_DIT:
        weights = np.zeros((config.num_blocks, len(times), config.num_text_layers))
        for block, layer in enumerate(config.shared_layers):
            weights[block, :, layer] = 1.0
        return weights
    import torch
    from safetensors import safe_open

    from training.fusion import Fusion

    fusion = Fusion(
        strategy,
        config.num_text_layers,
        config.num_blocks,
        gate_embedding_size=config.gate_embedding_size,
        gate_width=config.gate_width,
        gate_time_scale=config.gate_time_scale,
    )
    prefix = "fusion."
    with safe_open(checkpoint.path("model.safetensors"), framework="pt") as tensors:
        names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
        state = {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
    try:
        fusion.load_state_dict(state)
    except RuntimeError as error:
        raise ThroughlineError(
            f"checkpoint {checkpoint.data_version}: its fusion parameters are not those of {strategy} "
            f"({str(error).splitlines()[-1].strip()}); re-run checkpoint {strategy}"
        ) from error
    with torch.no_grad():
        alpha = fusion.all_weights(torch.tensor(times, dtype=torch.float32))
    return alpha.expand(config.num_blocks, -1, -1).double().numpy()


def summarise(weights: Any, strategy: Strategy) -> dict[str, Any]:
    """Return what the weights (D, T, L) amount to, rounded so that it is the same on every machine."""
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


def draw(weights: Any, times: Sequence[float], strategy: Strategy) -> list[Any]:
    """Return the panels for the weights (D, T, L): layers on x; blocks, and times where they matter, on y."""
    from evaluation.charts import Series, heatmap, line_chart

    num_blocks, _, num_layers = weights.shape
    layers = [str(layer) for layer in range(1, num_layers + 1)]
    blocks = [str(block) for block in range(num_blocks)]
    by_block, by_time = weights.mean(1), weights.mean(0)
    if strategy is Strategy.FUSE_DIT:
        title = "fuse_dit: the decoder layer whose keys and values each block shares"
        return [
            heatmap(by_block.tolist(), title=title, x_label="decoder layer (from 1)", y_label="block",
                    row_names=blocks, column_names=layers, centre=0.0, scale=1.0, cell_height=_cell(num_blocks))
        ]  # fmt: skip
    profile = weights.mean((0, 1))
    uniform = 1 / num_layers
    panels = [
        line_chart(
            [Series(strategy.value, list(range(1, num_layers + 1)), profile.tolist(), 0,
                    weights.min((0, 1)).tolist(), weights.max((0, 1)).tolist())],
            title=f"{strategy.value}: weight of each layer (mean; band: all blocks and times)",
            x_label="layer (hidden_states index)", y_label="weight", height=220,
            rule_at=uniform, rule_label=f"uniform 1/{num_layers}",
        )
    ]  # fmt: skip
    deviation = max(float(abs(weights.mean(1) * num_layers - 1).max()), float(abs(by_time * num_layers - 1).max()))
    scale = uniform * max(deviation, 1e-9)
    note = f"warm above uniform, cold below; full colour at {_percent(deviation)} from it"
    if not math.isclose(float(weights.max() - weights.min()), 0.0, abs_tol=1e-7):
        panels.append(
            heatmap(by_block.tolist(), title=f"by block, mean over times ({note})", x_label="layer", y_label="block",
                    row_names=blocks, column_names=layers, centre=uniform, scale=scale, cell_height=_cell(num_blocks))
        )  # fmt: skip
    if strategy.has_time_gate:
        panels.append(
            heatmap(by_time.tolist(), title="by time, mean over blocks (t = 0 noise, t = 1 data; same colours)",
                    x_label="layer", y_label="t", row_names=[f"{t:.2f}" for t in times], column_names=layers,
                    centre=uniform, scale=scale, cell_height=_cell(len(times)))
        )  # fmt: skip
    return panels


def _cell(num_rows: int) -> float:
    return min(max(240.0 / num_rows, 7.0), 18.0)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _strategy_of(partition: str | None) -> Strategy:
    try:
        return Strategy(partition or "")
    except ValueError as error:
        known = ", ".join(strategy.value for strategy in Strategy)
        raise ThroughlineError(f"fusion_analysis: partition {partition!r} is no strategy; known: {known}") from error


def produce(run: StageRun[FusionAnalysisConfig]) -> StageResult:
    """Write ``weights.parquet`` (block, t, layer, weight) and ``weights.svg`` for the checkpoint of one strategy.

    `layer` counts from 1, as the encoder's hidden_states do; blocks count from 0.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from evaluation.charts import standalone_svg

    strategy = _strategy_of(run.partition)
    checkpoint = run.input("checkpoint")
    if checkpoint.manifest.partition != run.partition:
        raise ThroughlineError(
            f"fusion_analysis {run.partition}: got the checkpoint of {checkpoint.manifest.partition}; give its own"
        )
    times = flow_times(run.config.num_times)
    weights = fusion_weights(checkpoint, strategy, times)
    if not math.isfinite(float(weights.sum())):
        raise ThroughlineError(
            f"checkpoint {checkpoint.data_version}: its fusion weights are not finite; look at its losses"
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
        unit.write("weights.svg", standalone_svg(draw(weights, times, strategy), f"fusion of {strategy}").encode())
    return StageResult(summary=summarise(weights, strategy))


STAGE = Stage(name="fusion_analysis", code_version="1", config_type=FusionAnalysisConfig, produce=produce)

if __name__ == "__main__":
    from evaluation.fusion_analysis import STAGE as stage

    stage.main()
