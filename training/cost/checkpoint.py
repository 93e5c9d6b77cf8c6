"""Cost model of `checkpoint`: one strategy's training, and what it keeps in memory and on disk."""

from features.config import TextFeaturesConfig
from features.cost import latent_bytes, text_bytes, text_tokens, texts_per_second
from pipelines.core.quantity import ZERO, Quantity, smallest
from pipelines.runner.cost import CostInputs, StageEstimate, Workload, limit_on
from training.config import ModelConfig, Strategy, TrainingConfig
from training.cost.step_cost import training_flops

_FLOAT32_BYTES = 4
_NUM_SNAPSHOT_COPIES = 4
"""Weights, average and two moments."""
_NUM_MEMORY_COPIES = 5
"""Weights, gradients, two moments and average; the average is on the first process only."""


def checkpoint_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of training the strategy `workload.partition`."""
    assert workload.partition is not None, "checkpoints are estimated by strategy"
    on_gpu, is_stored = _on_gpu(inputs), stores_text(inputs)
    gpus = _num_processes(inputs) if on_gpu else ZERO
    seen = samples_seen(inputs)
    weights = inputs.implied(_FLOAT32_BYTES * inputs.facts.parameters[workload.partition], "model")
    flops = _step_flops(inputs, Strategy(workload.partition)) * inputs.from_profile("training.steps")
    seconds = flops / (_flops_per_second(inputs) * _num_processes(inputs))
    return StageEstimate(
        stage=workload.stage,
        partition=workload.partition,
        rows_in=smallest(training_samples(inputs, workload.rows), seen),
        rows_out=seen,
        bytes_in=seen * (latent_bytes(inputs) + (text_bytes(inputs) if is_stored else ZERO)),
        bytes_out=weights,
        seconds=seconds + encode_seconds(inputs),
        nodes=inputs.nodes_for(gpus),
        gpus=gpus,
        scratch_bytes=_NUM_SNAPSHOT_COPIES * weights * _num_snapshots(inputs),
        limit=limit_on("steps", gpus.value > 0),
    )


def stores_text(inputs: CostInputs) -> bool:
    """Return whether training reads stored text features."""
    return inputs.optional_setting("text_features", TextFeaturesConfig) is not None


def encode_seconds(inputs: CostInputs) -> Quantity:
    """Return the time that each strategy's training spends in the text encoder: zero with stored text features.

    Every caption drawn is encoded: `text_memory_bytes` caches little of a set for which this matters.
    """
    if stores_text(inputs):
        return inputs.implied(0, "text_features")
    return samples_seen(inputs) / (texts_per_second(inputs, _on_gpu(inputs)) * _num_processes(inputs))


def samples_seen(inputs: CostInputs) -> Quantity:
    """Return the samples that all steps of a training consume."""
    return inputs.from_profile("training.steps") * inputs.from_profile("training.batch_size")


def training_samples(inputs: CostInputs, samples: Quantity) -> Quantity:
    """Return the samples of a data set that are not held out."""
    return samples * (1 - inputs.from_profile("dataset.validation_share"))


def training_memory(inputs: CostInputs) -> Quantity:
    """Return the bytes of one process's weights, gradients, optimizer state and average, without activations."""
    parameters = max(inputs.facts.parameters.values(), default=0)
    unsharded = inputs.implied(_NUM_MEMORY_COPIES * _FLOAT32_BYTES * parameters, "model")
    is_sharded = inputs.setting("training", TrainingConfig).sharded
    return unsharded / _num_processes(inputs) if is_sharded else unsharded


def _on_gpu(inputs: CostInputs) -> bool:
    return inputs.setting("training", TrainingConfig).device == "cuda"


def _num_processes(inputs: CostInputs) -> Quantity:
    configured = inputs.from_profile("training.num_processes")
    return inputs.derived("gpus", configured) if _on_gpu(inputs) else configured


def _step_flops(inputs: CostInputs, strategy: Strategy) -> Quantity:
    """Return the operations of one optimizer step."""
    count = training_flops(inputs.setting("model", ModelConfig), strategy)
    fixed = inputs.implied(count.fixed, "model")
    per_token = inputs.implied(count.per_text_token, "model")
    flops = inputs.from_profile("training.batch_size") * (fixed + per_token * text_tokens(inputs))
    if inputs.setting("training", TrainingConfig).checkpoint_activations:
        flops = flops * inputs.implied(4 / 3, "training.checkpoint_activations")
    return flops


def _flops_per_second(inputs: CostInputs) -> Quantity:
    """Return the operations a second of one training process."""
    return inputs.derived("training_flops_per_second", inputs.flops_per_second(_on_gpu(inputs), "mfu"))


def _num_snapshots(inputs: CostInputs) -> Quantity:
    """Return the most snapshots on disk at a time: those kept, and the one being written."""
    newest = inputs.from_profile("training.keep_checkpoints") + 1
    if inputs.setting("training", TrainingConfig).keep_every is None:
        return newest
    return newest + inputs.from_profile("training.steps") / inputs.from_profile("training.keep_every")
