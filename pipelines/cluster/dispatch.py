"""Dispatches jobs to Ray workers and retries those whose worker died.

The one loop behind both the tasks of data stages (`pipelines.cluster.units`) and the engines of `recaption.ray_pool`.
"""

from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

NameT = TypeVar("NameT")


@dataclass
class Job:
    """A named call; `worker` is for use by its `Workers`."""

    name: Any
    payload: Any
    worker: Any = None
    num_deaths: int = 0


class Workers(Protocol):
    """Runs jobs on Ray. `in_flight` maps the reference of each running job to the job."""

    def num_free(self, in_flight: Mapping[Any, Job]) -> int:
        """Return the number of jobs that can be submitted now."""
        ...

    def submit(self, job: Job, in_flight: Mapping[Any, Job]) -> Any:
        """Start a job and return the reference to its result."""
        ...

    def wait(self, references: Sequence[Any], *, block: bool) -> Sequence[Any]:
        """Return references that are done. With `block`, wait until there is one, or until there may be room again."""
        ...

    def recover(self, job: Job, error: Exception) -> BaseException | None:
        """Handle a job that failed with a RayError: return None to retry it.

        An exception that is returned ends the run after all results that are already available; one that is raised ends
        it at once.
        """
        ...

    def abandon(self, references: Iterable[Any]) -> None:
        """Give up running jobs whose results are no longer wanted."""
        ...


def dispatch(workers: Workers, items: Iterable[tuple[NameT, Any]]) -> Generator[tuple[NameT, Any], None, None]:
    """Yield (name, result) for each (name, payload), in order of completion; `items` is read only as there is room."""
    import ray

    source = (Job(name, payload) for name, payload in items)
    retries: deque[Job] = deque()
    in_flight: dict[Any, Job] = {}
    failure: BaseException | None = None
    try:
        while True:
            for _ in range(workers.num_free(in_flight) if failure is None else 0):
                job = retries.popleft() if retries else next(source, None)
                if job is None:
                    break
                in_flight[workers.submit(job, in_flight)] = job
            if not in_flight and not (retries and failure is None):
                break
            done = workers.wait(list(in_flight), block=failure is None)
            if failure is not None and not done:
                break
            for reference in done:
                job = in_flight.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayError as error:
                    if failure is None and (failure := workers.recover(job, error)) is None:
                        retries.append(job)
                else:
                    yield job.name, result
        if failure is not None:
            raise failure
    finally:
        workers.abandon(in_flight)


def is_death(error: BaseException) -> bool:
    """Return whether a worker or its node died."""
    from ray import exceptions

    deaths = (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError)
    return isinstance(error, (*deaths, exceptions.OutOfMemoryError))


def task_cause(error: BaseException) -> BaseException:
    """Return the exception that a remote function raised, or `error` itself if it is Ray's own."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
