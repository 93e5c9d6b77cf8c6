"""A pool of vision-language engines on Ray: each in a process of its own, fed batch by batch, replaced when it dies.

Captions and judges share it. Plain actors instead of Ray Data's actor pool, because an actor here outlives one data
set (a stage process with several requests loads its model once) and a batch of a dead actor goes to any living one
instead of waiting for that actor's return. Batches travel through Ray's object store, so engines need no shared disk.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipelines.cluster.session import LOCAL_RAY, join_ray, worker_environment
from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError, first_line
from recaption.config import EngineConfig, OpenAIEngineConfig, PoolConfig, VllmEngineConfig
from recaption.engine import VisionAnswer, VisionLanguageEngine, VisionRequest
from recaption.engines import load_engine
from recaption.vllm_environment import vllm_environment

KeyT = TypeVar("KeyT")

_BATCHES_PER_ACTOR = 2
"""One at work and one waiting beside it, so that an engine never waits for the driver."""


class EnginePool(Protocol):
    """Engines that answer batches of requests."""

    def start(self) -> None:
        """Wait until there is an engine to work with. Raises ThroughlineError where it can't be started."""
        ...

    def answer(
        self, batches: Iterable[tuple[KeyT, Sequence[VisionRequest]]]
    ) -> Iterator[tuple[KeyT, list[VisionAnswer]]]:
        """Yield (key, answers) for each (key, requests), as they come: each key exactly once, in any order.

        `batches` is read only as fast as engines take them. Raises ThroughlineError where engines can't be started
        or die more often than `PoolConfig.max_actor_restarts`.
        """
        ...

    def close(self) -> None:
        """Let the engines go."""
        ...


class LocalPool:
    """One engine in this process: for HTTP engines, which are concurrent by themselves."""

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
        """Load the engine and return the process id. Apart from __init__, so that a failure here keeps its type."""
        self._engine = load_engine(config)
        return os.getpid()

    def generate(self, requests: Sequence[VisionRequest]) -> list[VisionAnswer]:
        if self._engine is None:
            raise RuntimeError("generate was called before load")
        return self._engine.generate(requests)


@dataclass
class _Slot:
    """The place of one engine: its current actor, and how often it had to be replaced."""

    actor: Any
    loading: Any
    """Reference to the result of `load`; None once the engine is up."""
    pid: int | None = None
    restarts: int = 0
    under_way: int = 0


@dataclass
class _Task:
    """A batch on its way through the pool."""

    key: Any
    requests: Any
    slot: _Slot
    deaths: int = 0


