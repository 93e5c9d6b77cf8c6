"""Experiment trackers: the curves of a run as TensorBoard files or on Weights & Biases, through accelerate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from pipelines.core.errors import ThroughlineError

_PROJECT = "throughline"
_EXTRAS = {"wandb": "throughline[wandb]"}
"""Trackers whose package is an optional extra."""


class Trackers:
    """The open trackers of a run, on its main process."""

    def __init__(
        self, names: Sequence[str], folder: Path, *, config: Mapping[str, Any], resumed_at_step: int | None = None
    ) -> None:
        """Open the trackers by name; files go into `folder`, whose name is that of the run.

        With `resumed_at_step` TensorBoard discards that step and later ones of earlier files in the folder. Raises
        ThroughlineError where a tracker's package is not installed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._trackers = [self._open(name, folder, config, resumed_at_step) for name in names]

    @staticmethod
    def _open(name: str, folder: Path, config: Mapping[str, Any], resumed_at_step: int | None) -> GeneralTracker:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            tracker = tracker_class(folder.name, folder.parent, purge_step=resumed_at_step)
        else:
            # One id per folder, so that a resumed run continues its curves.
            tracker = tracker_class(
                _PROJECT, name=folder.name, id=folder.name, dir=str(folder), resume="allow", config=dict(config)
            )
        try:
            tracker.start()
        except ModuleNotFoundError as error:
            raise ThroughlineError(
                f"tracker {name}: its package is not installed ({error}); install {_EXTRAS.get(name, name)}, or leave "
                f"{name} out of training.trackers"
            ) from error
        return tracker

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log the values that are not None."""
        known = {name: value for name, value in values.items() if value is not None}
        if known:
            for tracker in self._trackers:
                tracker.log(known, step=step)

    def close(self) -> None:
        """Write out and close all trackers."""
        for tracker in self._trackers:
            tracker.finish()
