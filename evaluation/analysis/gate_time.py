"""Compares the time that a gate's head estimates from the latents with the schedule's time, along sampling.

python -m evaluation.analysis.gate_time OUTPUTS/checkpoint/DATA_VERSION [--scales 1 3 6] [--json FILE]

For checkpoints trained with gate_signal = estimated. On held-out samples noised as in training, the difference is the
head's own error. Any increase during sampling shows how far guided trajectories leave the forward process. The stage
`trajectory_analysis` runs the same comparison in the graph.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME
from pipelines.runner.outputs import Inputs, StageOutput

if TYPE_CHECKING:
    from torch import Tensor

    from training.config import CheckpointConfig, SamplerConfig
    from training.models.backbone import Backbone

FORWARD = "forward"
"""Column name for held-out samples noised as in training."""


def guided_name(scale: float) -> str:
    """Return the column name for images sampled at a guidance scale."""
    return f"cfg_{scale:g}"


def scheduled_times(settings: "SamplerConfig") -> list[float]:
    """Return the flow times at which sampling calls the model, from noise towards data."""
    from training.sampling.schedule import build_scheduler, flow_time

    timesteps: Any = build_scheduler(settings.num_steps, settings.time_shift).timesteps
    return flow_time(timesteps).tolist()


@dataclass(frozen=True)
class HeldOut:
    """Samples held out from training: scaled latents (n, C, h, w) and the prepared text of each caption."""

    sample_keys: list[str]
    latents: "Tensor"
    texts: "list[Tensor]"
    unconditional: "Tensor"


def read_held_out(config: "CheckpointConfig", inputs: Inputs, model: "Backbone", num_samples: int) -> HeldOut:
    """Return the first held-out samples of a dataset by key; captions without cached features are encoded.

    `config` and `inputs` are those of the checkpoint. Raises ThroughlineError if no samples are held out, or the inputs
    are not those of the dataset.
    """
    import numpy as np
    import torch

    from training.data.feature_source import (
        VALIDATION,
        LatentReader,
        TextSource,
        check_inputs,
        prepare_text,
        read_splits,
    )

    dataset = inputs["dataset"][0]
    check_inputs(dataset, inputs)
    validation = read_splits(dataset)[VALIDATION]
    count = min(num_samples, len(validation))
    if count == 0:
        raise ThroughlineError("the dataset holds out no samples; raise its validation share")
    split = validation.first(count)
    parts = set(split.parts)
    used = {name: [item for item in items if item.manifest.partition in parts] for name, items in inputs.items()}
    reader, encoder = LatentReader(used["latents"], split), TextSource(config, used)
    text, dtype = encoder.of_split(split), getattr(torch, config.training.text_dtype)
    text.prefetch(range(count))
    return HeldOut(
        sample_keys=[split.key(index) for index in range(count)],
        latents=torch.from_numpy(np.stack([reader.read(index, None) for index in range(count)])),
        texts=[prepare_text(model.prepare_text, text.hidden_states(index).cpu(), dtype) for index in range(count)],
        unconditional=prepare_text(model.prepare_text, encoder.unconditional(), dtype),
    )


def forward_estimates(model: "Backbone", data: "Tensor", noise: "Tensor", times: Sequence[float]) -> "Tensor":
    """Return the head's estimates (T, B) at x_t of held-out data and noise (B, C, h, w), for each of T flow times."""
    import torch

    from training.models.flow import interpolate

    rows = []
    for time in times:
        t = torch.full((len(data),), time, device=data.device)
        rows.append(model.gate_time(interpolate(noise, data, t), t))
    return torch.stack(rows)


def trajectory_estimates(
    model: "Backbone",
    texts: "Sequence[Tensor]",
    unconditional: "Tensor",
    noise: "Tensor",
    settings: "SamplerConfig",
) -> "Tensor":
    """Return the head's estimates (T, B) at the latents that each of T sampling steps starts from, one image per text.

    Model and noise must be on one device; texts may be on another.
    """
    import torch

    from training.sampling.sampler import sample_latents
    from training.sampling.step_conditioning import TextBatch

    trajectory = [noise]
    sample_latents(
        model,
        TextBatch.of(texts, noise.device),
        TextBatch.of([unconditional], noise.device),
        torch.arange(len(texts), device=noise.device),
        noise,
        settings,
        lambda index, total, x_t: trajectory.append(x_t.clone()),
    )
    times = torch.tensor(scheduled_times(settings), device=noise.device)
    starts = zip(times, trajectory[:-1], strict=True)
    return torch.stack([model.gate_time(x_t, t.expand(len(noise))) for t, x_t in starts])


