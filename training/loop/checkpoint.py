"""The stage `checkpoint`: one strategy trained on the dataset, by one process or by many under `accelerate launch`.

With several processes the first one runs the stage: it holds the lock and writes files, journal and manifest. The
others follow: they wait for its message whether to train, and then run the same loop.
"""

import io
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.errors import ThroughlineError
from pipelines.core.progress import Progress
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.request import StageRequest
from pipelines.runner.rows import RowTable
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun
from training.config import CheckpointConfig
from training.cost.checkpoint import checkpoint_cost
from training.loop.checks import CHECKPOINT_CHECKS
from training.models.saved_model import (
    CONDITIONING_NAME,
    MODEL_CONFIG_NAME,
    ConditioningRecord,
    write_conditioning,
)

if TYPE_CHECKING:
    from training.data.feature_source import FeatureSource
    from training.loop.loop import Trained

_UNIT = "model"
_MAX_SKIPPED_LISTED = 100
"""Skipped steps that the manifest lists; metrics.jsonl has them all."""
_FOLLOWERS_WAIT_SECONDS = 7 * 24 * 3600
"""How long a follower waits for the first process, which may wait for another run of the same output."""


class _TrainingFailedError(ThroughlineError):
    """Training stopped with the same error on every process, so no follower waits for a message."""


def produce(run: StageRun[CheckpointConfig]) -> StageResult:
    """Train, then write weights, configuration, ledger and metrics."""
    measurements: dict[str, Any] = {}
    if not run.is_finished(_UNIT):
        _tell_followers({"do": "train", "scratch": str(run.scratch)})
        try:
            measurements = _train_and_write(run)
        except ThroughlineError as error:
            raise _TrainingFailedError(str(error)) from error
    notes = next(unit.notes for unit in run.finished_units() if unit.name == _UNIT)
    return StageResult(summary=notes, measurements=measurements, seeds={"training": run.config.training.seed})


def _train(
    config: CheckpointConfig, inputs: Inputs, scratch: Path, progress: Any, logs: Path | None = None
) -> "tuple[Trained | None, FeatureSource]":
    import torch

    from training.data.feature_source import FeatureSource
    from training.loop.loop import train
    from training.models.build import build_model
    from training.models.saved_model import connect_text_encoder

    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    try:
        model = build_model(config.model, config.strategy, seed=config.training.seed)
        connect_text_encoder(model, config.text_encoder)
    except ValueError as error:
        raise ThroughlineError(str(error)) from error
    source = FeatureSource(config, inputs, model.prepare_text)
    return train(config, model, source, scratch, progress, logs), source


def _train_and_write(run: StageRun[CheckpointConfig]) -> dict[str, Any]:
    config = run.config

    def progress(total: int, noun: str, initial: int) -> Progress:
        return run.progress(total, noun, initial=initial)

    trained, source = _train(config, run.inputs, run.scratch, progress, run.logs)
    assert trained is not None, "the process that owns the stage is the main one"
    latents = source.latents["train"]
    conditioning = ConditioningRecord(
        strategy=config.strategy,
        text_encoder_id=config.text_encoder.id,
        text_encoder_revision=config.text_encoder.revision,
        template_version=config.template_version,
        prompt_drop_form=config.training.prompt_drop_form,
        autoencoder_id=latents.metadata.get("autoencoder_id", ""),
        autoencoder_revision=latents.metadata.get("autoencoder_revision", ""),
        autoencoder_subfolder=run.inputs["latents"][0].manifest.config.get("subfolder"),
        scaling_factor=latents.scaling_factor,
        shift_factor=latents.shift_factor,
    )
    _write(run, trained, conditioning, source)
    return trained.measurements


