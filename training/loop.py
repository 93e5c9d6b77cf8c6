"""The training loop: one strategy from its starting values, or from its newest snapshot, to its last step.

Every process runs it; the main one alone owns files, the moving average, the ledger and the metrics. What a step
trains on is a function of (dataset, seed, step, position in the global batch), so processes, accumulation and restarts
change rounding at most.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather
from torch import Tensor, nn

from pipelines.atomic import write_bytes
from pipelines.errors import ThroughlineError
from pipelines.progress import Progress
from training.config import CheckpointConfig, TrainingConfig
from training.data_order import DataOrder, Ledger
from training.dit import Backbone, DiT
from training.feature_source import TRAIN, VALIDATION, Batch, FeatureSource, pad_texts
from training.flow import (
    interpolate,
    logit_normal_time,
    sample_losses,
    training_draw,
    validation_noise,
    velocity_target,
)
from training.snapshots import Snapshot, Snapshots
from training.time_head import time_losses

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
_VALIDATION_BATCH = 32


@dataclass
class Trained:
    """The end of a run, on the main process."""

    weights: dict[str, Tensor]
    """The moving average, fp32."""
    ledger: Ledger
    metrics: list[dict[str, Any]]
    measurements: dict[str, Any] = field(default_factory=dict)


def learning_rate_at(training: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule down to the last step."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / (training.steps - training.warmup_steps)
    match training.schedule:
        case "linear":
            return training.learning_rate * (1 - progress)
        case "cosine":
            return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return training.learning_rate


def ema_decay_at(decay: float, step: int) -> float:
    """Return the decay of the moving average at a step; it rises from 0.1, so that short runs forget their start."""
    return min(decay, (1 + step) / (10 + step))


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: not on norms, biases, gates' biases or fusion logits."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith(("logits", "values", "bias_in", "bias_out"))
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def read_batch(
    source: FeatureSource, training: TrainingConfig, step: int, positions: range, indices: np.ndarray
) -> Batch:
    """Assemble the samples at some positions of a step's global batch; `indices` (B_global,) are the whole batch's."""
    latents, noise, normals, texts = [], [], [], []
    reader = source.latents[TRAIN]
    for position in positions:
        index = int(indices[position])
        draw = training_draw(training.seed, step, position, reader.shape, training.prompt_drop)
        latents.append(reader.read(index, draw.posterior_noise))
        noise.append(draw.noise)
        normals.append(draw.time_normal)
        texts.append(source.unconditional if draw.drops_prompt else source.text(TRAIN, index))
    prepared, lengths, text_mask = pad_texts(texts)
    normal = torch.tensor(normals, dtype=torch.float32)
    return Batch(
        sample_indices=torch.from_numpy(indices[positions.start : positions.stop]),
        latents=torch.from_numpy(np.stack(latents)),
        noise=torch.from_numpy(np.stack(noise)),
        t=logit_normal_time(normal, training.time_mean, training.time_std, training.time_shift),
        prepared=prepared,
        lengths=lengths,
        text_mask=text_mask,
    )


def batch_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each sample (B,), fp32.

    Where gates follow an estimated time, the head's loss adds to the gradients, not to the values: arms stay
    comparable, and `head_losses` gives it.
    """
    x_t = interpolate(batch.noise, batch.latents, batch.t)
    output = model(x_t, batch.t, batch.prepared, batch.lengths, batch.text_mask)
    if isinstance(output, Tensor):
        return sample_losses(output, velocity_target(batch.noise, batch.latents))
    velocity, time_logits = output
    of_head = time_losses(time_logits, batch.t)
    return sample_losses(velocity, velocity_target(batch.noise, batch.latents)) + (of_head - of_head.detach())


@torch.no_grad()
def head_losses(model: Backbone, batch: Batch) -> Tensor | None:
    """Loss (B,) of the head that reads t off the latents, or None where the model has none."""
    head = model.time_head if isinstance(model, DiT) else None
    if head is None:
        return None
    return time_losses(head(interpolate(batch.noise, batch.latents, batch.t)), batch.t)


@torch.no_grad()
def validation_loss(model: Backbone, source: FeatureSource, num_samples: int, device: torch.device) -> float | None:
    """Mean loss on held-out samples at fixed noise and times, or None where nothing is held out.

    Sample i of n is seen at t = (i + 1/2) / n, so that all times are covered evenly and every call sees the same.
    """
    split = source.splits[VALIDATION]
    count = min(num_samples, len(split))
    if count == 0:
        return None
    reader, losses = source.latents[VALIDATION], []
    for start in range(0, count, _VALIDATION_BATCH):
        indices = range(start, min(start + _VALIDATION_BATCH, count))
        prepared, lengths, text_mask = pad_texts([source.text(VALIDATION, index) for index in indices])
        batch = Batch(
            sample_indices=torch.tensor(list(indices)),
            latents=torch.from_numpy(np.stack([reader.read(index, None) for index in indices])),
            noise=torch.from_numpy(np.stack([validation_noise(split.key(index), reader.shape) for index in indices])),
            t=(torch.tensor(list(indices), dtype=torch.float32) + 0.5) / count,
            prepared=prepared,
            lengths=lengths,
            text_mask=text_mask,
        )
        losses.append(batch_losses(model, batch.to(device)))
    return float(torch.cat(losses).mean())


