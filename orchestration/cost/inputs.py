"""The inputs of an estimate: the profile, this machine's measurements, and the assumptions."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from orchestration.cost.assumptions import Assumptions
from orchestration.graph.graph import Node, PartitionKind
from orchestration.profiles.profile import Profile
from pipelines.core.config import ModelRef
from pipelines.core.quantity import UNKNOWN, Basis, Quantity, Source, smallest
from pipelines.runner.cost import Facts
from training.cost.flops import KNOWN_TEXT_ENCODERS
from training.cost.step_cost import peak_flops_by_name

T = TypeVar("T")
_SIZE_IN_NAME = re.compile(r"(?<![\w.])A?(\d+(?:\.\d+)?)([BM])(?![\w.])", re.I)
_SIZE_UNITS = {"B": 1e9, "M": 1e6}


@dataclass(frozen=True)
class Measured:
    """A measurement that replaces the assumption of the same name."""

    value: float
    what: str
    """The files or outputs it comes from."""


@dataclass(frozen=True)
class ProfileInputs:
    """All inputs of one estimate; implements `pipelines.runner.cost.CostInputs`."""

    profile: Profile
    assumptions: Assumptions
    chosen: frozenset[str] = frozenset()
    """Assumptions that the user set: they override measurements."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)

    @property
    def metadata_rows(self) -> Quantity:
        is_known = "rows" in self.chosen or "rows" in self.measured
        if self.profile.world is not None and not is_known:
            return self.from_profile("world.num_images")
        return self.assumed("rows")

    @property
    def num_parts(self) -> Quantity:
        return (self.metadata_rows / self.assumed("part_rows")).rounded_up()

    def assumed(self, name: str) -> Quantity:
        """Return what the user set, else what was measured, else the built-in assumption; unknown where that is
        None."""
        if name not in self.chosen and name in self.measured:
            return Quantity(self.measured[name].value, frozenset({Source(Basis.MEASURED, name)}))
        value = getattr(self.assumptions, name)
        return UNKNOWN if value is None else Quantity(float(value), frozenset({Source(Basis.ASSUMED, name)}))

    def is_chosen(self, name: str) -> bool:
        """Return whether the user set this assumption."""
        return name in self.chosen

    def derived(self, name: str, otherwise: Quantity) -> Quantity:
        """Return `assumed(name)` where it is known, else `otherwise`."""
        found = self.assumed(name)
        return found if found.is_known else otherwise

    def from_profile(self, path: str) -> Quantity:
        """Return a number of the profile, by its dotted path as ``--set`` takes it."""
        value = self._field(path)
        assert isinstance(value, (int, float)), path
        return self.implied(float(value), path)

    def implied(self, value: float, path: str) -> Quantity:
        """Return a number that follows from a field of the profile."""
        return Quantity(value, frozenset({Source(Basis.PROFILE, path)}))

    def setting(self, path: str, kind: type[T]) -> T:
        """Return a field of the profile that is no number; `kind` is its type."""
        value = self._field(path)
        assert isinstance(value, kind), f"{path}: {type(value).__name__} instead of {kind.__name__}"
        return value

    def optional_setting(self, path: str, kind: type[T]) -> T | None:
        """Return a field of the profile that may be None."""
        return None if self._field(path) is None else self.setting(path, kind)

    def _field(self, path: str) -> object:
        value: object = self.profile
        for name in path.split("."):
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        return value

    def num_runs(self, node: Node) -> Quantity:
        """Return the concurrent runs of a stage."""
        per_run = self.implied(self.profile.partitions_per_run(node.name), f"batches.{node.name}")
        return smallest(self.assumed("parallel_runs"), (self._num_partitions(node.partition) / per_run).rounded_up())

    def _num_partitions(self, kind: PartitionKind) -> Quantity:
        if kind is PartitionKind.PART:
            return self.num_parts
        if kind is PartitionKind.ARM_BENCHMARK:
            return self.implied(len(self.profile.arms), "arms") * len(self.profile.benchmarks)
        if kind is PartitionKind.STRATEGY:
            return self.implied(len(self.profile.strategies), "strategies")
        return Quantity(1.0)

    def nodes_for(self, gpus: Quantity) -> Quantity:
        """Return the machines that hold so many GPUs; one for zero GPUs."""
        if not gpus.is_known or gpus.value == 0:
            return Quantity(1.0, gpus.sources)
        is_stated = self.profile.needs.num_gpus > 0
        per_node = self.from_profile("needs.num_gpus") if is_stated else self.assumed("gpus_per_node")
        return (gpus / per_node).rounded_up()

    def flops_per_second(self, on_gpu: bool, utilisation: str) -> Quantity:
        """Return the operations a second of one GPU at an assumed share of its peak, or of one CPU process."""
        if not on_gpu:
            return self.assumed("cpu_flops")
        return self._peak_flops() * self.assumed(utilisation)

    def _peak_flops(self) -> Quantity:
        found = self.assumed("gpu_flops")
        if found.is_known:
            return found
        peak = peak_flops_by_name(self.assumptions.gpu)
        assert peak is not None, "the assumptions are checked"
        return Quantity(peak, frozenset({Source(Basis.ASSUMED, "gpu")}))

    def active_parameters(self, model: ModelRef) -> Quantity:
        """Return the parameters that a token passes, from a local model's files or from the model's name."""
        if model.id in self.facts.local_parameters:
            return self.implied(self.facts.local_parameters[model.id], f"model {model.id}")
        sizes = _SIZE_IN_NAME.findall(model.id)
        if not sizes:
            return UNKNOWN
        # A mixture of experts names its whole size first and its active size last: 235B-A22B.
        number, unit = sizes[-1]
        return self.implied(float(number) * _SIZE_UNITS[unit.upper()], f"model {model.id}")

    def encoder_flops_per_token(self) -> Quantity:
        """Return the text encoder's operations for a token."""
        model = self.profile.text_encoder
        shape = KNOWN_TEXT_ENCODERS.get(model.id)
        if shape is not None:
            return self.implied(shape.flops(1), f"model {model.id}")
        return 2 * self.active_parameters(model)
