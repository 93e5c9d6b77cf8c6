"""The estimate of a run before anything runs: rows flow through the graph, and each stage's own cost model is asked.

docs/estimate.md lists the stages without a cost model, and the reasons.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from features.cost import text_bytes
from orchestration.cost.advice import notes_for
from orchestration.cost.assumptions import reasons
from orchestration.cost.inputs import ProfileInputs
from orchestration.cost.types import RunEstimate, TextEstimate
from orchestration.graph.graph import Graph, Group, Node, PartitionKind
from orchestration.graph.nodes import GRAPH
from pipelines.core.quantity import UNKNOWN, Quantity
from pipelines.laion.cost import filtering
from pipelines.runner.cost import StageEstimate, Workload
from training.cost.checkpoint import encode_seconds, samples_seen, stores_text, training_memory, training_samples

_FILTERING_NODES = (1, 2, 4, 8, 16)


def estimated_stages(graph: Graph = GRAPH) -> list[str]:
    """Return the stages that have a cost model, in the order of the graph."""
    return [name for name, node in graph.nodes.items() if node.stage.cost is not None]


def estimate(inputs: ProfileInputs, shown: Sequence[str] | None = None, graph: Graph = GRAPH) -> RunEstimate:
    """Return the estimate of a profile with the stages `shown`, or all; rows flow through every stage either way."""
    flow = _RowFlow(inputs, graph)
    stages = [stage for stage in flow.stages() if shown is None or stage.stage in shown]
    samples = flow.rows_into(Group.TRAINING)
    result = RunEstimate(
        profile=inputs.profile.name,
        rows=inputs.metadata_rows,
        parts=inputs.num_parts,
        samples=samples,
        epochs=samples_seen(inputs) / training_samples(inputs, samples),
        stages=tuple(stages),
        filtering=tuple(filtering(inputs, nodes) for nodes in _FILTERING_NODES),
        text=_text(inputs, samples),
        training_memory_bytes=training_memory(inputs),
    )
    return replace(result, notes=tuple(notes_for(inputs, result)))


def _text(inputs: ProfileInputs, samples: Quantity) -> TextEstimate:
    sample_bytes = text_bytes(inputs)
    return TextEstimate(
        is_stored=stores_text(inputs),
        sample_bytes=sample_bytes,
        stored_bytes=samples * sample_bytes,
        encode_seconds=encode_seconds(inputs),
    )


class _RowFlow:
    """Feeds each stage the rows of its nearest input, the one that comes last in the graph.

    The first stage reads the metadata. A stage without a cost model passes its rows on.
    """

    def __init__(self, inputs: ProfileInputs, graph: Graph) -> None:
        self._inputs, self._graph = inputs, graph
        self._in_profile = graph.enabled(inputs.profile)
        self._rows_in: dict[str, Quantity] = {}
        self._rows_out: dict[str, Quantity] = {}

    def stages(self) -> Iterator[StageEstimate]:
        """Yield the estimate of each stage with a cost model; a stage partitioned by strategy has one for each."""
        for node in self._graph.nodes.values():
            rows = self._rows_in[node.name] = self._rows_out[node.name] = self._rows_into(node)
            for estimated in self._estimates(node, rows):
                self._rows_out[node.name] = estimated.rows_out
                yield estimated

    def rows_into(self, group: Group) -> Quantity:
        """Return the rows that reach the first stage of a group, once `stages` is exhausted."""
        members = (node.name for node in self._graph.nodes.values() if node.group is group)
        return next((self._rows_in[name] for name in members), UNKNOWN)

    def _rows_into(self, node: Node) -> Quantity:
        upstream = {item.asset for item in self._in_profile.nodes.get(node.name, node).inputs}
        nearest = next((name for name in reversed(self._rows_out) if name in upstream), None)
        return self._inputs.metadata_rows if nearest is None else self._rows_out[nearest]

    def _estimates(self, node: Node, rows: Quantity) -> Iterator[StageEstimate]:
        cost = node.stage.cost
        if cost is None:
            return
        by_strategy = node.partition is PartitionKind.STRATEGY
        partitions: list[str | None] = [*self._inputs.facts.parameters] if by_strategy else [None]
        num_runs = self._inputs.num_runs(node)
        for partition in partitions:
            yield cost(self._inputs, Workload(stage=node.name, partition=partition, rows=rows, num_runs=num_runs))


def estimate_json(result: RunEstimate, inputs: ProfileInputs) -> dict[str, Any]:
    """Return the estimate as JSON: every quantity with basis and sources, then the assumptions and measurements."""

    def plain(value: Any) -> Any:
        if isinstance(value, Quantity):
            return value.as_json()
        if is_dataclass(value):
            return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    why = reasons()
    stages = [plain(stage) | {"name": stage.name, "gpu_seconds": plain(stage.gpu_seconds)} for stage in result.stages]
    return plain(result) | {
        "stages": stages,
        "totals": {name: plain(quantity) for name, quantity in result.totals().items()},
        "not_in_totals": result.unknown(),
        "assumptions": {
            name: {"value": value, "set": name in inputs.chosen, "reason": why[name]}
            for name, value in inputs.assumptions.model_dump().items()
        },
        "measured": {name: plain(item) for name, item in sorted(inputs.measured.items())},
    }
