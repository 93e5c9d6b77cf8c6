"""Cost model of `images`: the slowest of network, connections and decoders."""

from pipelines.core.quantity import Quantity, largest, smallest
from pipelines.download.config import ImagesConfig
from pipelines.runner.cost import CostInputs, StageEstimate, Workload

_MEGABITS_PER_BYTE = 8 / 1e6


def images_cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    """Return the estimate of `images`."""
    config, assumed, rows = inputs.setting("images", ImagesConfig), inputs.assumed, workload.rows
    answered = rows * (1 - assumed("dead_link_share"))
    requests = rows * (1 + assumed("retry_share")) if config.fetch.retries else rows
    received = answered * assumed("mean_image_bytes")
    fetched = rows * _fetched_share(inputs)
    cores, connections = assumed("cores_per_node"), inputs.from_profile("images.fetch.total_connections")
    if config.workers.ray_address is None:
        cores = smallest(inputs.from_profile("images.decode_workers"), cores)
    else:  # one process for each shard, as many as a node has room for
        connections = connections * (cores / inputs.from_profile("images.workers.cpus_per_unit"))
    times = {
        "network": received * _MEGABITS_PER_BYTE / assumed("network_mbit"),
        "connections": requests * assumed("request_seconds") / connections,
        "decoding": answered / (assumed("decode_images_per_second") * cores),
    }
    limit = max(times, key=lambda name: times[name].value)
    measured_rate = assumed("fetch_rows_per_second")
    seconds = rows / measured_rate if measured_rate.is_known else largest(*times.values())
    return StageEstimate(
        stage=workload.stage,
        rows_in=rows,
        rows_out=fetched,
        bytes_in=received,
        bytes_out=fetched * image_row_bytes(inputs) + rows * assumed("row_bytes"),
        requests=requests,
        seconds=seconds / workload.num_runs,
        nodes=workload.num_runs,
        limit="as measured" if measured_rate.is_known else limit,
    )


def image_row_bytes(inputs: CostInputs) -> Quantity:
    """Return the bytes of an image with its row of metadata."""
    size_px = inputs.from_profile("images.transform.size_px")
    jpeg = size_px * size_px * inputs.assumed("jpeg_bytes_per_px")
    return inputs.derived("image_row_bytes", jpeg + inputs.assumed("subset_row_bytes"))


def _fetched_share(inputs: CostInputs) -> Quantity:
    alive, usable = 1 - inputs.assumed("dead_link_share"), 1 - inputs.assumed("bad_image_share")
    return inputs.derived("fetched_share", alive * usable)
