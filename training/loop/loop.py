"""The training loop: one strategy from its initial values, or its newest snapshot, to its last step.

Every process runs it; only the main process writes files. The samples, noise and times of a step depend only on
(dataset, seed, step, position in the global batch), so the number of processes, accumulation and restarts change at
most rounding.
"""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather
from torch import Tensor, nn

from pipelines.core.errors import ThroughlineError
from pipelines.core.progress import Progress
from training.config import CheckpointConfig, TrainingConfig
from training.data.data_order import Ledger
from training.data.feature_source import TRAIN, VALIDATION, Batch, FeatureSource, text_lengths
from training.loop.bad_steps import BadStep, BadSteps
from training.loop.metrics_file import MetricsFile, Row, t_bucket_sums
from training.loop.parallel import set_grad_sync
from training.loop.run_log import RunLog
from training.loop.run_state import TrainingRun
from training.models.backbone import Backbone
from training.models.flow import (
    interpolate,
    logit_normal_time,
    sample_losses,
    training_draw,
    validation_noise,
    velocity_target,
)
from training.models.kernels.malloc import keep_freed_memory
from training.models.time_head import time_losses

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 32
_NUM_STATISTICS = 5


@dataclass
class Trained:
    """The end of a run, on the main process."""

    weights: dict[str, Tensor]
    """The moving average, fp32."""
    ledger: Ledger
    metrics: MetricsFile
    bad_steps: BadSteps
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


def read_batch(
    source: FeatureSource, training: TrainingConfig, step: int, positions: range, indices: np.ndarray
) -> Batch:
    """Read the samples at some positions of a step's global batch, whose sample indices (B_global,) are `indices`."""
    latents, noise, normals, texts = [], [], [], []
    reader = source.latents[TRAIN]
    draws = [training_draw(training.seed, step, position, reader.shape, training.prompt_drop) for position in positions]
    samples = [int(indices[position]) for position in positions]
    source.prefetch_texts(TRAIN, [index for index, draw in zip(samples, draws, strict=True) if not draw.drops_prompt])
    for index, draw in zip(samples, draws, strict=True):
        latents.append(reader.read(index, draw.posterior_noise))
        noise.append(draw.noise)
        normals.append(draw.time_normal)
        texts.append(source.unconditional if draw.drops_prompt else source.text(TRAIN, index))
    lengths, text_mask = text_lengths(texts)
    normal = torch.tensor(normals, dtype=torch.float32)
    return Batch(
        sample_indices=torch.from_numpy(indices[positions.start : positions.stop]),
        latents=torch.from_numpy(np.stack(latents)),
        noise=torch.from_numpy(np.stack(noise)),
        t=logit_normal_time(normal, training.time_mean, training.time_std, training.time_shift),
        prepared=tuple(texts),
        lengths=lengths,
        text_mask=text_mask,
    )


def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Loss of each sample (B,), fp32, and the time head's loss (B,), None without a head.

    The head's loss enters the gradients of the first, not its values: arms stay comparable.
    """
    x_t = interpolate(batch.noise, batch.latents, batch.t)
    output = model(x_t, batch.t, batch.prepared, batch.lengths, batch.text_mask)
    target = velocity_target(batch.noise, batch.latents)
    if isinstance(output, Tensor):
        return sample_losses(output, target), None
    velocity, time_logits = output
    head_loss = time_losses(time_logits, batch.t)
    return sample_losses(velocity, target) + (head_loss - head_loss.detach()), head_loss.detach()


@torch.no_grad()
def validation_losses(
    model: Backbone, source: FeatureSource, num_samples: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Losses (n,) on held-out samples at fixed noise, their fixed times (n,), and the time head's losses (n,) if any.

    None where nothing is held out. Sample i of n has t = (i + 1/2) / n, so every call covers all times evenly.
    """
    split = source.splits[VALIDATION]
    count = min(num_samples, len(split))
    if count == 0:
        return None
    reader, losses, head_losses = source.latents[VALIDATION], [], []
    times = (torch.arange(count, dtype=torch.float32) + 0.5) / count
    for start in range(0, count, _VALIDATION_BATCH):
        indices = range(start, min(start + _VALIDATION_BATCH, count))
        source.prefetch_texts(VALIDATION, indices)
        texts = tuple(source.text(VALIDATION, index) for index in indices)
        lengths, text_mask = text_lengths(texts)
        batch = Batch(
            sample_indices=torch.tensor(list(indices)),
            latents=torch.from_numpy(np.stack([reader.read(index, None) for index in indices])),
            noise=torch.from_numpy(np.stack([validation_noise(split.key(index), reader.shape) for index in indices])),
            t=times[start : indices.stop],
            prepared=texts,
            lengths=lengths,
            text_mask=text_mask,
        )
        batch_loss, head_loss = batch_losses(model, batch.to(device))
        losses.append(batch_loss)
        head_losses += [] if head_loss is None else [head_loss]
    return torch.cat(losses).cpu(), times, torch.cat(head_losses).cpu() if head_losses else None


