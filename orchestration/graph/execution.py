"""Runs tasks of the plan: reuses finished outputs and starts one stage process for the rest."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestration.graph.resolution import INDEX, Plan, Task
from orchestration.launch.launcher import Launcher
from orchestration.profiles.profile import Profile
from pipelines.core.errors import ThroughlineError


class Observer(Protocol):
    """Receives events while tasks run."""

    def progress(self, record: Mapping[str, Any]) -> None:
        """Receive a progress record of a stage."""

    def line(self, text: str) -> None:
        """Receive any other line that a stage wrote."""


@dataclass(frozen=True, kw_only=True)
class ServiceHooks:
    """Services that a profile's stages need, such as the demo's web server."""

    prepare: Callable[[Profile, Callable[[str], None]], None] = lambda profile, report: None
    """Called before any task is resolved; must be quick when there is nothing left to prepare."""
    during: Callable[[Profile, str], AbstractContextManager[Any]] = lambda profile, asset: nullcontext()
    """Context that is open while the process of an asset's stage runs."""


@dataclass(frozen=True)
class Outcome:
    """A finished task, and whether its output existed before."""

    task: Task
    reused: bool


@dataclass
class Execution:
    """Computes assets of a plan."""

    plan: Plan
    log_folder: Path
    hooks: ServiceHooks = field(default_factory=ServiceHooks)
    observer: Observer | None = None
    """If set, receives all progress records too, and all other lines instead of the observer of a call."""
    _prepared: bool = False

    def materialize(self, asset: str, partitions: Sequence[str | None], observer: Observer) -> list[Outcome]:
        """Return the outcomes of some partitions of an asset, computing the unfinished ones.

        All run in one process, so that a model is loaded once. Raises ThroughlineError if inputs are missing or the
        stage fails; partitions that finished before the failure keep their outputs.
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
                    f"{task.label}: its process succeeded but left no manifest for its fingerprint; "
                    f"see the log in {self.log_folder / node.name}"
                )
        reused = {task.partition for task in tasks} - {task.partition for task in pending}
        return [Outcome(task, task.partition in reused) for task in finished]

    def prepare(self, report: Callable[[str], None]) -> None:
        """Prepare the profile's services, once per process; `report` receives lines for the user."""
        if not self._prepared:
            self.hooks.prepare(self.plan.profile, report)
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
        with self.hooks.during(profile, node.name):
            launcher.run(node.module, requests, profile.launch(node.name))
        if node.name == INDEX:
            self.plan.invalidate(INDEX, None)


def _by_configuration(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks grouped by configuration, so that one process loads each model once."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.config.model_dump_json() if task.config else "", []).append(task)
    return [task for group in groups.values() for task in group]
