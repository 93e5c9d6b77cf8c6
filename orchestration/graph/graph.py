"""The types of the graph: which stage each asset runs, over which partitions, from which inputs.

Dagster's assets, `throughline status`, `run`, `trace` and `audit` all iterate over it. The profile configures a stage;
the stage describes its own outputs.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from orchestration.profiles.profile import Profile
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.runner.stage import Stage
from training.config import Arm


class PartitionKind(StrEnum):
    """How an asset is partitioned."""

    NONE = "none"
    PART = "part"
    STRATEGY = "strategy"
    ARM_BENCHMARK = "arm_benchmark"


class Group(StrEnum):
    """The section of the graph in which an asset is shown."""

    DATA = "data"
    TRAINING = "training"
    EVALUATION = "evaluation"


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input of a stage: the name by which the stage reads it, and the asset it comes from.

    The partitions it covers follow from the two partition kinds, see `coverage`.
    """

    name: str
    asset: str
    is_dagster_dep: bool = True
    """False if another input's data version already covers it (the data set names every shard). Dagster then has no
    edge: with 100 or more upstream partitions it would record the last one's version only."""
    file: str | None = None
    """Name of the one file of an unpartitioned asset that a part reads, with ``{partition}`` in it. The part depends
    on that file alone: it stays fresh when other files of the output change."""
    replaced_by: str | None = None
    """An asset that replaces this input in graphs that have it."""

    def resolve(self, output: StageOutput, partition: str | None) -> StageOutput:
        """Return the part of an upstream output that is read: all of it, or one file.

        Raises ThroughlineError if the output has no such file.
        """
        return output if self.file is None else output.only_file(self.file.format(partition=partition))


@dataclass(frozen=True, kw_only=True)
class Node:
    """One asset: a stage, its place in the graph, and its configuration."""

    name: str
    module: str
    """Module whose STAGE is the stage."""
    group: Group
    configure: Callable[[Profile, str | None], FrozenConfig]
    """Returns the configuration of a partition."""
    partition: PartitionKind = PartitionKind.NONE
    inputs: tuple[Input, ...] = ()
    kinds: frozenset[str] = frozenset()
    known_files: Callable[[Any, Iterable[StageOutput]], Mapping[str, StageOutput | None]] | None = None
    """For the asset that registers the parts: from a configuration and earlier outputs, part -> the file that the part
    reads, as far as it is known before the asset is computed."""
    is_enabled: Callable[[Profile], bool] = lambda profile: True
    """False removes the asset from the graph; stages that would read it get an empty list."""
    incremental_from: Callable[[FrozenConfig], FrozenConfig | None] = lambda config: None
    """The configuration of the asset's own earlier output that a configuration extends; None if it starts from
    scratch."""

    @property
    def stage(self) -> Stage[Any]:
        """The stage, imported from its module; loads no heavy library."""
        stage = importlib.import_module(self.module).STAGE
        assert isinstance(stage, Stage)
        assert stage.name == self.name, f"{self.module}: STAGE is {stage.name!r}, the graph says {self.name!r}"
        return stage