def _write(
    run: StageRun[CheckpointConfig], trained: "Trained", conditioning: ConditioningRecord, source: "FeatureSource"
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from training.loop.metrics_file import METRICS_NAME
    from training.models.weight_files import write_weights

    ledger, skipped = trained.ledger, trained.bad_steps.skipped
    seen = [index for index, count in enumerate(ledger.times_seen) if count]
    table = pa.table(
        {
            "sample_key": pa.array([source.splits["train"].key(index) for index in seen], pa.string()),
            "first_step": pa.array(ledger.first_step[seen], pa.int64()),
            "times_seen": pa.array(ledger.times_seen[seen], pa.int64()),
        }
    )
    with run.unit(_UNIT) as unit:
        write_weights(unit, trained.weights, run.config.training.max_shard_bytes)
        unit.write(MODEL_CONFIG_NAME, run.config.model.model_dump_json(indent=1).encode() + b"\n")
        unit.write(CONDITIONING_NAME, write_conditioning(conditioning))
        with (
            trained.metrics.path.open("rb") as rows,
            unit.open(METRICS_NAME, num_rows=trained.metrics.num_rows) as stream,
        ):
            shutil.copyfileobj(rows, stream)
        with unit.open("ledger.parquet", num_rows=table.num_rows) as stream:
            pq.write_table(table, stream)
        unit.notes.update(
            {
                "strategy": run.config.strategy.value,
                "consumption_digest": ledger.consumption_digest,
                "num_samples_seen": ledger.num_samples_seen,
                "num_distinct_samples": len(seen),
                # Stored text features were truncated when encoded; their own manifests count that.
                "num_truncated_captions": ledger.num_truncated if source.encodes_captions else None,
                "num_parameters": sum(tensor.numel() for tensor in trained.weights.values()),
                "steps": run.config.training.steps,
                **trained.metrics.losses,
                "num_skipped_steps": len(skipped),
                "skipped_steps": skipped[:_MAX_SKIPPED_LISTED],
            }
        )


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _join_processes() -> None:
    """Start the process group once, with a timeout that outlasts other runs of the same output."""
    from datetime import timedelta

    from accelerate import PartialState

    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    PartialState(cpu=use_cpu, timeout=timedelta(seconds=_FOLLOWERS_WAIT_SECONDS))


def _tell_followers(message: dict[str, Any]) -> None:
    """Send a message from the first process to its followers, if any."""
    if _num_processes() > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list([message])


def _receive_message() -> dict[str, Any]:
    from accelerate.utils import broadcast_object_list

    messages: list[Any] = [None]
    broadcast_object_list(messages)
    return messages[0]


@dataclass(frozen=True, kw_only=True)
class CheckpointStage(Stage[CheckpointConfig]):
    """A stage that several processes may run together."""

    def run_request(self, request: StageRequest) -> StageOutput:
        """Run on the first process like any stage; follow it on the others. Returns the same output on all."""
        if _num_processes() == 1:
            return super().run_request(request)
        _join_processes()
        if not _is_first_process():
            return self._follow(request)
        try:
            output = super().run_request(request)
        except _TrainingFailedError:
            raise
        except ThroughlineError:
            _tell_followers({"do": "stop"})
            raise
        _tell_followers({"do": "finish", "manifest": str(output.manifest_path)})
        return output

    def _follow(self, request: StageRequest) -> StageOutput:
        message = _receive_message()
        if message["do"] == "train":
            config = CheckpointConfig.model_validate(request.config)
            inputs = {name: [StageOutput.load(Path(path)) for path in paths] for name, paths in request.inputs.items()}
            _train(config, inputs, Path(message["scratch"]), progress=None)
            message = _receive_message()
        if message["do"] == "stop":
            raise ThroughlineError(f"{self.name}: the first process stopped")
        return StageOutput.load(Path(message["manifest"]))

    def run_requests(self, paths: Sequence[Path]) -> None:
        if _is_first_process():
            super().run_requests(paths)
            return
        with redirect_stdout(io.StringIO()):  # the first process names the manifests
            super().run_requests(paths)


STAGE = CheckpointStage(
    name="checkpoint",
    code_version="4",
    config_type=CheckpointConfig,
    produce=produce,
    description="A diffusion transformer trained with one fusion strategy, and the ledger of what it consumed.",
    rows=RowTable("ledger", ("first_step", "times_seen")),
    checks=CHECKPOINT_CHECKS,
    preview=None,
    funnel_label=None,
    cost=checkpoint_cost,
)
