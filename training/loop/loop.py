"""The training loop: one strategy from its starting values, or from its newest snapshot, to its last step.

Every process runs it; the main one alone owns files, the moving average, the ledger and the metrics. What a step
trains on is a function of (dataset, seed, step, position in the global batch), so processes, accumulation and restarts
change rounding at most.
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
from training.loop.flow import (
    interpolate,
    logit_normal_time,
    sample_losses,
    training_draw,
    validation_noise,
    velocity_target,
)
from training.loop.metrics_file import MetricsFile, Row, t_bucket_sums
from training.loop.parallel import defer_gradients
from training.loop.run_log import RunLog
from training.loop.run_state import Run
from training.models.dit import Backbone
from training.models.kernels.malloc import keep_freed_memory
from training.models.time_head import time_losses

logger = logging.getLogger(__name__)

_VALIDATION_BATCH = 32


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
    """Assemble the samples at some positions of a step's global batch; `indices` (B_global,) are the whole batch's."""
    latents, noise, normals, texts = [], [], [], []
    reader = source.latents[TRAIN]
    draws = [training_draw(training.seed, step, place, reader.shape, training.prompt_drop) for place in positions]
    drawn = [int(indices[place]) for place in positions]
    source.ask_for_texts(TRAIN, [index for index, draw in zip(drawn, draws, strict=True) if not draw.drops_prompt])
    for index, draw in zip(drawn, draws, strict=True):
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
    """Loss of each sample (B,), fp32, and that of the head that reads t off the latents, None without one.

    The head's loss adds to the gradients of the first, not to its values: arms stay comparable.
    """
    x_t = interpolate(batch.noise, batch.latents, batch.t)
    output = model(x_t, batch.t, batch.prepared, batch.lengths, batch.text_mask)
    target = velocity_target(batch.noise, batch.latents)
    if isinstance(output, Tensor):
        return sample_losses(output, target), None
    velocity, time_logits = output
    of_head = time_losses(time_logits, batch.t)
    return sample_losses(velocity, target) + (of_head - of_head.detach()), of_head.detach()


@torch.no_grad()
def validation_losses(
    model: Backbone, source: FeatureSource, num_samples: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Losses (n,) on held-out samples at fixed noise, their fixed times (n,), and the time head's losses (n,) if any.

    None where nothing is held out. Sample i of n is seen at t = (i + 1/2) / n, so that all times are covered evenly
    and every call sees the same.
    """
    split = source.splits[VALIDATION]
    count = min(num_samples, len(split))
    if count == 0:
        return None
    reader, losses, of_heads = source.latents[VALIDATION], [], []
    times = (torch.arange(count, dtype=torch.float32) + 0.5) / count
    for start in range(0, count, _VALIDATION_BATCH):
        indices = range(start, min(start + _VALIDATION_BATCH, count))
        source.ask_for_texts(VALIDATION, indices)
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
        local, of_head = batch_losses(model, batch.to(device))
        losses.append(local)
        of_heads += [] if of_head is None else [of_head]
    return torch.cat(losses).cpu(), times, torch.cat(of_heads).cpu() if of_heads else None


