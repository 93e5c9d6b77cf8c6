"""Carries out tasks of the plan: reuses what is finished, and starts one stage process for all that is not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from orchestration.graph.resolution import INDEX, Plan, Task
from orchestration.launch.launcher import Launcher
from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.profiles.profile import Profile


class Observer(Protocol):
    """Receives events while tasks run."""

    def progress(self, record: Mapping[str, Any]) -> None:
        """Receive a progress record of a stage."""

    def line(self, text: str) -> None:
        """Receive any other line of a stage's output."""


@dataclass(frozen=True, kw_only=True)
class ServiceHooks:
    """Callbacks for services that a profile's stages depend on, such as the demo's web server.

    `prepare` runs before any output is looked up, and must be quick if there is nothing left to do. `during` returns a
    context manager that is open while a stage's process runs.
    """

    prepare: "Callable[[Profile, Callable[[str], None]], None]" = lambda profile, say: None
    during: "Callable[[Profile, str], Any] | None" = None


@dataclass(frozen=True)
class Outcome:
    """A finished task, and whether its output was there before."""

    task: Task
    reused: bool


@dataclass
class Execution:
    """Plan and launcher together."""

    plan: Plan
    log_folder: Path
    hooks: ServiceHooks = field(default_factory=ServiceHooks)
    observer: Observer | None = None
    """Also receives progress records, and is the only one to receive other lines; set by the command line."""
    _prepared: bool = False

    def materialize(self, asset: str, partitions: Sequence[str | None], observer: Observer) -> list[Outcome]:
        """Return the outcomes of some partitions of an asset, computing those that are not finished.

        All of them run in one process, so that a model is loaded once. Raises ThroughlineError where inputs are
        missing or the stage fails; partitions that it finished before are kept.
        """
        plan, node = self.plan, self.plan.graph[asset]
        self.prepare(observer.line)
        tasks = [plan.task(asset, partition) for partition in partitions]
        pending = [task for task in tasks if task.output is None]
        if pending:
            self._start(pending, observer)
        finished = [plan.task(asset, partition) for partition in partitions]
        for task in finished:
            if task.output is None:
                raise ThroughlineError(
                    f"{task.label}: its process ended well but left no manifest for its fingerprint; "
                    f"see the log in {self.log_folder / node.name}"
                )
        reused = {task.partition for task in tasks} - {task.partition for task in pending}
        return [Outcome(task, task.partition in reused) for task in finished]

    def prepare(self, say: Callable[[str], None]) -> None:
        """Run the profile's `prepare` hook, once per process."""
        if not self._prepared:
            self.hooks.prepare(self.plan.profile, say)
            self._prepared = True

    def _start(self, pending: Sequence[Task], observer: Observer) -> None:
        profile, node = self.plan.profile, pending[0].node
        requests = [
            task.request(self.plan.output_root, profile.verify, profile.lock_wait_seconds)
            for task in _by_configuration(pending)
        ]
        observers = [item for item in (self.observer, observer) if item is not None]

        def progress(record: Mapping[str, Any]) -> None:
            for item in observers:
                item.progress(record)

        launcher = Launcher(self.log_folder, progress, observers[0].line)
        with self._around(node.name):
            launcher.run(node.module, requests, profile.launch(node.name))
        if node.name == INDEX:
            self.plan.forget(INDEX, None)

    @contextmanager
    def _around(self, asset: str) -> Iterator[None]:
        if self.hooks.during is None:
            yield
            return
        with self.hooks.during(self.plan.profile, asset):
            yield


def _by_configuration(tasks: Sequence[Task]) -> list[Task]:
    """Return tasks of equal configuration next to each other, so that one process changes its model least often."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.config.model_dump_json() if task.config else "", []).append(task)
    return [task for group in groups.values() for task in group]
