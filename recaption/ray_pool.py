"""A pool of vision-language engines on Ray, each in its own process and replaced when it dies.

Captions and judges share it. It uses plain actors instead of Ray Data's actor pool: an actor outlives one data set (a
stage process with several requests loads its model once), and a batch of a dead actor goes to any living one instead of
waiting for that actor to restart. Batches travel through Ray's object store, so engines need no shared disk.
"""

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipelines.cluster.dispatch import Job, dispatch, is_death, task_cause
from pipelines.cluster.session import LOCAL_RAY, join_ray, worker_environment
from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError, first_line
from recaption.config import EngineConfig, OpenAIEngineConfig, PoolConfig, VllmEngineConfig
from recaption.engine import VisionAnswer, VisionLanguageEngine, VisionRequest
from recaption.engines import load_engine
from recaption.vllm_environment import vllm_environment

KeyT = TypeVar("KeyT")

_BATCHES_PER_ACTOR = 2
"""One running and one queued, so that an engine never waits for the driver."""


class EnginePool(Protocol):
    """Engines that answer batches of requests."""

    def start(self) -> None:
        """Wait until enough engines are up; raises ThroughlineError if they cannot be started."""
        ...

    def answer(
        self, batches: Iterable[tuple[KeyT, Sequence[VisionRequest]]]
    ) -> Iterator[tuple[KeyT, list[VisionAnswer]]]:
        """Yield (key, answers) for each (key, requests), each key exactly once, in order of completion.

        `batches` is read only as fast as engines take them. Raises ThroughlineError if engines cannot be started or die
        more often than `PoolConfig.max_actor_restarts`.
        """
        ...

    def close(self) -> None:
        """Shut down the engines."""
        ...


class LocalPool:
    """One engine in this process; for HTTP engines, which handle concurrency themselves."""

    def __init__(self, engine: VisionLanguageEngine) -> None:
        self._engine = engine

    def start(self) -> None:
        pass

    def answer(
        self, batches: Iterable[tuple[KeyT, Sequence[VisionRequest]]]
    ) -> Iterator[tuple[KeyT, list[VisionAnswer]]]:
        for key, requests in batches:
            yield key, self._engine.generate(requests)

    def close(self) -> None:
        pass


class _EngineActor:
    """Runs in a Ray worker; holds one engine."""

    def __init__(self) -> None:
        self._engine: VisionLanguageEngine | None = None

    def load(self, config: EngineConfig) -> int:
        """Load the engine and return the process id. Not part of __init__, so that a failure keeps its type."""
        self._engine = load_engine(config)
        return os.getpid()

    def generate(self, requests: Sequence[VisionRequest]) -> list[VisionAnswer]:
        if self._engine is None:
            raise RuntimeError("generate was called before load")
        return self._engine.generate(requests)


@dataclass
class _Slot:
    """Place for one engine: its current actor, and how often that had to be replaced."""

    actor: Any
    loading: Any
    """Reference to the result of `load`; None once the engine is up."""
    pid: int | None = None
    restarts: int = 0