class Run:
    """The state of a run on one process, and how it is saved and restored."""

    def __init__(
        self, config: CheckpointConfig, model: Backbone, source: FeatureSource, scratch: Path, accelerator: Accelerator
    ) -> None:
        training = config.training
        self.training, self.source, self.accelerator = training, source, accelerator
        self.device = accelerator.device
        self.backbone = model.to(self.device)
        self.order = DataOrder(source.data_version, training.seed, training.batch_size, len(source.splits[TRAIN]))
        keys = source.splits[TRAIN].sample_keys
        self.ledger = Ledger(keys, source.data_version, training.seed, training.batch_size)
        self.snapshots = Snapshots(scratch / "snapshots", training.keep_checkpoints)
        self._metrics_path = scratch / METRICS_NAME
        self.metrics: list[dict[str, Any]] = []
        self._num_metrics_written = 0
        optimizer = build_optimizer(self.backbone, training)
        self.num_steps_done = self._restore(optimizer)
        self.optimizer: Any
        self.model, self.optimizer = accelerator.prepare(self.backbone, optimizer)

    def _restore(self, optimizer: torch.optim.Optimizer) -> int:
        main = self.accelerator.is_main_process
        snapshot = self.snapshots.load_newest() if main else None
        chosen = [snapshot.num_steps_done if snapshot is not None else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(chosen)
        if chosen[0] is not None and snapshot is None:
            snapshot = self.snapshots.load_step(chosen[0])
        parameters = dict(self.backbone.named_parameters())
        self.ema = {name: parameter.detach().clone() for name, parameter in parameters.items()} if main else {}
        if snapshot is None:
            return 0
        self._take_up(snapshot, parameters, optimizer)
        return snapshot.num_steps_done

    @torch.no_grad()
    def _take_up(self, snapshot: Snapshot, parameters: dict[str, nn.Parameter], optimizer: Any) -> None:
        tensors = snapshot.tensors
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(snapshot.num_steps_done), device=self.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(self.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(self.device),
            }
        for name, average in self.ema.items():
            average.copy_(tensors[f"ema.{name}"])
        ledger = {name: tensors[f"ledger.{name}"] for name in ("first_step", "times_seen")}
        self.ledger.restore(ledger, snapshot.state["consumption_digest"])
        if self.accelerator.is_main_process:
            self._take_up_metrics(snapshot.num_steps_done)

    def _take_up_metrics(self, num_steps_done: int) -> None:
        lines = self._metrics_path.read_text().splitlines() if self._metrics_path.exists() else []
        self.metrics = []
        for line in lines[:num_steps_done]:  # a kill may have cut the last line, which is then one of those beyond
            self.metrics.append(json.loads(line))
        if len(self.metrics) != num_steps_done:
            raise ThroughlineError(
                f"{self._metrics_path}: {len(self.metrics)} rows for {num_steps_done} finished steps; "
                f"remove {self._metrics_path.parent} to train from the start"
            )
        write_bytes(self._metrics_path, metrics_lines(self.metrics))
        self._num_metrics_written = len(self.metrics)

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Move the average towards the weights, in fp32."""
        for average, parameter in zip(self.ema.values(), self.backbone.parameters(), strict=bool(self.ema)):
            average.lerp_(parameter, 1 - ema_decay_at(self.training.ema_decay, step))

    def save(self) -> None:
        """Write a snapshot; metrics first, since rows beyond a snapshot are cut when it is taken up."""
        if not self.accelerator.is_main_process:
            return
        with self._metrics_path.open("ab") as stream:
            stream.write(metrics_lines(self.metrics[self._num_metrics_written :]))
            stream.flush()
            os.fsync(stream.fileno())
        self._num_metrics_written = len(self.metrics)
        state = self.optimizer.optimizer.state
        tensors = {f"ledger.{name}": tensor for name, tensor in self.ledger.tensors().items()}
        for name, parameter in self.backbone.named_parameters():
            tensors[f"model.{name}"] = parameter
            tensors[f"ema.{name}"] = self.ema[name]
            tensors[f"exp_avg.{name}"] = state[parameter]["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = state[parameter]["exp_avg_sq"]
        self.snapshots.save(self.num_steps_done, tensors, {"consumption_digest": self.ledger.consumption_digest})

    def validate(self) -> float | None:
        """Validation loss of the moving average; on the main process."""
        weights = {name: parameter.detach().clone() for name, parameter in self.backbone.named_parameters()}
        self.backbone.load_state_dict(self.ema)
        try:
            return validation_loss(self.backbone, self.source, self.training.num_validation_samples, self.device)
        finally:
            self.backbone.load_state_dict(weights)


def metrics_lines(rows: list[dict[str, Any]]) -> bytes:
    """Return metrics as JSON lines."""
    return b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)


def train(
    config: CheckpointConfig,
    model: Backbone,
    source: FeatureSource,
    scratch: Path,
    progress: Callable[[int, str, int], Progress],
) -> Trained | None:
    """Train to the last step and return the result on the main process, None on others.

    `progress(total, noun, initial)` opens the progress line. Raises ThroughlineError that names step and samples where
    the loss is not finite: the snapshots before it stay.
    """
    training = config.training
    accelerator = Accelerator(
        cpu=training.device == "cpu",
        mixed_precision="bf16" if training.precision == "bfloat16" else "no",
        gradient_accumulation_steps=training.accumulation_steps,
    )
    if accelerator.num_processes * training.accumulation_steps > training.batch_size or (
        training.batch_size % (accelerator.num_processes * training.accumulation_steps)
    ):
        raise ThroughlineError(
            f"batch_size {training.batch_size} does not divide by {accelerator.num_processes} processes * "
            f"{training.accumulation_steps} accumulation steps"
        )
    if accelerator.num_processes != training.num_processes and accelerator.is_main_process:
        logger.warning("configured for %d processes, running in %d", training.num_processes, accelerator.num_processes)
    run = Run(config, model, source, scratch, accelerator)
    first_step, started = run.num_steps_done, time.monotonic()
    if not accelerator.is_main_process:
        for step in range(first_step, training.steps):
            train_step(run, step)
        return None
    with progress(training.steps, "steps", first_step) as line:
        for step in range(first_step, training.steps):
            loss, grad_norm, head_loss = train_step(run, step)
            row: dict[str, float | None] = {
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "learning_rate": learning_rate_at(training, step),
            }
            if head_loss is not None:
                row["time_head_loss"] = head_loss
            is_last = step + 1 == training.steps
            if is_last or (step + 1) % training.validate_every == 0:
                row["validation_loss"] = run.validate()
            run.metrics.append(row)
            if is_last or (step + 1) % training.checkpoint_every == 0:
                run.save()
            line.advance(1, **({"loss": loss} if is_last or (step + 1) % training.log_every == 0 else {}))
    seconds, num_steps = time.monotonic() - started, training.steps - first_step
    measurements = {
        "seconds_training": round(seconds, 3),
        "images_per_second": round(num_steps * training.batch_size / seconds, 2) if num_steps else None,
        "num_processes": accelerator.num_processes,
        "threads_per_process": torch.get_num_threads(),
        "resumed_at_step": first_step,
    }
    weights = {name: tensor.cpu() for name, tensor in run.ema.items()}
    return Trained(weights, run.ledger, run.metrics, measurements)


def train_step(run: Run, step: int) -> tuple[float, float, float | None]:
    """One optimizer step of the global batch; returns its mean loss and the gradient norm before clipping.

    Where gates follow an estimated time, the mean loss of the head on this process's last samples stands behind.
    """
    training, accelerator = run.training, run.accelerator
    indices = run.order.indices(step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(training, step)
    share = training.batch_size // accelerator.num_processes
    micro = share // training.accumulation_steps
    first = accelerator.process_index * share
    losses: list[Tensor] = []
    consumed: list[Tensor] = []
    grad_norm, of_head = math.nan, None
    for start in range(first, first + share, micro):
        batch = read_batch(run.source, training, step, range(start, start + micro), indices).to(run.device)
        with accelerator.accumulate(run.model):
            local = batch_losses(run.model, batch)
            of_head = head_losses(run.backbone, batch)
            accelerator.backward(local.mean())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(run.model.parameters(), training.gradient_clip)
                grad_norm = float(cast(Tensor, norm))
            run.optimizer.step()
            run.optimizer.zero_grad()
        losses.append(local.detach())
        consumed.append(batch.sample_indices)
    all_losses, all_consumed = torch.cat(losses), torch.cat(consumed)
    if accelerator.num_processes > 1:
        all_losses, all_consumed = cast(Tensor, gather(all_losses)), cast(Tensor, gather(all_consumed))
    _check_finite(run, step, all_losses, all_consumed, grad_norm)
    run.ledger.record(step, all_consumed.cpu().numpy())
    run.update_ema(step)
    run.num_steps_done = step + 1
    return float(all_losses.mean()), grad_norm, None if of_head is None else float(of_head.mean())


def _check_finite(run: Run, step: int, losses: Tensor, indices: Tensor, grad_norm: float) -> None:
    bad = ~losses.isfinite()
    if not bad.any() and math.isfinite(grad_norm):
        return
    split = run.source.splits[TRAIN]
    keys = [split.key(int(index)) for index in (indices[bad] if bad.any() else indices).tolist()]
    what = f"loss of {', '.join(keys[:8])}" if bad.any() else f"gradient norm over {len(keys)} samples"
    raise ThroughlineError(
        f"step {step}: {what} is not finite; lower learning_rate, look at these samples, or train on from the "
        f"snapshot before it"
    )
