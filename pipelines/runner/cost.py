"""The interface between a stage's cost model and the estimate of a whole run.

A cost model is a pure function next to the stage's code, referenced by `Stage.cost`. It maps the inputs of the estimate
and the stage's workload to a `StageEstimate`. `orchestration.cost` provides both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from pipelines.core.config import ModelRef
from pipelines.core.quantity import ZERO, Quantity

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """Rows, bytes, requests, time and hardware of one stage. Bytes are on disk; `seconds` is wall-clock time."""

    stage: str
    partition: str | None = None
    rows_in: Quantity
    rows_out: Quantity
    bytes_in: Quantity
    bytes_out: Quantity
    requests: Quantity = ZERO
    """Sent to web servers, a vision-language model, or a judge."""
    seconds: Quantity
    nodes: Quantity
    gpus: Quantity = ZERO
    scratch_bytes: Quantity = ZERO
    """On disk only while the stage runs."""
    limit: str
    """The resource that determines the time."""

    @property
    def name(self) -> str:
        return f"{self.stage} {self.partition}" if self.partition else self.stage

    @property
    def gpu_seconds(self) -> Quantity:
        return self.seconds * self.gpus


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows that a stage processes, and its concurrent runs."""

    stage: str
    partition: str | None = None
    """The strategy, for a stage that is partitioned by strategy; None covers all partitions together."""
    rows: Quantity
    """Rows out of the nearest upstream stage."""
    num_runs: Quantity
    """Concurrent runs of the stage, one process each."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Counts implied by the profile that require reading files or building models."""

    parameters: Mapping[str, int] = field(default_factory=dict)
    """Trained parameters of each strategy to estimate."""
    prompts: Mapping[str, int] = field(default_factory=dict)
    """Prompts by benchmark; unknown for a benchmark that is missing."""
    local_parameters: Mapping[str, int] = field(default_factory=dict)
    """Parameters of models in local folders, by model id."""


class CostInputs(Protocol):
    """Everything a cost model may read. Each number is a `Quantity` that names its source."""

    @property
    def facts(self) -> Facts: ...

    @property
    def metadata_rows(self) -> Quantity:
        """Rows of LAION metadata."""

    @property
    def num_parts(self) -> Quantity:
        """Metadata files."""

    def assumed(self, name: str) -> Quantity:
        """Return what the user set, else what was measured, else the built-in assumption; unknown where that is
        None."""

    def is_chosen(self, name: str) -> bool:
        """Return whether the user set this assumption."""

    def derived(self, name: str, otherwise: Quantity) -> Quantity:
        """Return `assumed(name)` where it is known, else `otherwise`."""

    def from_profile(self, path: str) -> Quantity:
        """Return a number of the profile, by its dotted path as ``--set`` takes it."""

    def implied(self, value: float, path: str) -> Quantity:
        """Return a number that follows from a field of the profile."""

    def setting(self, path: str, kind: type[T]) -> T:
        """Return a field of the profile that is no number; `kind` is its type."""

    def optional_setting(self, path: str, kind: type[T]) -> T | None:
        """Return a field of the profile that may be None."""

    def nodes_for(self, gpus: Quantity) -> Quantity:
        """Return the machines that hold so many GPUs; one for zero GPUs."""

    def flops_per_second(self, on_gpu: bool, utilisation: str) -> Quantity:
        """Return the operations a second of one GPU at an assumed share of its peak, or of one CPU process."""

    def active_parameters(self, model: ModelRef) -> Quantity:
        """Return the parameters that a token passes, from a local model's files or from the model's name."""

    def encoder_flops_per_token(self) -> Quantity:
        """Return the text encoder's operations for a token."""


CostModel = Callable[[CostInputs, Workload], StageEstimate]


def limit_on(work: str, on_gpu: bool) -> str:
    """Return `work` as a stage's limit, with the device where it is a CPU."""
    return work if on_gpu else f"{work}, on CPU"