class Graph:
    """Nodes in topological order."""

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self.nodes: Mapping[str, Node] = {node.name: node for node in nodes}
        seen: set[str] = set()
        for node in nodes:
            late = [item.asset for item in node.inputs if item.asset not in seen]
            if late:
                raise ValueError(f"{node.name} reads {', '.join(late)}, which must come before it in the graph")
            seen.add(node.name)
            for item in node.inputs:
                if item.file is not None and self.nodes[item.asset].partition is not PartitionKind.NONE:
                    raise ValueError(f"{node.name} reads one file of {item.asset}, which is partitioned")

    def file_reader(self, asset: str) -> Node | None:
        """Return the node whose partitions read one file each of an asset; None if every reader takes all files."""
        readers = (
            node for node in self.nodes.values() if any(item.asset == asset and item.file for item in node.inputs)
        )
        return next(readers, None)

    def file_input(self, asset: str) -> Input:
        """Return the input through which single files of an asset are read; the asset must have a `file_reader`."""
        reader = self.file_reader(asset)
        assert reader is not None, f"nothing reads single files of {asset}"
        return next(item for item in reader.inputs if item.asset == asset and item.file)

    def __getitem__(self, name: str) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise ThroughlineError(f"no asset {name!r} in the graph; it has: {', '.join(self.nodes)}") from None

    def enabled(self, profile: Profile) -> "Graph":
        """Return the graph without the assets that the profile disables, and without the inputs from them."""
        names = {node.name for node in self.nodes.values() if node.is_enabled(profile)}
        return Graph(tuple(_restrict(node, names) for node in self.nodes.values() if node.name in names))

    def upstream(self, names: set[str]) -> set[str]:
        """Return `names` and their ancestors."""
        found = set(names)
        for node in reversed(list(self.nodes.values())):
            if node.name in found:
                found.update(item.asset for item in node.inputs)
        return found

    def downstream(self, names: set[str]) -> set[str]:
        """Return `names` and their descendants."""
        found = set(names)
        for node in self.nodes.values():
            if any(item.asset in found for item in node.inputs):
                found.add(node.name)
        return found

    def select(self, selection: str) -> list[Node]:
        """Return the nodes of a comma-separated selection: ``name``, ``+name`` (with its ancestors), ``name+`` (with
        its descendants), ``group:evaluation``. Raises ThroughlineError for an unknown name, and for an empty
        selection: an unset shell variable must not select the whole graph."""
        names: set[str] = set()
        words = list(filter(None, (word.strip() for word in selection.split(","))))
        if not words:
            raise ThroughlineError(
                f"selection {selection!r}: expected names of assets, found none; name some, such as images or "
                "group:training, or leave the selection out to take all"
            )
        for word in words:
            if word.startswith("group:"):
                group = word.removeprefix("group:")
                members = {node.name for node in self.nodes.values() if node.group == group}
                if not members:
                    raise ThroughlineError(f"no group {group!r} in the graph; it has: {', '.join(Group)}")
                names |= members
                continue
            name = self[word.strip("+")].name
            names.add(name)
            names |= self.upstream({name}) if word.startswith("+") else set()
            names |= self.downstream({name}) if word.endswith("+") else set()
        return [node for node in self.nodes.values() if node.name in names]


def _restrict(node: Node, names: set[str]) -> Node:
    return replace(
        node, inputs=tuple(item for item in node.inputs if item.asset in names and item.replaced_by not in names)
    )


def arm_benchmark(arm: str, benchmark: str) -> str:
    """Return the partition key of an arm on a benchmark."""
    return f"{arm}|{benchmark}"


def split_arm_benchmark(partition: str) -> tuple[str, str]:
    """Return arm and benchmark of a partition key."""
    arm, _, benchmark = partition.partition("|")
    return arm, benchmark


def strategy_of_arm(arm: str) -> str:
    """Return the strategy whose checkpoint an arm samples from: ``time_wise`` for the arm ``time_wise+shift``."""
    return Arm.parse(arm).strategy.value


class Coverage(StrEnum):
    """The partitions of an upstream asset that one partition of a downstream asset is made from."""

    WHOLE = "whole"
    """The upstream asset is unpartitioned."""
    SAME = "same"
    STRATEGY_OF_ARM = "strategy_of_arm"
    ALL = "all"


def coverage(upstream: PartitionKind, downstream: PartitionKind) -> Coverage:
    """Return the rule between two partition kinds; every edge of the graph follows it."""
    if upstream is PartitionKind.NONE:
        return Coverage.WHOLE
    if upstream is downstream:
        return Coverage.SAME
    if (upstream, downstream) == (PartitionKind.STRATEGY, PartitionKind.ARM_BENCHMARK):
        return Coverage.STRATEGY_OF_ARM
    return Coverage.ALL