class RayPool:
    """Engines as Ray actors: `max_actors`, or as many as fit on the cluster, but at least `min_actors`."""

    def __init__(self, engine: VllmEngineConfig, pool: PoolConfig) -> None:
        import ray

        self._ray = ray
        self._engine = engine
        self._pool = pool
        join_ray_for_engines(pool)
        actor_type = ray.remote(_EngineActor)
        self._actor_type = actor_type.options(
            num_cpus=pool.num_cpus_per_actor,
            num_gpus=pool.num_gpus_per_actor,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": vllm_environment(engine) | worker_environment(pool.ray_address)},
        )
        self._slots = [self._new_slot() for _ in range(pool.max_actors)]

    def start(self) -> None:
        deadline = time.monotonic() + self._pool.start_timeout_seconds
        while True:
            loading = [slot.loading for slot in self._slots if slot.loading is not None]
            num_up = len(self._slots) - len(loading)
            if num_up >= self._pool.min_actors:
                return
            done, _ = self._ray.wait(loading, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise ThroughlineError(
                    f"{num_up} of {self._pool.min_actors} engines were up after {self._pool.start_timeout_seconds:g} s"
                    f"; each needs {self._pool.num_cpus_per_actor:g} CPUs and {self._pool.num_gpus_per_actor:g} GPUs, "
                    f"the cluster has {self._ray.cluster_resources()}; add resources or lower min_actors"
                )
            self._finish_loading(done[0])

    def answer(
        self, batches: Iterable[tuple[KeyT, Sequence[VisionRequest]]]
    ) -> Iterator[tuple[KeyT, list[VisionAnswer]]]:
        self.start()
        yield from dispatch(self, batches)

    def num_free(self, in_flight: Mapping[Any, Job]) -> int:
        return sum(_BATCHES_PER_ACTOR - load for _, load in self._loads(in_flight))

    def submit(self, job: Job, in_flight: Mapping[Any, Job]) -> Any:
        """Give a batch to the engine that has the fewest."""
        job.worker, _ = min(self._loads(in_flight), key=lambda item: item[1])
        return job.worker.actor.generate.remote(job.payload)

    def _loads(self, in_flight: Mapping[Any, Job]) -> list[tuple[_Slot, int]]:
        """Return the slots whose engine is up, with the number of their batches in flight."""
        busy = [job.worker for job in in_flight.values()]
        return [(slot, sum(slot is worker for worker in busy)) for slot in self._slots if slot.loading is None]

    def wait(self, references: Sequence[Any], *, block: bool) -> Sequence[Any]:
        loading = [slot.loading for slot in self._slots if slot.loading is not None]
        timeout = None if references else self._pool.start_timeout_seconds
        done, _ = self._ray.wait([*references, *loading], num_returns=1, timeout=timeout)
        if not done:
            raise ThroughlineError(
                f"{self._engine.model.id}: all its engines died, and none restarted within {timeout:g} s; check which "
                "nodes are left, then run again: finished shards are kept"
            )
        if done[0] in references:
            return done
        self._finish_loading(done[0])
        return []

    def recover(self, job: Job, error: Exception) -> None:
        if is_death(error):
            self._count_death(job, error)
            self._replace(job.worker, error)
        elif isinstance(error, self._ray.exceptions.ObjectLostError):
            self._count_death(job, error)  # the batch was done, but its answers were lost with their node
        else:
            raise _as_throughline_error(self._engine, error) from error

    def _count_death(self, job: Job, error: Exception) -> None:
        job.num_deaths += 1
        if job.num_deaths > self._pool.max_actor_restarts:
            raise ThroughlineError(
                f"batch {job.name!r}: its engine died {job.num_deaths} times ({first_line(error)}); lower the "
                "rows per batch or the engine's memory settings, then run again"
            ) from error

    def abandon(self, references: Iterable[Any]) -> None:
        """Let engines finish these batches: there is no way to stop one without its engine."""

    def engine_pids(self) -> list[int]:
        """Return the process ids of the engines that are up."""
        return [slot.pid for slot in self._slots if slot.loading is None and slot.pid is not None]

    def close(self) -> None:
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._slots = []

    def _new_slot(self) -> _Slot:
        actor = self._actor_type.remote()
        return _Slot(actor=actor, loading=actor.load.remote(self._engine))

    def _finish_loading(self, reference: Any) -> None:
        slot = next(slot for slot in self._slots if slot.loading == reference)
        try:
            slot.pid = self._ray.get(reference)
            slot.loading = None
        except self._ray.exceptions.RayError as error:
            if not is_death(error):
                raise _as_throughline_error(self._engine, error) from error
            self._replace(slot, error)

    def _replace(self, slot: _Slot, error: Exception) -> None:
        """Replace a dead actor, once for all batches that failed with it."""
        if slot not in self._slots:
            return
        if slot.restarts >= self._pool.max_actor_restarts:
            raise ThroughlineError(
                f"{self._engine.model.id}: its engine died {slot.restarts + 1} times ({first_line(error)}); "
                "check Ray's logs, or raise max_actor_restarts"
            ) from error
        logging.getLogger(__name__).warning("an engine of %s died; restarting it", self._engine.model.id)
        self._ray.kill(slot.actor)  # an unreachable actor may still hold its GPUs
        replacement = self._new_slot()
        replacement.restarts = slot.restarts + 1
        self._slots[self._slots.index(slot)] = replacement


def join_ray_for_engines(pool: PoolConfig) -> None:
    """Start Ray on this machine or join a cluster, unless this process already did."""
    num_cpus = max(1, math.ceil(pool.max_actors * pool.num_cpus_per_actor))
    started = join_ray(
        pool.ray_address,
        ("pipelines", "recaption"),
        num_cpus=num_cpus,
        object_store_memory_bytes=pool.object_store_memory_bytes,
    )
    if started and pool.ray_address == LOCAL_RAY:
        import ray

        num_gpus = ray.cluster_resources().get("GPU", 0.0)
        if num_gpus < pool.num_gpus_per_actor:
            raise ThroughlineError(
                f"an engine needs {pool.num_gpus_per_actor:g} GPUs, this machine has {num_gpus:g}; choose another "
                "profile, or set the pool's ray_address to a Ray cluster"
            )


def _as_throughline_error(engine: VllmEngineConfig, error: Any) -> ThroughlineError:
    cause = task_cause(error)
    if isinstance(cause, ThroughlineError):
        return ThroughlineError(str(cause))
    return ThroughlineError(f"{engine.model.id}: its engine failed: {type(cause).__name__}: {_last_line(cause)}")


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


_pools: dict[str, EnginePool] = {}


def engine_pool(engine: EngineConfig, pool: PoolConfig) -> EnginePool:
    """Return this process's pool for an engine, creating it on first use.

    Engines stay up until the process ends, `close_pools` is called, or another engine is requested: a machine may only
    have room for one.
    """
    key = digest_json([engine.model_dump(mode="json"), pool.model_dump(mode="json")])
    if key not in _pools:
        close_pools()
        _pools[key] = (
            LocalPool(load_engine(engine)) if isinstance(engine, OpenAIEngineConfig) else RayPool(engine, pool)
        )
    return _pools[key]


def close_pools() -> None:
    """Shut down all engines of this process, and Ray if it was started for them. At process exit Ray does so itself."""
    if not _pools:
        return
    for pool in _pools.values():
        pool.close()
    used_ray = any(isinstance(pool, RayPool) for pool in _pools.values())
    _pools.clear()
    if used_ray:
        import ray

        ray.shutdown()
