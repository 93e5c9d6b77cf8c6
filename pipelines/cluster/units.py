"""Spreads independent units of a stage's work over a Ray cluster whose nodes share the folder of outputs.

A node computes a unit in a folder of its own beside the run's. From there this process alone, which holds the stage's
lock, takes it into the run. So a unit counts once, however often it was tried: a worker that was given up for dead and
still writes does so where nobody looks any more.

Units are tasks without Ray's own retries. One whose worker or node died is sent again from here, so that a unit that
kills its workers is named; what the application raises ends the stage at once, as it does without Ray.
"""

import logging
import math
import os
import platform
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipelines.cluster.config import WorkersConfig
from pipelines.cluster.session import join_ray, worker_environment
from pipelines.core.config import FrozenConfig
from pipelines.core.environment import package_versions
from pipelines.core.errors import ThroughlineError, first_line
from pipelines.runner.outputs import Inputs, StageOutput
from pipelines.runner.units import FinishedUnit, StageRun

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)
ContextT = TypeVar("ContextT")
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_PACKAGES = ("numpy", "pillow", "pyarrow")
"""What the bytes of the data stages depend on: of one version on every node."""
_TOKEN_FILE = "token"
_POLL_SECONDS = 10.0
_PROBE_SECONDS = 120.0
_OBJECT_STORE_BYTES = 256 << 20
_log = logging.getLogger(__name__)


def start_ray(workers: WorkersConfig) -> None:
    """Start Ray on this machine or join a cluster, unless this process already did."""
    join_ray(
        workers.ray_address or "",
        ("pipelines",),
        num_cpus=max(os.cpu_count() or 1, math.ceil(workers.cpus_per_unit)),
        object_store_memory_bytes=_OBJECT_STORE_BYTES,
    )


@contextmanager
def ray_tasks(run: StageRun[ConfigT], workers: WorkersConfig) -> "Iterator[RayTasks | None]":
    """Yield the way to the cluster that `workers` names, or None where it names none: work is done in this process.

    Raises ThroughlineError where a node doesn't see the folder of outputs or has other versions of what makes bytes.
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
    """Yield each of the units, (name, what it is made of), that was not finished before, in the order they finish in.

    `work(run, name, item)` makes the unit `name` of the run that it is given. For Ray it is a function of a module, and
    items can be pickled; they are taken from `units` only as fast as the cluster works them off.
    """
    waiting = ((name, item) for name, item in units if not run.is_finished(name))
    if tasks is None:
        for name, item in waiting:
            work(run, name, item)
            yield run.finished_unit(name)
        return
    job = _Job(run.stage_name, run.config, run.partition, _absolute(run.inputs), tasks.folder, work)
    with closing(tasks.map(_attempt, job, ((name, (name, item)) for name, item in waiting))) as attempts:
        for name, folder in attempts:
            yield run.adopt(name, tasks.folder / folder)


def _absolute(inputs: Inputs) -> dict[str, Sequence[StageOutput]]:
    """Return inputs that a process in another working folder finds."""
    return {
        name: [replace(output, folder=output.folder.absolute()) for output in outputs]
        for name, outputs in inputs.items()
    }


@dataclass(frozen=True)
class _Job(Generic[ConfigT, ItemT]):
    """What all units of a run have in common."""

    stage_name: str
    config: ConfigT
    partition: str | None
    inputs: dict[str, Sequence[StageOutput]]
    folder: Path
    work: Callable[[StageRun[ConfigT], str, ItemT], None]


def _attempt(job: _Job[ConfigT, ItemT], named: tuple[str, ItemT]) -> str:
    """Make a unit in a work folder of its own, on any node, and return the folder's name."""
    name, item = named
    folder = fresh_folder(job.folder, name)
    try:
        job.work(StageRun(job.stage_name, job.config, job.partition, job.inputs, folder), name, item)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder.name


def fresh_folder(parent: Path, name: str) -> Path:
    """Make a folder that no other attempt at the same work shares."""
    folder = parent / f"{name}-{secrets.token_hex(8)}"
    folder.mkdir()
    return folder


@dataclass(frozen=True)
class _Surroundings:
    """What a node must have: the folder of outputs, recognised by a file in it, and this process's versions."""

    folder: Path
    token: str
    versions: dict[str, str]

    def check(self) -> None:
        """Raise ThroughlineError that names this node where it lacks something."""
        node = f"node {platform.node()} ({_node_address()})"
        try:
            seen = (self.folder / _TOKEN_FILE).read_text() == self.token
        except OSError:
            seen = False
        if not seen:
            raise ThroughlineError(
                f"{node} of the Ray cluster does not see {self.folder}; mount the folder of outputs on every node at "
                "the same path, or set the stage's workers.ray_address to null"
            )
        if not os.access(self.folder, os.W_OK):
            raise ThroughlineError(f"{node} of the Ray cluster may not write {self.folder}; mount it for writing")
        found = _versions()
        if found != self.versions:
            name = next(name for name in _PACKAGES if found.get(name) != self.versions.get(name))
            raise ThroughlineError(
                f"{node} of the Ray cluster has {name} {found.get(name, 'not at all')}, this process "
                f"{self.versions.get(name, 'not at all')}; install the same on every node, or bytes would differ"
            )


@lru_cache
def _versions() -> dict[str, str]:
    return {name: version for name, version in package_versions().items() if name in _PACKAGES}


def _node_address() -> str:
    import ray

    return ray.util.get_node_ip_address()


def _call(shared: "tuple[_Surroundings, Callable[[Any, Any], Any], Any]", item: Any) -> Any:
    """Run in a Ray worker. The surroundings are looked at each time: a node may join late, or lose its mount."""
    surroundings, function, context = shared
    surroundings.check()
    return function(context, item)


