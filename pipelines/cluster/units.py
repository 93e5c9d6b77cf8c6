"""Distributes a stage's units over a Ray cluster whose nodes share the output folder.

A node computes a unit in a separate folder next to the run's. Only this process, which holds the stage's lock, moves
finished units into the run. So a unit counts once, however many attempts it took: a worker that was presumed dead but
is still writing does so in a folder that nobody reads.

Units are tasks without Ray's own retries. This process resubmits a unit whose worker or node died, so that a unit which
kills its workers can be named. An exception from the application ends the stage at once, as it does without Ray.
"""

import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipelines.cluster.config import WorkersConfig
from pipelines.cluster.dispatch import Job, dispatch, is_death, task_cause
from pipelines.cluster.nodes import NodeRequirements, local_versions
from pipelines.cluster.session import join_ray, worker_environment
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError, first_line
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.units import FinishedUnit, StageRun

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)
ContextT = TypeVar("ContextT")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_POLL_SECONDS = 10.0
_PROBE_SECONDS = 120.0
_OBJECT_STORE_BYTES = 256 << 20
_log = logging.getLogger(__name__)


def join_ray_for_units(workers: WorkersConfig) -> None:
    """Start Ray on this machine or join a cluster, unless this process already did."""
    join_ray(
        workers.ray_address or "",
        ("pipelines",),
        num_cpus=max(os.cpu_count() or 1, math.ceil(workers.cpus_per_unit)),
        object_store_memory_bytes=_OBJECT_STORE_BYTES,
    )