def validate(run: Run) -> Row:
    """Validation losses of the moving average, as part of a row; empty numbers where nothing is held out."""
    with run.averaged_weights(), run.accelerator.autocast():
        found = validation_losses(run.backbone, run.source, run.training.num_validation_samples, run.device)
    if found is None:
        return {"validation_loss": None}
    losses, times, of_heads = found
    sums, counts = t_bucket_sums(times, losses)
    row: Row = {
        "validation_loss": float(losses.mean()),
        "validation_loss_by_t": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
    }
    if of_heads is not None:
        row["validation_time_head_loss"] = float(of_heads.mean())
    return row


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
    Raises ThroughlineError that names step and samples where a step is bad and the configuration does not leave bad
    steps out: the snapshots before it stay.
    """
    training = config.training
    if training.device == "cpu":
        keep_freed_memory()
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
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ThroughlineError(
            "accelerate is configured for FSDP; leave fsdp_config out and set training.sharded instead"
        )
    if training.sharded and accelerator.num_processes == 1:
        raise ThroughlineError("sharded training needs several processes; raise num_processes or set sharded to false")
    is_main = accelerator.is_main_process
    if accelerator.num_processes != training.num_processes and is_main:
        logger.warning("configured for %d processes, running in %d", training.num_processes, accelerator.num_processes)
    run = Run(config, model, source, scratch, accelerator)
    first_step, started = run.num_steps_done, time.monotonic()
    log: RunLog | None = None
    with ExitStack() as stack:
        line: Progress | None = None
        if is_main:
            line = stack.enter_context(progress(training.steps, "steps", first_step))
            log = RunLog(
                config,
                logs or scratch / "log",
                first_step=first_step,
                device=run.device,
                num_processes=accelerator.num_processes,
            )
        for step in range(first_step, training.steps):
            began = time.monotonic()
            taken = train_step(run, step)
            seconds = time.monotonic() - began
            row, is_last = taken.row, step + 1 == training.steps
            if run.holds_average and (is_last or (step + 1) % training.validate_every == 0):
                row |= validate(run)
            if is_main:
                run.metrics.append(row)
            if is_last or (step + 1) % training.checkpoint_every == 0:
                run.save()
            if line is not None and log is not None:
                log.add(row, taken.num_text_tokens, seconds)
                line.advance(1, **_details(run, row, is_last))
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


def _details(run: Run, row: Row, is_last: bool) -> dict[str, float | int]:
    if not is_last and (row["step"] + 1) % run.training.log_every:
        return {}
    details: dict[str, float | int] = {} if row["loss"] is None else {"loss": row["loss"]}
    if run.bad_steps.skipped:
        details["skipped"] = len(run.bad_steps.skipped)
    return details


@dataclass(frozen=True)
class StepTaken:
    """What a step of the global batch gave, the same on every process."""

    row: Row
    num_text_tokens: int
    """Of all samples, padding not counted."""


def train_step(run: Run, step: int) -> StepTaken:
    """One optimizer step of the global batch, or none where it is bad and bad steps are left out."""
    training, accelerator = run.training, run.accelerator
    indices = run.order.indices(step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(training, step)
    share = training.batch_size // accelerator.num_processes
    micro = share // training.accumulation_steps
    first = accelerator.process_index * share
    seen: list[Tensor] = []
    consumed: list[Tensor] = []
    grad_norm, bad, of_head = math.nan, None, None
    numbers, read = torch.empty(0, 5), indices
    for start in range(first, first + share, micro):
        batch = read_batch(run.source, training, step, range(start, start + micro), indices).to(run.device)
        with accelerator.accumulate(run.model):
            defer_gradients(run.model, defer=not accelerator.sync_gradients)
            with accelerator.autocast():
                local, of_head = batch_losses(run.model, batch)
            accelerator.backward(local.mean())
            head = torch.zeros_like(local) if of_head is None else of_head
            truncated = run.source.truncated(TRAIN, indices[start : start + micro].tolist())
            cut = torch.tensor(truncated, dtype=torch.float32, device=run.device)
            seen.append(torch.stack([local.detach(), batch.t, batch.lengths.float(), head, cut], dim=1))
            consumed.append(batch.sample_indices)
            if not accelerator.sync_gradients:
                continue
            grad_norm = float(cast(Tensor, accelerator.clip_grad_norm_(run.model.parameters(), training.gradient_clip)))
            numbers, read = _of_all_processes(run, torch.cat(seen), torch.cat(consumed))
            keys = [run.source.splits[TRAIN].key(int(index)) for index in read]
            bad = run.bad_steps.judge(step, numbers[:, 0], keys, grad_norm)
            if bad is None:
                run.optimizer.step()
            run.optimizer.zero_grad()
    if bad is not None:
        _leave_out(run, bad)
    run.ledger.record(step, read)
    losses, t, lengths, of_heads, cut = numbers.unbind(1)
    _note_truncated(run, read[cut.bool().numpy()])
    loss = float(losses.mean())
    if bad is None:
        run.bad_steps.take(loss)
        run.update_ema(step)
    run.num_steps_done = step + 1
    sums, counts = t_bucket_sums(t, losses)
    row: Row = {
        "step": step,
        "loss": loss if math.isfinite(loss) else None,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "learning_rate": learning_rate_at(training, step),
        "t_bucket_loss_sums": sums,
        "t_bucket_counts": counts,
    }
    if of_head is not None:
        row["time_head_loss"] = float(of_heads.mean())
    if bad is not None:
        row["skipped"] = {"reason": bad.reason, "sample_keys": bad.sample_keys}
    return StepTaken(row, int(lengths.sum()))


def _of_all_processes(run: Run, numbers: Tensor, indices: Tensor) -> tuple[Tensor, np.ndarray]:
    """Return what all processes saw, in the order of positions in the global batch, on the CPU."""
    if run.accelerator.num_processes > 1:
        numbers, indices = cast(Tensor, gather(numbers)), cast(Tensor, gather(indices))
    return numbers.cpu(), indices.cpu().numpy()


def _note_truncated(run: Run, indices: np.ndarray) -> None:
    """Note samples whose captions were cut in the ledger; a run's first are told of."""
    if len(indices) and not run.ledger.num_truncated and run.accelerator.is_main_process:
        logger.warning(
            "sample %s: its caption is longer in its template than the text encoder reads, and its end is left out, as "
            "may be the ends of others; shorten captions (captions.max_caption_tokens), or go by the manifest's "
            "num_truncated_captions",
            run.source.splits[TRAIN].key(int(indices[0])),
        )
    run.ledger.note_truncated(indices)


def _leave_out(run: Run, bad: BadStep) -> None:
    """Note a step that is not taken; raises ThroughlineError where one stops the run, or too many came in a row."""
    if run.training.on_bad_step == "stop":
        raise ThroughlineError(
            f"step {bad.step}: {bad.said}; lower learning_rate, look at these samples, leave such steps out with "
            f"on_bad_step=skip, or train on from the snapshot before it"
        )
    run.bad_steps.skip(bad)
    if run.bad_steps.num_in_row >= run.training.max_bad_steps_in_row:
        raise ThroughlineError(
            f"step {bad.step}: {bad.said}; with it {run.bad_steps.num_in_row} steps in a row are bad, so it is not "
            f"chance: lower learning_rate or look at these samples, then train on from the snapshot before them"
        )
    if run.accelerator.is_main_process:
        logger.warning("step %d is left out: %s", bad.step, bad.said)
