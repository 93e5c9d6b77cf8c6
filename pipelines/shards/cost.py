"""Cost model of `shards`, and the size of a caption and of a sample in its tar."""

from pipelines.core.quantity import Quantity, smallest
from pipelines.download.cost import image_row_bytes
from pipelines.runner.cost import CostInputs, StageEstimate, Workload


def shards_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `shards`."""
    samples = workload.rows * inputs.assumed("shard_share")
    return StageEstimate(
        stage=workload.stage,
        rows_in=workload.rows,
        rows_out=samples,
        bytes_in=workload.rows * (image_row_bytes(inputs) + caption_bytes(inputs)),
        bytes_out=samples * sample_bytes(inputs),
        seconds=workload.rows / (inputs.assumed("shard_samples_per_second") * workload.num_runs),
        nodes=workload.num_runs,
        limit="one process",
    )


def caption_tokens(inputs: CostInputs) -> Quantity:
    """Return the tokens of a caption, at most as many as the profile allows."""
    limit = inputs.from_profile("captions.max_caption_tokens")
    return smallest(inputs.assumed("caption_tokens"), limit)


def caption_bytes(inputs: CostInputs) -> Quantity:
    """Return the bytes of a caption, one a character."""
    return caption_tokens(inputs) * inputs.assumed("chars_per_token")


def sample_bytes(inputs: CostInputs) -> Quantity:
    """Return the bytes of a sample in its tar."""
    return inputs.derived("shard_sample_bytes", image_row_bytes(inputs) + inputs.assumed("shard_extra_bytes"))