@dataclass
class _Task:
    name: str
    item: Any
    deaths: int = 0


class RayTasks:
    """Calls functions on the nodes of a cluster: as many at a time as it has room for, again where a worker died."""

    def __init__(self, label: str, workers: WorkersConfig, folder: Path) -> None:
        """Join the cluster and look at every node; `folder` is empty, absolute, and the place for what nodes write."""
        start_ray(workers)
        import ray

        self.folder = folder
        self._label = label
        self._workers = workers
        self._ray = ray
        errors = ray.exceptions
        self._deaths = (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,  # what it returned, or was given, went with a node
        )
        self._environment = {"env_vars": worker_environment(workers.ray_address or "")}
        self._function = ray.remote(_call)
        self._call = self._function.options(
            num_cpus=workers.cpus_per_unit,
            max_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env=self._environment,
        )
        self._surroundings = _Surroundings(folder, secrets.token_hex(16), _versions())
        (folder / _TOKEN_FILE).write_text(self._surroundings.token)
        self._probe()

    @property
    def num_places(self) -> int:
        """Calls that the living nodes have room for at a time, were nothing else on them."""
        return sum(int(cpus // self._workers.cpus_per_unit) for cpus in self._nodes().values())

    def _nodes(self) -> dict[str, float]:
        """Return node id -> cores of the living nodes."""
        return {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"]}

    def _probe(self) -> None:
        """Look at all nodes before the first of them works in vain for an hour."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        shared = (self._surroundings, _nothing, None)
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
        for reference in done:  # a node too busy to answer is looked at when its first unit comes
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise _cause(error) from error
            except self._ray.exceptions.RayError as error:
                _log.warning("%s: a node of the Ray cluster went away (%s)", self._label, first_line(error))

    def map(
        self, function: Callable[[ContextT, ItemT], ResultT], context: ContextT, items: Iterable[tuple[str, ItemT]]
    ) -> Generator[tuple[str, ResultT], None, None]:
        """Yield (name, function(context, item)) for each (name, item), in the order they finish in.

        What a call raises is raised here, when all that had finished with it was yielded. Raises ThroughlineError where
        the workers of one item die too often, or no node has had room for long.
        """
        shared = self._ray.put((self._surroundings, function, context))
        source = iter(items)
        again: deque[_Task] = deque()
        under_way: dict[Any, _Task] = {}
        failure: BaseException | None = None
        try:
            while True:
                if failure is None:
                    self._hand_out(source, again, under_way, shared)
                done = self._next_done(under_way, wait=failure is None)
                if not done:
                    break
                for reference in done:
                    task = under_way.pop(reference)
                    try:
                        result = self._ray.get(reference)
                    except self._ray.exceptions.RayError as error:
                        failure = failure or self._settle_death(task, error, again)
                    else:
                        yield task.name, result
            if failure is not None:
                raise failure
        finally:
            for reference in under_way:
                self._ray.cancel(reference, force=True)

    def _hand_out(
        self, source: Iterator[tuple[str, Any]], again: deque[_Task], under_way: dict[Any, _Task], shared: Any
    ) -> None:
        limit = self._workers.max_units_in_flight or max(1, 2 * self.num_places)
        while len(under_way) < limit:
            if again:
                task = again.popleft()
            elif (named := next(source, None)) is not None:
                task = _Task(*named)
            else:
                return
            under_way[self._call.remote(shared, task.item)] = task

    def _next_done(self, under_way: dict[Any, _Task], *, wait: bool) -> Sequence[Any]:
        """Return what is done by now, with `wait` at least one; nothing where nothing is under way."""
        references = list(under_way)
        if not references:
            return []
        if wait:
            without_room = time.monotonic()
            poll = min(_POLL_SECONDS, self._workers.room_timeout_seconds)
            while not self._ray.wait(references, num_returns=1, timeout=poll)[0]:
                if self.num_places:
                    without_room = time.monotonic()
                elif time.monotonic() - without_room > self._workers.room_timeout_seconds:
                    raise ThroughlineError(
                        f"{self._label}: no node of the Ray cluster has had {self._workers.cpus_per_unit:g} CPUs for a "
                        f"unit for {self._workers.room_timeout_seconds:g} s; see what is left of the cluster, then run "
                        "again: finished units are kept"
                    )
        return self._ray.wait(references, num_returns=len(references), timeout=0)[0]

    def _settle_death(self, task: _Task, error: Any, again: deque[_Task]) -> BaseException | None:
        """Send a task again whose worker died, or return what ends the stage."""
        cause = _cause(error)
        if not isinstance(cause, self._deaths):
            if not isinstance(cause, self._ray.exceptions.RayError):
                cause.__cause__ = error  # with the traceback of the worker
                return cause
            return _because(
                ThroughlineError(f"{self._label}: the Ray cluster failed at unit {task.name}: {first_line(cause)}"),
                error,
            )
        task.deaths += 1
        if task.deaths > self._workers.max_deaths_per_unit:
            return _because(
                ThroughlineError(
                    f"{self._label}: the worker of unit {task.name} died {task.deaths} times ({first_line(cause)}); "
                    "see the nodes' memory and Ray's logs, then run again: finished units are kept"
                ),
                error,
            )
        _log.warning("%s: the worker of unit %s died (%s); it is done again", self._label, task.name, first_line(cause))
        again.append(task)
        return None


def _nothing(context: None, item: None) -> None:
    """Do what a probe does once its surroundings are in order."""


def _cause(error: Any) -> BaseException:
    """Return what a task raised, as it was raised, or the error of Ray itself."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _because(error: ThroughlineError, cause: BaseException) -> ThroughlineError:
    error.__cause__ = cause
    return error
