"""Resolves the graph: the configuration, inputs and finished output of every asset and partition.

A pure function of profile and file system. Starting at the index, each task's configuration and the outputs of its
inputs give its fingerprint, and the fingerprint leads to its output if there is one. No run history is read, so
deleting Dagster's storage loses nothing, and the graph, the command line and the audit never disagree.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from orchestration.graph.graph import (
    Coverage,
    Graph,
    Node,
    PartitionKind,
    arm_benchmark,
    coverage,
    split_arm_benchmark,
    strategy_of_arm,
)
from orchestration.profiles.profile import Profile
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import EARLIER, MANIFEST_NAME
from pipelines.laion.index import part_names
from pipelines.runner.outputs import StageOutput, sound_outputs
from pipelines.runner.request import StageRequest
from pipelines.storage.mirror import store_of, sync_manifests

INDEX = "laion_index"
_ABSENCE_SECONDS = 2.0
"""How long an object store's answer "not finished" is reused: an unfinished task is looked up once per descendant."""


class State(StrEnum):
    """Whether a task has an output."""

    FINISHED = "finished"
    STALE = "stale"
    """Only of other inputs, configuration or code."""
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One partition of an asset with everything that determines its result."""

    node: Node
    partition: str | None
    config: FrozenConfig | None
    inputs: Mapping[str, Sequence[StageOutput]] | None
    output: StageOutput | None
    blocked_by: tuple[str, ...] = ()
    """Why it can't start: unfinished inputs, or what is wrong with its configuration."""

    @property
    def label(self) -> str:
        return label_of(self.node.name, self.partition)

    @property
    def is_ready(self) -> bool:
        """Whether configuration and all inputs are available."""
        return self.inputs is not None and self.config is not None

    def request(self, output_root: Path, verify: str = "size", lock_wait_seconds: float | None = None) -> StageRequest:
        """Return the request for a stage's process; raises ThroughlineError while inputs are missing."""
        if self.inputs is None or self.config is None:
            raise ThroughlineError(f"{self.label} can't start: {'; '.join(self.blocked_by[:3])}")
        return StageRequest(
            stage=self.node.name,
            partition=self.partition,
            config=self.config.model_dump(mode="json"),
            inputs={name: [str(item.address) for item in items] for name, items in self.inputs.items()},
            output_root=str(output_root),
            store=None if (store := store_of(output_root)) is None else store.config,
            verify="digest" if verify == "digest" else "size",
            lock_wait_seconds=lock_wait_seconds,
        )


def label_of(asset: str, partition: str | None) -> str:
    """Return a task's name in messages."""
    return f"{asset} {partition}" if partition else asset