def _row(nominal: float, estimates: "Tensor") -> dict[str, float]:
    difference = estimates - nominal
    return {
        "mean": round(float(estimates.mean()), 4),
        "mean_difference": round(float(difference.mean()), 4),
        "mean_absolute_difference": round(float(difference.abs().mean()), 4),
        "std": round(float(estimates.std(correction=0)), 4),
    }


def compare(
    model: "Backbone", held_out: HeldOut, settings: "SamplerConfig", scales: Sequence[float], seed: int = 0
) -> dict[str, Any]:
    """Return nominal and estimated time per sampling step, for noised held-out samples and for each guidance scale.

    Images are sampled for the captions of the same held-out samples, `settings.batch_size` at a time, on the model's
    device. Raises ThroughlineError if the model has no head.
    """
    import numpy as np
    import torch

    from training.models.flow import sampling_noise, validation_noise

    if not model.text_depends_on_latents:
        raise ThroughlineError("the model's gates follow the nominal time; train one with model.gate_signal=estimated")
    device = next(model.parameters()).device
    keys, shape = held_out.sample_keys, held_out.latents.shape[1:]
    noise = torch.from_numpy(np.stack([validation_noise(key, shape) for key in keys]))
    start = torch.stack([sampling_noise(seed, key, 0, shape) for key in keys]).to(device)
    times = scheduled_times(settings)
    batches = [slice(first, first + settings.batch_size) for first in range(0, len(keys), settings.batch_size)]
    with torch.no_grad():
        columns = {FORWARD: forward_estimates(model, held_out.latents.to(device), noise.to(device), times).cpu()}
        for scale in scales:
            guided = settings.model_copy(update={"guidance_scale": scale})
            estimates = [
                trajectory_estimates(model, held_out.texts[batch], held_out.unconditional, start[batch], guided)
                for batch in batches
            ]
            columns[guided_name(scale)] = torch.cat(estimates, dim=1).cpu()
    steps = [
        {"t": round(t, 4), **{name: _row(t, values[index]) for name, values in columns.items()}}
        for index, t in enumerate(times)
    ]
    overall = {
        name: round(float((values - torch.tensor(times)[:, None]).abs().mean()), 4) for name, values in columns.items()
    }
    return {"num_samples": len(keys), "num_steps": len(times), "mean_absolute_difference": overall, "steps": steps}


def format_comparison(comparison: dict[str, Any]) -> str:
    """Return the comparison as a text table: the mean estimated time and its mean absolute difference from t."""
    names = list(comparison["mean_absolute_difference"])
    lines = ["".join([f"{'t':>8}", *(f"{name:>20}" for name in names)])]
    for step in comparison["steps"]:
        cells = (f"{step[name]['mean']:.3f} ({step[name]['mean_absolute_difference']:.3f})" for name in names)
        lines.append("".join([f"{step['t']:8.3f}", *(f"{cell:>20}" for cell in cells)]))
    overall = comparison["mean_absolute_difference"]
    lines.append("".join([f"{'all':>8}", *(f"{f'({overall[name]:.3f})':>20}" for name in names)]))
    return "\n".join(lines)


def read_checkpoint(folder: Path, num_samples: int) -> "tuple[Backbone, HeldOut]":
    """Load a checkpoint, and held-out samples of its training dataset, from the same output root.

    Raises ThroughlineError if an input no longer exists.
    """
    from training.config import CheckpointConfig
    from training.models.saved_model import load_model

    checkpoint = StageOutput.load(folder / MANIFEST_NAME)
    config = CheckpointConfig.model_validate(checkpoint.manifest.execution)
    root = folder.resolve().parent.parent
    inputs = {
        name: [StageOutput.load(root / item.stage / item.data_version / MANIFEST_NAME) for item in items]
        for name, items in checkpoint.manifest.inputs.items()
    }
    model = load_model(checkpoint, config.text_encoder).model
    return model, read_held_out(config, inputs, model, num_samples)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison for one checkpoint."""
    from training.config import SamplerConfig

    parser = argparse.ArgumentParser(
        prog="python -m evaluation.analysis.gate_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's output folder")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 6.0], help="guidance scales")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--time-shift", type=float, default=3.0, help="static shift of the schedule")
    parser.add_argument("--samples", type=int, default=24, help="held-out samples, and images per scale")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args(argv)
    model, held_out = read_checkpoint(args.checkpoint, args.samples)
    settings = SamplerConfig(num_steps=args.steps, time_shift=args.time_shift, batch_size=args.samples)
    comparison = compare(model, held_out, settings, args.scales)
    print("mean time estimated from the latents (mean absolute difference from the nominal t)")
    print(format_comparison(comparison))
    if args.json is not None:
        args.json.write_text(json.dumps(comparison, indent=1) + "\n")


if __name__ == "__main__":
    main()
