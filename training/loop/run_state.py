"""The state of a training run on one process, and how it is saved and restored."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from training.config import CheckpointConfig, TrainingConfig
from training.data.data_order import LEDGER_COLUMNS, DataOrder, Ledger
from training.data.feature_source import TRAIN, FeatureSource
from training.loop.bad_steps import BadSteps
from training.loop.metrics_file import METRICS_NAME, MetricsFile
from training.loop.parallel import distribute_like, full_tensor, parallelize, reshard
from training.loop.snapshots import Snapshot, Snapshots
from training.models.backbone import Backbone


def ema_decay_at(decay: float, step: int) -> float:
    """Return the decay of the moving average at a step; it rises from 0.1, so that short runs forget initial values."""
    return min(decay, (1 + step) / (10 + step))


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on norms, biases, gates' biases or fusion logits."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and not name.endswith(("logits", "values", "bias_in", "bias_out"))
        (matrices if is_matrix else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


class TrainingRun:
    """Model, optimizer, moving average, ledger, metrics and bad steps of a run.

    The main process owns the files, and the average too; of sharded parameters each process averages its slice.
    """

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
        snapshot = self._find_snapshot()
        if snapshot is not None:
            self._fill(snapshot.tensors[f"model.{name}"] for name, _ in self.backbone.named_parameters())
        parallelize(self.backbone, training, self.device, accelerator.num_processes)
        self.holds_average = accelerator.is_main_process or training.sharded
        parameters = dict(self.backbone.named_parameters()) if self.holds_average else {}
        self.ema = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.num_steps_done = 0
        optimizer = build_optimizer(self.backbone, training)
        if snapshot is not None:
            self._resume_from(snapshot, optimizer)
        self.model: nn.Module = self.backbone if training.sharded else accelerator.prepare(self.backbone)
        self.optimizer: Any = accelerator.prepare(optimizer)

    def _find_snapshot(self) -> Snapshot | None:
        """Return the newest intact snapshot, which the main process chooses for all."""
        snapshot = self.snapshots.load_newest() if self.accelerator.is_main_process else None
        num_steps = [snapshot.num_steps_done if snapshot is not None else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(num_steps)
        if num_steps[0] is not None and snapshot is None:
            snapshot = self.snapshots.load_step(num_steps[0])
        return snapshot

    @torch.no_grad()
    def _resume_from(self, snapshot: Snapshot, optimizer: torch.optim.Optimizer) -> None:
        tensors = snapshot.tensors
        self.num_steps_done = snapshot.num_steps_done
        self.bad_steps.load_state_dict(snapshot.state["bad_steps"])
        if self.bad_steps.num_taken:
            for name, parameter in self.backbone.named_parameters():
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.bad_steps.num_taken), device=self.device),
                    "exp_avg": distribute_like(parameter, tensors[f"exp_avg.{name}"]),
                    "exp_avg_sq": distribute_like(parameter, tensors[f"exp_avg_sq.{name}"]),
                }
        for name, average in self.ema.items():
            average.copy_(distribute_like(average, tensors[f"ema.{name}"]))
        ledger = {name: tensors[f"ledger.{name}"] for name in LEDGER_COLUMNS}
        self.ledger.load_state_dict(ledger, snapshot.state["consumption_digest"])
        if self.accelerator.is_main_process:
            self.metrics.resume_from(snapshot.num_steps_done)

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Move the average towards the weights, in fp32."""
        for average, parameter in zip(self.ema.values(), self.backbone.parameters(), strict=bool(self.ema)):
            average.lerp_(parameter, 1 - ema_decay_at(self.training.ema_decay, step))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Swap the moving average in for the weights within the block."""
        weights = [parameter.detach().clone() for parameter in self.backbone.parameters()]
        self._fill(self.ema.values())
        try:
            yield
        finally:
            reshard(self.backbone)
            self._fill(weights)

    @torch.no_grad()
    def _fill(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.backbone.parameters(), values, strict=True):
            parameter.copy_(value)

    def save(self) -> None:
        """Write a snapshot of full tensors, after the metrics up to it.

        With sharded parameters every process must call this.
        """
        if not self.holds_average:
            return
        if self.accelerator.is_main_process:
            self.metrics.flush()
        tensors = {f"ledger.{name}": tensor for name, tensor in self.ledger.state_dict().items()}
        for name, tensor in self._sharded_tensors():
            gathered = full_tensor(tensor)
            if self.accelerator.is_main_process:
                tensors[name] = gathered.cpu()
        if self.accelerator.is_main_process:
            state = {"consumption_digest": self.ledger.consumption_digest, "bad_steps": self.bad_steps.state_dict()}
            self.snapshots.save(self.num_steps_done, tensors, state)

    def _sharded_tensors(self) -> Iterator[tuple[str, Tensor]]:
        state = self.optimizer.optimizer.state
        for name, parameter in self.backbone.named_parameters():
            yield f"model.{name}", parameter
            yield f"ema.{name}", self.ema[name]
            if self.bad_steps.num_taken:
                yield f"exp_avg.{name}", state[parameter]["exp_avg"]
                yield f"exp_avg_sq.{name}", state[parameter]["exp_avg_sq"]

    def averaged(self) -> dict[str, Tensor]:
        """Return the full moving average on the CPU; with sharded parameters every process must call this."""
        return {name: full_tensor(average).cpu() for name, average in self.ema.items()}