@contextmanager
def ray_tasks(run: StageRun[ConfigT], workers: WorkersConfig) -> "Iterator[RayTasks | None]":
    """Yield access to the cluster that `workers` names, or None if the work is to be done in this process.

    Raises ThroughlineError if a node does not see the output folder or has other versions of packages that determine
    outputs.
    """
    if workers.ray_address is None:
        yield None
        return
    folder = (run.scratch / "ray").absolute()
    shutil.rmtree(folder, ignore_errors=True)  # attempts of a run that was killed
    folder.mkdir()
    try:
        yield RayTasks(run.label, workers, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_units(
    run: StageRun[ConfigT],
    tasks: "RayTasks | None",
    units: Iterable[tuple[str, ItemT]],
    work: Callable[[StageRun[ConfigT], str, ItemT], None],
) -> Iterator[FinishedUnit]:
    """Run the units, (name, item), that are not finished yet, and yield each in order of completion.

    `work(run, name, item)` makes the unit `name` of the run it receives. On Ray it must be a function of a module and
    items must be picklable. `units` is read only as fast as the cluster processes them.
    """
    unfinished = ((name, item) for name, item in units if not run.is_finished(name))
    if tasks is None:
        for name, item in unfinished:
            work(run, name, item)
            yield run.finished_unit(name)
        return
    spec = _RunSpec(run.stage_name, run.config, run.partition, _absolute(run.inputs), tasks.folder, work)
    with closing(tasks.map(_attempt, spec, ((name, (name, item)) for name, item in unfinished))) as attempts:
        for name, folder in attempts:
            yield run.adopt(name, tasks.folder / folder)


def _absolute(inputs: Inputs) -> dict[str, Sequence[StageOutput]]:
    """Return inputs with absolute folders, for processes with another working folder."""
    return {
        name: [replace(output, folder=output.folder.absolute()) for output in outputs]
        for name, outputs in inputs.items()
    }


@dataclass(frozen=True)
class _RunSpec(Generic[ConfigT, ItemT]):
    """Arguments common to all units of a run."""

    stage_name: str
    config: ConfigT
    partition: str | None
    inputs: dict[str, Sequence[StageOutput]]
    folder: Path
    work: Callable[[StageRun[ConfigT], str, ItemT], None]


def _attempt(spec: _RunSpec[ConfigT, ItemT], named: tuple[str, ItemT]) -> str:
    """Make a unit in a work folder of its own, on any node, and return the folder's name."""
    name, item = named
    folder = fresh_folder(spec.folder, name)
    try:
        spec.work(StageRun(spec.stage_name, spec.config, spec.partition, spec.inputs, folder), name, item)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder.name


def fresh_folder(parent: Path, name: str) -> Path:
    """Make a folder that is used by this attempt only."""
    folder = parent / f"{name}-{secrets.token_hex(8)}"
    folder.mkdir()
    return folder


def _call(shared: tuple[NodeRequirements, Callable[[Any, Any], Any], Any], item: Any) -> Any:
    """Run in a Ray worker. Requirements are checked on every call: a node may join late, or lose its mount."""
    requirements, function, context = shared
    requirements.check()
    return function(context, item)


class RayTasks:
    """Calls functions on the nodes of a cluster, as many at a time as fit, and retries calls whose worker died."""

    def __init__(self, label: str, workers: WorkersConfig, folder: Path) -> None:
        """Join the cluster and check every node; `folder` is empty and absolute, and nodes write into it."""
        join_ray_for_units(workers)
        import ray

        self.folder = folder
        self._label = label
        self._workers = workers
        self._ray = ray
        self._environment = {"env_vars": worker_environment(workers.ray_address or "")}
        self._function = ray.remote(_call)
        self._call = self._function.options(
            num_cpus=workers.cpus_per_unit,
            max_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env=self._environment,
        )
        self._requirements = NodeRequirements(folder, secrets.token_hex(16), local_versions())
        self._requirements.write_token()
        self._probe()

    @property
    def num_places(self) -> int:
        """Calls that fit on the living nodes at a time if nothing else runs there."""
        return sum(int(cpus // self._workers.cpus_per_unit) for cpus in self._nodes().values())

    def _nodes(self) -> dict[str, float]:
        """Return node id -> cores of the living nodes."""
        return {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]}

    def _probe(self) -> None:
        """Check the requirements on all nodes before any of them works in vain for an hour."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        shared = (self._requirements, _do_nothing, None)
        nodes = [node for node, cpus in self._nodes().items() if cpus >= self._workers.cpus_per_unit]
        if not nodes:
            _log.warning(
                "%s: no node of the Ray cluster has %g CPUs for a unit; waiting for one",
                self._label,
                self._workers.cpus_per_unit,
            )
        options = {"num_cpus": 0, "max_retries": 0, "runtime_env": self._environment}
        strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        probes = [
            self._function.options(scheduling_strategy=strategy, **options).remote(shared, None)
            for strategy in strategies
        ]
        done, _ = self._ray.wait(probes, num_returns=len(probes), timeout=_PROBE_SECONDS) if probes else ([], [])
        for reference in done:  # a node too busy to answer is checked with its first unit
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise task_cause(error) from error
            except self._ray.exceptions.RayError as error:
                _log.warning("%s: a node left the Ray cluster (%s)", self._label, first_line(error))

    def map(
        self, function: Callable[[ContextT, ItemT], ResultT], context: ContextT, items: Iterable[tuple[str, ItemT]]
    ) -> Generator[tuple[str, ResultT], None, None]:
        """Yield (name, function(context, item)) for each (name, item), in order of completion.

        An exception from a call is raised here after all results available by then were yielded. Raises
        ThroughlineError if an item's workers die too often, or no node is large enough for too long.
        """
        shared = self._ray.put((self._requirements, function, context))
        return dispatch(self, ((name, (shared, item)) for name, item in items))

    def num_free(self, in_flight: Mapping[Any, Job]) -> int:
        return (self._workers.max_units_in_flight or max(1, 2 * self.num_places)) - len(in_flight)

    def submit(self, job: Job, in_flight: Mapping[Any, Job]) -> Any:
        return self._call.remote(*job.payload)

    def wait(self, references: Sequence[Any], *, block: bool) -> Sequence[Any]:
        if block:
            without_room = time.monotonic()
            poll = min(_POLL_SECONDS, self._workers.room_timeout_seconds)
            while not self._ray.wait(references, num_returns=1, timeout=poll)[0]:
                if self.num_places:
                    without_room = time.monotonic()
                elif time.monotonic() - without_room > self._workers.room_timeout_seconds:
                    raise ThroughlineError(
                        f"{self._label}: no node of the Ray cluster has had {self._workers.cpus_per_unit:g} CPUs for a "
                        f"unit for {self._workers.room_timeout_seconds:g} s; check which nodes are left, then run "
                        "again: finished units are kept"
                    )
        return self._ray.wait(references, num_returns=len(references), timeout=0)[0]

    def recover(self, job: Job, error: Exception) -> BaseException | None:
        cause = task_cause(error)
        if not isinstance(cause, self._ray.exceptions.RayError):
            cause.__cause__ = error  # with the traceback of the worker
            return cause
        if not is_death(cause) and not isinstance(cause, self._ray.exceptions.ObjectLostError):
            failure = ThroughlineError(f"{self._label}: the Ray cluster failed at unit {job.name}: {first_line(cause)}")
            failure.__cause__ = error
            return failure
        job.num_deaths += 1
        if job.num_deaths > self._workers.max_deaths_per_unit:
            failure = ThroughlineError(
                f"{self._label}: the worker of unit {job.name} died {job.num_deaths} times ({first_line(cause)}); "
                "check the nodes' memory and Ray's logs, then run again: finished units are kept"
            )
            failure.__cause__ = error
            return failure
        _log.warning("%s: the worker of unit %s died (%s); retrying", self._label, job.name, first_line(cause))
        return None

    def abandon(self, references: Iterable[Any]) -> None:
        for reference in references:
            self._ray.cancel(reference, force=True)


def _do_nothing(context: None, item: None) -> None:
    """Body of a probe: only the requirements are checked."""