class RayPool:
    """Engines as Ray actors, as many as the cluster has room for between `min_actors` and `max_actors`."""

    def __init__(self, engine: VllmEngineConfig, pool: PoolConfig) -> None:
        import ray

        self._ray = ray
        self._engine = engine
        self._pool = pool
        self._deaths: tuple[type[Exception], ...] = (
            ray.exceptions.RayActorError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.WorkerCrashedError,
        )
        start_ray(pool)
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
                    f"the cluster has {self._ray.cluster_resources()}; give it more or ask for fewer"
                )
            self._finish_loading(done[0])

    def answer(
        self, batches: Iterable[tuple[KeyT, Sequence[VisionRequest]]]
    ) -> Iterator[tuple[KeyT, list[VisionAnswer]]]:
        self.start()
        source = iter(batches)
        under_way: dict[Any, _Task] = {}
        again: deque[_Task] = deque()
        try:
            while True:
                self._hand_out(source, again, under_way)
                if not under_way and not again:
                    return
                reference = self._next_event(under_way)
                if reference not in under_way:
                    self._finish_loading(reference)
                    continue
                task = under_way.pop(reference)
                task.slot.under_way -= 1
                try:
                    answers = self._ray.get(reference)
                except self._deaths as error:
                    self._count_death(task, error)
                    again.append(task)
                    self._replace(task.slot, error)
                except self._ray.exceptions.ObjectLostError as error:
                    # The batch was done, but its answers went with their node before they could be fetched.
                    self._count_death(task, error)
                    again.append(task)
                except self._ray.exceptions.RayTaskError as error:
                    raise _as_throughline_error(self._engine, error) from error
                else:
                    yield task.key, answers
        finally:
            for task in under_way.values():  # the caller stopped early: what still comes is for nobody
                task.slot.under_way -= 1

    def _hand_out(self, source: Iterator[tuple[Any, Any]], again: deque[_Task], under_way: dict[Any, _Task]) -> None:
        """Give every free engine a batch: first those whose engine died, then new ones."""
        while (slot := self._free_slot()) is not None:
            if again:
                task = again.popleft()
                task.slot = slot
            elif (batch := next(source, None)) is not None:
                task = _Task(key=batch[0], requests=batch[1], slot=slot)
            else:
                return
            slot.under_way += 1
            under_way[slot.actor.generate.remote(task.requests)] = task

    def _next_event(self, under_way: dict[Any, _Task]) -> Any:
        """Wait for a batch to end or an engine to be up, and return its reference."""
        loading = [slot.loading for slot in self._slots if slot.loading is not None]
        timeout = None if under_way else self._pool.start_timeout_seconds
        done, _ = self._ray.wait([*under_way, *loading], num_returns=1, timeout=timeout)
        if not done:
            raise ThroughlineError(
                f"{self._engine.model.id}: all its engines died, and none came up again within {timeout:g} s; "
                "see what is left of the cluster, then run again: finished shards are kept"
            )
        return done[0]

    def _count_death(self, task: _Task, error: Exception) -> None:
        task.deaths += 1
        if task.deaths > self._pool.max_actor_restarts:
            raise ThroughlineError(
                f"batch {task.key!r}: its engine died {task.deaths} times ({first_line(error)}); lower the "
                "rows per batch or the engine's memory settings, then run again"
            ) from error

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

    def _free_slot(self) -> _Slot | None:
        free = [slot for slot in self._slots if slot.loading is None and slot.under_way < _BATCHES_PER_ACTOR]
        return min(free, key=lambda slot: slot.under_way, default=None)

    def _finish_loading(self, reference: Any) -> None:
        slot = next(slot for slot in self._slots if slot.loading == reference)
        try:
            slot.pid = self._ray.get(reference)
            slot.loading = None
        except self._deaths as error:
            self._replace(slot, error)
        except self._ray.exceptions.RayTaskError as error:
            raise _as_throughline_error(self._engine, error) from error

    def _replace(self, slot: _Slot, error: Exception) -> None:
        """Start a new actor in the place of a dead one, once for all the batches that died with it."""
        if slot not in self._slots:
            return
        if slot.restarts >= self._pool.max_actor_restarts:
            raise ThroughlineError(
                f"{self._engine.model.id}: its engine died {slot.restarts + 1} times ({first_line(error)}); "
                "see Ray's logs, or raise max_actor_restarts"
            ) from error
        logging.getLogger(__name__).warning("an engine of %s died and is started again", self._engine.model.id)
        self._ray.kill(slot.actor)  # one that is out of reach may still hold its GPUs
        fresh = self._new_slot()
        fresh.restarts = slot.restarts + 1
        self._slots[self._slots.index(slot)] = fresh


def start_ray(pool: PoolConfig) -> None:
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
                "profile, or name a Ray cluster in the pool's ray_address"
            )


def _as_throughline_error(engine: VllmEngineConfig, error: Any) -> ThroughlineError:
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ThroughlineError):
        return ThroughlineError(str(cause))
    return ThroughlineError(f"{engine.model.id}: its engine failed: {type(cause).__name__}: {_last_line(cause)}")


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


_pools: dict[str, EnginePool] = {}


def engine_pool(engine: EngineConfig, pool: PoolConfig) -> EnginePool:
    """Return the pool for this engine: the same as before where this process already has it.

    Engines stay up until the process ends, `close_pools` is called, or another engine is asked for: a machine may have
    room for one alone.
    """
    key = digest_json([engine.model_dump(mode="json"), pool.model_dump(mode="json")])
    if key not in _pools:
        close_pools()
        _pools[key] = (
            LocalPool(load_engine(engine)) if isinstance(engine, OpenAIEngineConfig) else RayPool(engine, pool)
        )
    return _pools[key]


def close_pools() -> None:
    """Let all engines of this process go, and the Ray that was started for them. At a process's end Ray does it."""
    if not _pools:
        return
    for pool in _pools.values():
        pool.close()
    used_ray = any(isinstance(pool, RayPool) for pool in _pools.values())
    _pools.clear()
    if used_ray:
        import ray

        ray.shutdown()
