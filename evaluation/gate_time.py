"""What time gates see: the schedule's, and the one that a trained head reads off the latents, along sampling.

python -m evaluation.gate_time OUTPUTS/checkpoint/DATA_VERSION [--scales 1 3 6] [--json FILE]

Owns the comparison for checkpoints trained with gate_signal = estimated. On held-out samples, noised as in training,
the head's error is its own; what sampling adds to it is how far guided trajectories leave the forward process.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import ThroughlineError
from pipelines.manifest import MANIFEST_NAME
from pipelines.stage import StageOutput

if TYPE_CHECKING:
    from torch import Tensor

    from training.config import SamplerConfig
    from training.dit import Backbone
    from training.feature_source import FeatureSource


def scheduled_times(settings: "SamplerConfig") -> list[float]:
    """Return the flow times at which sampling calls the model, from noise towards data."""
    from training.schedule import build_scheduler, flow_time

    timesteps: Any = build_scheduler(settings.num_steps, settings.time_shift).timesteps
    return flow_time(timesteps).tolist()


def forward_estimates(model: "Backbone", data: "Tensor", noise: "Tensor", times: Sequence[float]) -> "Tensor":
    """Return the head's times (T, B) at x_t of held-out data and noise (B, C, h, w), at each of T flow times."""
    import torch

    from training.flow import interpolate

    rows = []
    for time in times:
        t = torch.full((len(data),), time)
        rows.append(model.gate_time(interpolate(noise, data, t), t))
    return torch.stack(rows)


def trajectory_estimates(
    model: "Backbone",
    texts: "Sequence[Tensor]",
    unconditional: "Tensor",
    noise: "Tensor",
    settings: "SamplerConfig",
) -> "Tensor":
    """Return the head's times (T, B) at the latents that each of T sampling steps starts from, one image a text."""
    import torch

    from training.feature_source import pad_texts
    from training.sampling import TextBatch, sample_latents

    visited = [noise]
    sample_latents(
        model,
        TextBatch(*pad_texts(texts)),
        TextBatch(*pad_texts([unconditional])),
        torch.arange(len(texts)),
        noise,
        settings,
        lambda index, total, x_t: visited.append(x_t.clone()),
    )
    times = torch.tensor(scheduled_times(settings))
    return torch.stack([model.gate_time(x_t, t.expand(len(noise))) for t, x_t in zip(times, visited[:-1], strict=True)])


def _row(nominal: float, estimates: "Tensor") -> dict[str, float]:
    difference = estimates - nominal
    return {
        "mean": round(float(estimates.mean()), 4),
        "mean_difference": round(float(difference.mean()), 4),
        "mean_absolute_difference": round(float(difference.abs().mean()), 4),
        "std": round(float(estimates.std(correction=0)), 4),
    }


def compare(
    model: "Backbone",
    source: "FeatureSource",
    settings: "SamplerConfig",
    scales: Sequence[float],
    num_samples: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Return, for each sampling step, nominal t and the head's: on held-out samples noised to t, and at each guidance.

    Images are drawn for the captions of the same held-out samples. Raises ThroughlineError where the model has no
    head, or nothing is held out.
    """
    import numpy as np
    import torch

    from training.feature_source import VALIDATION
    from training.flow import sampling_noise, validation_noise

    if not model.text_depends_on_latents:
        raise ThroughlineError("the model's gates follow the nominal time; train one with model.gate_signal=estimated")
    split = source.splits[VALIDATION]
    count = min(num_samples, len(split))
    if count == 0:
        raise ThroughlineError("the dataset holds nothing out; raise its share of validation")
    reader, keys = source.latents[VALIDATION], [split.key(index) for index in range(count)]
    data = torch.from_numpy(np.stack([reader.read(index, None) for index in range(count)]))
    noise = torch.from_numpy(np.stack([validation_noise(key, reader.shape) for key in keys]))
    start = torch.stack([sampling_noise(seed, key, 0, reader.shape) for key in keys])
    texts = [source.text(VALIDATION, index) for index in range(count)]
    times = scheduled_times(settings)
    with torch.no_grad():
        columns = {"forward": forward_estimates(model, data, noise, times)}
        for scale in scales:
            guided = settings.model_copy(update={"guidance_scale": scale})
            columns[f"cfg_{scale:g}"] = trajectory_estimates(model, texts, source.unconditional, start, guided)
    steps = [
        {"t": round(t, 4), **{name: _row(t, values[index]) for name, values in columns.items()}}
        for index, t in enumerate(times)
    ]
    overall = {
        name: round(float((values - torch.tensor(times)[:, None]).abs().mean()), 4) for name, values in columns.items()
    }
    return {"num_samples": count, "num_steps": len(times), "mean_absolute_difference": overall, "steps": steps}


def as_table(found: dict[str, Any]) -> str:
    """Return the comparison as lines: the mean time that the head reads, and its mean absolute difference from t."""
    names = list(found["mean_absolute_difference"])
    lines = ["".join([f"{'t':>8}", *(f"{name:>20}" for name in names)])]
    for step in found["steps"]:
        cells = (f"{step[name]['mean']:.3f} ({step[name]['mean_absolute_difference']:.3f})" for name in names)
        lines.append("".join([f"{step['t']:8.3f}", *(f"{cell:>20}" for cell in cells)]))
    overall = found["mean_absolute_difference"]
    lines.append("".join([f"{'all':>8}", *(f"{f'({overall[name]:.3f})':>20}" for name in names)]))
    return "\n".join(lines)


def read_checkpoint(folder: Path) -> "tuple[Backbone, FeatureSource]":
    """Load a checkpoint and the features it was trained on, from the outputs beside it.

    Raises ThroughlineError where an input is no longer there.
    """
    from training.config import CheckpointConfig
    from training.feature_source import FeatureSource
    from training.saved_model import load_model

    checkpoint = StageOutput.load(folder / MANIFEST_NAME)
    config = CheckpointConfig.model_validate(checkpoint.manifest.execution)
    root = folder.resolve().parent.parent
    inputs = {
        name: [StageOutput.load(root / item.stage / item.data_version / MANIFEST_NAME) for item in items]
        for name, items in checkpoint.manifest.inputs.items()
    }
    model = load_model(checkpoint, config.text_encoder).model
    return model, FeatureSource(config, inputs, model.prepare_text)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison for one checkpoint."""
    from training.config import SamplerConfig

    parser = argparse.ArgumentParser(prog="python -m evaluation.gate_time", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's output folder")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 6.0], help="guidance scales")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--time-shift", type=float, default=3.0, help="static shift of the schedule")
    parser.add_argument("--samples", type=int, default=24, help="held-out samples, and images at each scale")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    model, source = read_checkpoint(args.checkpoint)
    settings = SamplerConfig(num_steps=args.steps, time_shift=args.time_shift)
    found = compare(model, source, settings, args.scales, args.samples)
    print("mean time read off the latents (mean absolute difference from the nominal t)")
    print(as_table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