def validate(run: TrainingRun) -> Row:
    """Validation losses of the moving average, as part of a row; None where nothing is held out."""
    with run.averaged_weights(), run.accelerator.autocast():
        result = validation_losses(run.backbone, run.source, run.training.num_validation_samples, run.device)
    if result is None:
        return {"validation_loss": None}
    losses, times, head_losses = result
    sums, counts = t_bucket_sums(times, losses)
    row: Row = {
        "validation_loss": float(losses.mean()),
        "validation_loss_by_t": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
    }
    if head_losses is not None:
        row["validation_time_head_loss"] = float(head_losses.mean())
    return row


def build_accelerator(training: TrainingConfig) -> Accelerator:
    """Return this process's accelerator; raises ThroughlineError where the configuration and the launcher disagree."""
    accelerator = Accelerator(
        cpu=training.device == "cpu",
        mixed_precision="bf16" if training.precision == "bfloat16" else "no",
        gradient_accumulation_steps=training.accumulation_steps,
    )
    if training.batch_size % (accelerator.num_processes * training.accumulation_steps):
        raise ThroughlineError(
            f"batch_size {training.batch_size} is not divisible by {accelerator.num_processes} processes * "
            f"{training.accumulation_steps} accumulation steps"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ThroughlineError(
            "accelerate is configured for FSDP; remove its fsdp_config and set training.sharded instead"
        )
    if training.sharded and accelerator.num_processes == 1:
        raise ThroughlineError("sharded training needs several processes; raise num_processes or set sharded to false")
    if accelerator.num_processes != training.num_processes and accelerator.is_main_process:
        logger.warning("configured for %d processes, running in %d", training.num_processes, accelerator.num_processes)
    return accelerator


def train(
    config: CheckpointConfig,
    model: Backbone,
    source: FeatureSource,
    scratch: Path,
    progress: Callable[[int, str, int], Progress],
    logs: Path | None = None,
) -> Trained | None:
    """Train to the last step and return the result on the main process, None on others.

    `progress(total, noun, initial)` opens the progress line; the main process writes curves into the folder `logs`.
    Raises ThroughlineError that names step and samples at a bad step, unless the configuration skips those; earlier
    snapshots stay.
    """
    training = config.training
    if training.device == "cpu":
        keep_freed_memory()
    accelerator = build_accelerator(training)
    is_main = accelerator.is_main_process
    run = TrainingRun(config, model, source, scratch, accelerator)
    first_step, started = run.num_steps_done, time.monotonic()
    log: RunLog | None = None
    with ExitStack() as stack:
        progress_line: Progress | None = None
        if is_main:
            progress_line = stack.enter_context(progress(training.steps, "steps", first_step))
            log = RunLog(
                config,
                logs or scratch / "log",
                first_step=first_step,
                device=run.device,
                num_processes=accelerator.num_processes,
            )
        for step in range(first_step, training.steps):
            step_started = time.monotonic()
            result = train_step(run, step)
            seconds = time.monotonic() - step_started
            row, is_last = result.row, step + 1 == training.steps
            if run.holds_average and (is_last or (step + 1) % training.validate_every == 0):
                row |= validate(run)
            if is_main:
                run.metrics.append(row)
            if is_last or (step + 1) % training.checkpoint_every == 0:
                run.save()
            if progress_line is not None and log is not None:
                log.add(row, result.num_text_tokens, seconds)
                progress_line.advance(1, **_details(run, row, is_last))
    weights = run.averaged()
    if log is None:
        return None
    measurements = {
        "seconds_training": round(time.monotonic() - started, 3),
        **log.close(),
        "num_processes": accelerator.num_processes,
        "threads_per_process": torch.get_num_threads(),
        "resumed_at_step": first_step,
    }
    return Trained(weights, run.ledger, run.metrics, run.bad_steps, measurements)


def _details(run: TrainingRun, row: Row, is_last: bool) -> dict[str, float | int]:
    if not is_last and (row["step"] + 1) % run.training.log_every:
        return {}
    details: dict[str, float | int] = {} if row["loss"] is None else {"loss": row["loss"]}
    if run.bad_steps.skipped:
        details["skipped"] = len(run.bad_steps.skipped)
    return details


@dataclass(frozen=True)
class StepResult:
    """The result of one step of the global batch, equal on every process."""

    row: Row
    num_text_tokens: int
    """Of all samples, without padding."""


def train_step(run: TrainingRun, step: int) -> StepResult:
    """One optimizer step of the global batch, skipped where it is bad and the configuration skips bad steps."""
    training, accelerator = run.training, run.accelerator
    batch_indices = run.order.indices(step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(training, step)
    local_size = training.batch_size // accelerator.num_processes
    micro_size = local_size // training.accumulation_steps
    first = accelerator.process_index * local_size
    statistics: list[Tensor] = []
    consumed: list[Tensor] = []
    grad_norm, bad, head_loss = math.nan, None, None
    gathered, indices = torch.empty(0, _NUM_STATISTICS), batch_indices
    for start in range(first, first + local_size, micro_size):
        batch = read_batch(run.source, training, step, range(start, start + micro_size), batch_indices).to(run.device)
        with accelerator.accumulate(run.model):
            set_grad_sync(run.model, sync=accelerator.sync_gradients)
            with accelerator.autocast():
                loss, head_loss = batch_losses(run.model, batch)
            accelerator.backward(loss.mean())
            is_truncated = run.source.truncated(TRAIN, batch_indices[start : start + micro_size].tolist())
            statistics.append(_statistics(batch, loss.detach(), head_loss, is_truncated))
            consumed.append(batch.sample_indices)
            if not accelerator.sync_gradients:
                continue
            grad_norm = float(cast(Tensor, accelerator.clip_grad_norm_(run.model.parameters(), training.gradient_clip)))
            gathered, indices = _gather(run, torch.cat(statistics), torch.cat(consumed))
            sample_keys = [run.source.splits[TRAIN].key(int(index)) for index in indices]
            bad = run.bad_steps.judge(step, gathered[:, 0], sample_keys, grad_norm)
            if bad is None:
                run.optimizer.step()
            run.optimizer.zero_grad()
    if bad is not None:
        _skip_or_stop(run, bad)
    run.ledger.record(step, indices)
    losses, t, text_lengths, head_losses, truncated_flags = gathered.unbind(1)
    _record_truncated(run, indices[truncated_flags.bool().numpy()])
    mean_loss = float(losses.mean())
    if bad is None:
        run.bad_steps.record_good(mean_loss)
        run.update_ema(step)
    run.num_steps_done = step + 1
    sums, counts = t_bucket_sums(t, losses)
    row: Row = {
        "step": step,
        "loss": mean_loss if math.isfinite(mean_loss) else None,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "learning_rate": learning_rate_at(training, step),
        "t_bucket_loss_sums": sums,
        "t_bucket_counts": counts,
    }
    if head_loss is not None:
        row["time_head_loss"] = float(head_losses.mean())
    if bad is not None:
        row["skipped"] = {"reason": bad.reason, "sample_keys": bad.sample_keys}
    return StepResult(row, int(text_lengths.sum()))


def _statistics(batch: Batch, losses: Tensor, head_losses: Tensor | None, is_truncated: list[bool]) -> Tensor:
    """Per sample: loss, t, text length, time head's loss, 1 for a truncated caption: (B, 5), fp32."""
    truncated = torch.tensor(is_truncated, dtype=torch.float32, device=losses.device)
    head = torch.zeros_like(losses) if head_losses is None else head_losses
    return torch.stack([losses, batch.t, batch.lengths.float(), head, truncated], dim=1)


def _gather(run: TrainingRun, statistics: Tensor, indices: Tensor) -> tuple[Tensor, np.ndarray]:
    """Gather from all processes, in the order of positions in the global batch, to the CPU."""
    if run.accelerator.num_processes > 1:
        statistics, indices = cast(Tensor, gather(statistics)), cast(Tensor, gather(indices))
    return statistics.cpu(), indices.cpu().numpy()


def _record_truncated(run: TrainingRun, indices: np.ndarray) -> None:
    """Record samples with truncated captions in the ledger; the first one in a run is logged as a warning."""
    if len(indices) and not run.ledger.num_truncated and run.accelerator.is_main_process:
        logger.warning(
            "sample %s: its caption in its template is longer than the text encoder reads and is truncated, as others "
            "may be; shorten captions (captions.max_caption_tokens), or see num_truncated_captions in the manifest",
            run.source.splits[TRAIN].key(int(indices[0])),
        )
    run.ledger.record_truncated(indices)


def _skip_or_stop(run: TrainingRun, bad: BadStep) -> None:
    """Record a skipped step; raises ThroughlineError where one bad step stops the run, or too many came in a row."""
    if run.training.on_bad_step == "stop":
        raise ThroughlineError(
            f"step {bad.step}: {bad.message}; lower learning_rate, inspect these samples, skip such steps with "
            f"on_bad_step=skip, or resume from the snapshot before it"
        )
    run.bad_steps.record_skipped(bad)
    if run.bad_steps.num_in_row >= run.training.max_bad_steps_in_row:
        raise ThroughlineError(
            f"step {bad.step}: {bad.message}; this is bad step {run.bad_steps.num_in_row} in a row: lower "
            f"learning_rate or inspect these samples, then resume from the snapshot before them"
        )
    if run.accelerator.is_main_process:
        logger.warning("step %d is skipped: %s", bad.step, bad.message)
