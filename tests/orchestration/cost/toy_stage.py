"""A stage with a cost model, and its place in the graph."""

from orchestration.graph.graph import Group, Input, Node, PartitionKind
from pipelines.core.config import FrozenConfig
from pipelines.runner.cost import CostInputs, StageEstimate, Workload
from pipelines.runner.units import StageRun
from tests.plain_stage import plain_stage

_ROWS_PER_SECOND = 4


class ToyConfig(FrozenConfig):
    size_px: int = 64


def produce(run: StageRun[ToyConfig]) -> None:
    with run.unit("00000") as unit:
        unit.write("size.txt", str(run.config.size_px).encode())


def cost(inputs: CostInputs, workload: Workload) -> StageEstimate:
    return StageEstimate(
        stage=workload.stage,
        rows_in=workload.rows,
        rows_out=workload.rows,
        bytes_in=workload.rows * inputs.assumed("image_row_bytes"),
        bytes_out=workload.rows * inputs.assumed("row_bytes"),
        seconds=workload.rows / (_ROWS_PER_SECOND * workload.num_runs),
        nodes=workload.num_runs,
        limit="one process",
    )


STAGE = plain_stage(name="thumbnails", code_version="1", config_type=ToyConfig, produce=produce, cost=cost)

NODE = Node(
    name="thumbnails",
    module=__name__,
    group=Group.DATA,
    configure=lambda profile, _: ToyConfig(),
    partition=PartitionKind.PART,
    inputs=(Input(name="shards", asset="shards"),),
)