class Plan:
    """The graph under one profile over one output root."""

    def __init__(self, graph: Graph, profile: Profile, output_root: Path) -> None:
        self.graph = graph.enabled(profile)
        self.profile = profile
        self.output_root = output_root
        self._finished: dict[tuple[str, str | None], Task] = {}
        self._known_files: Mapping[str, StageOutput | None] | None = None
        self._listed: set[str] = set()
        store = store_of(output_root)
        if store is not None:
            store.absence_seconds = _ABSENCE_SECONDS

    def partitions(self, asset: str) -> tuple[str | None, ...]:
        """Return the partition keys of an asset in order: (None,) if it is unpartitioned, none while the parts are
        unknown because the index is not finished."""
        kind = self.graph[asset].partition
        if kind is PartitionKind.NONE:
            return (None,)
        if kind is PartitionKind.PART:
            return self.parts()
        if kind is PartitionKind.STRATEGY:
            return tuple(self.profile.strategy_names)
        return tuple(
            arm_benchmark(arm, benchmark) for arm in self.profile.arm_names for benchmark in self.profile.benchmarks
        )

    def parts(self) -> tuple[str, ...]:
        """Return the parts that the index lists, or would list if it were computed now."""
        if self._known_files is not None:
            return tuple(sorted(self._known_files))
        task = self.task(INDEX, None)
        if task.output is not None:
            return part_names(task.output)
        if task.node.known_files is None or task.config is None:
            return ()
        # Cached: resolving an unfinished index scans all metadata files.
        self._known_files = task.node.known_files(task.config, self._outputs_of_this_code(task.node))
        return tuple(sorted(self._known_files))

    def task(self, asset: str, partition: str | None = None) -> Task:
        """Return the present task; finished ones are cached, unfinished ones resolved each time."""
        cached = self._finished.get((asset, partition))
        if cached is not None:
            return cached
        task = self._resolve(self.graph[asset], partition)
        if task.output is not None:
            self._finished[asset, partition] = task
        return task

    def tasks(self, asset: str) -> list[Task]:
        """Return the tasks of all partitions of an asset, in order."""
        return [self.task(asset, partition) for partition in self.partitions(asset)]

    def all_tasks(self) -> list[Task]:
        """Return every task, upstream first."""
        return [task for asset in self.graph.nodes for task in self.tasks(asset)]

    def finished_ends(self) -> list[StageOutput]:
        """Return the finished outputs of the graph's leaves: the report, exported pipelines."""
        read = {item.asset for node in self.graph.nodes.values() for item in node.inputs}
        ends = [task.output for asset in self.graph.nodes if asset not in read for task in self.tasks(asset)]
        return [output for output in ends if output is not None]

    def invalidate(self, asset: str, partition: str | None) -> None:
        """Invalidate the cached task and all its descendants."""
        if asset == INDEX:
            self._known_files = None
        names = self.graph.downstream({asset})
        for key in [key for key in self._finished if key[0] in names and (key[0] != asset or key[1] == partition)]:
            del self._finished[key]

    def upstream_partitions(self, node: Node, partition: str | None, asset: str) -> tuple[str | None, ...]:
        """Return the partitions of `asset` that a partition of `node` is made from."""
        rule = coverage(self.graph[asset].partition, node.partition)
        if rule is Coverage.SAME:
            return (partition,)
        if rule is Coverage.STRATEGY_OF_ARM:
            assert partition is not None
            return (strategy_of_arm(split_arm_benchmark(partition)[0]),)
        return self.partitions(asset)

    def state(self, task: Task) -> State:
        """Return the state of a task; for an unfinished one this reads the manifests of all outputs of its stage."""
        if task.output is not None:
            return State.FINISHED
        return State.STALE if self._has_other_output(task) else State.MISSING

    def _resolve(self, node: Node, partition: str | None) -> Task:
        blocked_by: list[str] = []
        inputs: dict[str, list[StageOutput]] = {}
        for item in node.inputs:
            if item.asset == INDEX and item.file is not None and (known := self._known_file(partition)) is not None:
                inputs[item.name] = [known]
                continue
            keys = self.upstream_partitions(node, partition, item.asset)
            tasks = [self.task(item.asset, key) for key in keys]
            if not tasks:
                blocked_by.append(f"the parts of {item.asset} are unknown until {INDEX} is finished")
            blocked_by += [f"{task.label} is not finished" for task in tasks if task.output is None]
            try:
                inputs[item.name] = [item.resolve(task.output, partition) for task in tasks if task.output is not None]
            except ThroughlineError as error:
                blocked_by.append(str(error))
        if blocked_by:
            return Task(
                node=node, partition=partition, config=None, inputs=None, output=None, blocked_by=tuple(blocked_by)
            )
        try:
            config = self.profile.resolved(node.configure(self.profile, partition))
            inputs |= self._incremental_input(node, partition, config, inputs)
        except ThroughlineError as error:
            return Task(node=node, partition=partition, config=None, inputs=None, output=None, blocked_by=(str(error),))
        output = node.stage.find_finished(config, inputs, self.output_root, partition, self.profile.verify)
        return Task(node=node, partition=partition, config=config, inputs=inputs, output=output)

    def _known_file(self, partition: str | None) -> StageOutput | None:
        """Return the file of the index that a part reads, if the index is unfinished and the file already known."""
        if (INDEX, None) in self._finished or not self.parts() or self._known_files is None:
            return None
        return self._known_files.get(partition or "")

    def _outputs_of_this_code(self, node: Node) -> Iterator[StageOutput]:
        """Yield the sound outputs of an asset's present code version, of any inputs and configuration."""
        for output in sound_outputs(self.output_root, node.name):
            if output.manifest.code_version == node.stage.code_version and not output.damaged(read_bytes=False):
                yield output

    def _incremental_input(
        self, node: Node, partition: str | None, config: FrozenConfig, inputs: Mapping[str, list[StageOutput]]
    ) -> dict[str, list[StageOutput]]:
        """Return, as one more input, the asset's own earlier output that a configuration extends, if any.

        Raises ThroughlineError if that is not finished.
        """
        earlier = node.incremental_from(config)
        if earlier is None:
            return {}
        earlier_inputs = {**inputs, **self._incremental_input(node, partition, earlier, inputs)}
        output = node.stage.find_finished(earlier, earlier_inputs, self.output_root, partition, self.profile.verify)
        if output is None:
            raise ThroughlineError(
                f"the output of {label_of(node.name, partition)} that it extends is not finished; run "
                f"{node.name} with one later pass fewer first"
            )
        return {EARLIER: [output]}

    def _has_other_output(self, task: Task) -> bool:
        if task.node.name not in self._listed:
            sync_manifests(self.output_root, task.node.name)
            self._listed.add(task.node.name)
        for path in (self.output_root / task.node.name).glob(f"*/{MANIFEST_NAME}"):
            try:
                if json.loads(path.read_bytes()).get("partition") == task.partition:
                    return True
            except ValueError:
                continue  # `throughline audit` reports altered manifests
        return False
