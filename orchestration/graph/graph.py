"""What the graph consists of: which stage each asset runs, over which partitions, from which inputs.

Dagster's assets, `throughline status`, `run` and `audit` are all made from this one table. How a stage is configured
is the profile's business; what it does is the stage's own.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.runner.stage import Stage
from training.config import Arm

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile

PART_PARTITIONS = "part"
"""Name of Dagster's dynamic partitions, one per LAION metadata file; the index registers them."""
STAGE_TAG, FILE_TAG = "throughline/stage", "throughline/file"
"""Tags of a materialization that stands for one file of a stage's output."""


class PartitionKind(StrEnum):
    """By what an asset is divided."""

    NONE = "none"
    PART = "part"
    STRATEGY = "strategy"
    ARM_BENCHMARK = "arm_benchmark"


class Group(StrEnum):
    """The section of the graph an asset is shown in."""

    DATA = "data"
    TRAINING = "training"
    EVALUATION = "evaluation"


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input of a stage: under which name the stage asks for it, and which asset it comes from.

    Which partitions it covers follows from the two partition sets: see `upstream_partitions`.
    """

    name: str
    asset: str
    drawn: bool = True
    """False where another input's data version already covers it (the data set names every shard). Dagster then has no
    edge: past 99 upstream partitions it would record the last one's version only."""
    file: str | None = None
    """Name of the one file that a part reads of an undivided asset, with ``{partition}`` in it. The part depends on
    that file alone: whatever else changes in the asset's output, it stays fresh."""
    unless: str | None = None
    """An asset that takes this input's place in the graphs that have it."""

    def of(self, output: StageOutput, partition: str | None) -> StageOutput:
        """Return what is read of an upstream output: the whole, or one file.

        Raises ThroughlineError where the output has no such file.
        """
        return output if self.file is None else output.only_file(self.file.format(partition=partition))


@dataclass(frozen=True, kw_only=True)
class Node:
    """One asset: a stage, its place in the graph, and how the profile configures it."""

    name: str
    module: str
    """Module that is run as ``python -m`` and whose STAGE is the stage."""
    group: Group
    description: str
    configure: "Callable[[Profile, str | None], FrozenConfig]"
    partition: PartitionKind = PartitionKind.NONE
    inputs: tuple[Input, ...] = ()
    kinds: frozenset[str] = frozenset()
    known_files: "Callable[[Any, Iterable[StageOutput]], Mapping[str, StageOutput | None]] | None" = None
    """For the asset that registers the parts: from a configuration and earlier outputs, part -> the file that the part
    reads, as far as it is known before the asset is computed."""
    is_wanted: "Callable[[Profile], bool]" = lambda profile: True
    """False takes the asset out of the graph; stages that would read it get an empty list."""
    earlier: "Callable[[FrozenConfig], FrozenConfig | None]" = lambda config: None
    """The configuration of the asset's own output that a configuration starts from, or None where it starts anew."""

    @property
    def stage(self) -> Stage[Any]:
        """The stage; importing its module loads no heavy library."""
        stage = importlib.import_module(self.module).STAGE
        assert isinstance(stage, Stage)
        assert stage.name == self.name, f"{self.module}: STAGE is {stage.name!r}, the graph says {self.name!r}"
        return stage


class Graph:
    """Nodes in an order in which every input comes before what reads it."""

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self.nodes: Mapping[str, Node] = {node.name: node for node in nodes}
        seen: set[str] = set()
        for node in nodes:
            late = [item.asset for item in node.inputs if item.asset not in seen]
            if late:
                raise ValueError(f"{node.name} reads {', '.join(late)}, which must stand before it in the graph")
            seen.add(node.name)
            for item in node.inputs:
                if item.file is not None and self.nodes[item.asset].partition is not PartitionKind.NONE:
                    raise ValueError(f"{node.name} reads one file of {item.asset}, which is divided")

    def file_reader(self, asset: str) -> Node | None:
        """Return the node whose partitions read one file each of an asset; None where all read it whole."""
        readers = (
            node for node in self.nodes.values() if any(item.asset == asset and item.file for item in node.inputs)
        )
        return next(readers, None)

    def file_input(self, asset: str) -> Input:
        """Return how single files of an asset are read, where there is a `file_reader`."""
        reader = self.file_reader(asset)
        assert reader is not None, f"nothing reads single files of {asset}"
        return next(item for item in reader.inputs if item.asset == asset and item.file)

    def __getitem__(self, name: str) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise ThroughlineError(f"no asset {name!r} in the graph; it has: {', '.join(self.nodes)}") from None

    def wanted(self, profile: "Profile") -> "Graph":
        """Return the graph without the assets that the profile leaves out, and without the inputs they would be."""
        names = {node.name for node in self.nodes.values() if node.is_wanted(profile)}
        return Graph(tuple(_restrict(node, names) for node in self.nodes.values() if node.name in names))

    def upstream(self, names: set[str]) -> set[str]:
        """Return `names` and every asset that they are made from."""
        wanted = set(names)
        for node in reversed(list(self.nodes.values())):
            if node.name in wanted:
                wanted.update(item.asset for item in node.inputs)
        return wanted

    def downstream(self, names: set[str]) -> set[str]:
        """Return `names` and every asset that is made from them."""
        wanted = set(names)
        for node in self.nodes.values():
            if any(item.asset in wanted for item in node.inputs):
                wanted.add(node.name)
        return wanted

    def select(self, selection: str) -> list[Node]:
        """Return the nodes of a comma-separated selection: ``name``, ``+name`` (and what it needs), ``name+`` (and
        what needs it), ``group:evaluation``. Raises ThroughlineError for a name the graph does not have, and for a
        selection without any: an unset shell variable must not mean the whole graph."""
        names: set[str] = set()
        words = list(filter(None, (word.strip() for word in selection.split(","))))
        if not words:
            raise ThroughlineError(
                f"selection {selection!r}: expected names of assets, found none; name some, such as images or "
                "group:training, or leave the selection out to take them all"
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
    return replace(node, inputs=tuple(item for item in node.inputs if item.asset in names and item.unless not in names))


def arm_benchmark(arm: str, benchmark: str) -> str:
    """Return the partition key of an arm on a benchmark."""
    return f"{arm}|{benchmark}"


def split_arm_benchmark(partition: str) -> tuple[str, str]:
    """Return arm and benchmark of a partition key."""
    arm, _, benchmark = partition.partition("|")
    return arm, benchmark


def strategy_of_arm(arm: str) -> str:
    """Return the strategy whose checkpoint an arm is sampled from: ``time_wise+shift`` is an arm of ``time_wise``."""
    return Arm.parse(arm).strategy.value


class Coverage(StrEnum):
    """Which partitions of an upstream asset one partition of a downstream asset is made from."""

    WHOLE = "whole"
    """The upstream asset is not divided."""
    SAME = "same"
    STRATEGY_OF_ARM = "strategy_of_arm"
    ALL = "all"


def coverage(upstream: PartitionKind, downstream: PartitionKind) -> Coverage:
    """Return the rule between two partition sets; every edge of the graph follows it."""
    if upstream is PartitionKind.NONE:
        return Coverage.WHOLE
    if upstream is downstream:
        return Coverage.SAME
    if (upstream, downstream) == (PartitionKind.STRATEGY, PartitionKind.ARM_BENCHMARK):
        return Coverage.STRATEGY_OF_ARM
    return Coverage.ALL
