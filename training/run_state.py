"""The state of a training run on one process: what it is made of, and how it is saved and restored."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from training.bad_steps import BadSteps
from training.config import CheckpointConfig, TrainingConfig
from training.data_order import DataOrder, Ledger
from training.dit import Backbone
from training.feature_source import TRAIN, FeatureSource
from training.metrics_file import METRICS_NAME, MetricsFile
from training.snapshots import Snapshot, Snapshots


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


class Run:
    """Model, optimizer, moving average, ledger and judge of a run; the main process owns its files and the average."""

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
        self.bad_steps = BadSteps(training)
        self.metrics = MetricsFile(scratch / METRICS_NAME)
        self.snapshots = Snapshots(
            scratch / "snapshots",
            training.keep_checkpoints,
            keep_every=training.keep_every,
            max_shard_bytes=training.max_shard_bytes,
        )
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
        self.bad_steps.restore(snapshot.state["bad_steps"])
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
            if self.bad_steps.num_taken:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.bad_steps.num_taken), device=self.device),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(self.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(self.device),
                }
        for name, average in self.ema.items():
            average.copy_(tensors[f"ema.{name}"])
        ledger = {name: tensors[f"ledger.{name}"] for name in ("first_step", "times_seen")}
        self.ledger.restore(ledger, snapshot.state["consumption_digest"])
        if self.accelerator.is_main_process:
            self.metrics.take_up(snapshot.num_steps_done)

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Move the average towards the weights, in fp32."""
        for average, parameter in zip(self.ema.values(), self.backbone.parameters(), strict=bool(self.ema)):
            average.lerp_(parameter, 1 - ema_decay_at(self.training.ema_decay, step))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the moving average in the place of the weights for a while."""
        weights = [parameter.detach().clone() for parameter in self.backbone.parameters()]
        self._fill(self.ema.values())
        try:
            yield
        finally:
            self._fill(weights)

    @torch.no_grad()
    def _fill(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.backbone.parameters(), values, strict=True):
            parameter.copy_(value)

    def save(self) -> None:
        """Write a snapshot; metrics first, since rows beyond a snapshot are cut when it is taken up."""
        if not self.accelerator.is_main_process:
            return
        self.metrics.flush()
        state = self.optimizer.optimizer.state
        tensors = {f"ledger.{name}": tensor for name, tensor in self.ledger.tensors().items()}
        for name, parameter in self.backbone.named_parameters():
            tensors[f"model.{name}"] = parameter
            tensors[f"ema.{name}"] = self.ema[name]
            if self.bad_steps.num_taken:
                tensors[f"exp_avg.{name}"] = state[parameter]["exp_avg"]
                tensors[f"exp_avg_sq.{name}"] = state[parameter]["exp_avg_sq"]
        kept = {"consumption_digest": self.ledger.consumption_digest, "bad_steps": self.bad_steps.state()}
        self.snapshots.save(self.num_steps_done, tensors, kept)
