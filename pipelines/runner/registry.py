"""Finds stages: by name among the installed entry points, or by the module that defines one."""

import importlib
from importlib.metadata import entry_points
from typing import Any

from pipelines.core.errors import ThroughlineError
from pipelines.runner.stage import Stage

GROUP = "throughline.stages"
"""Entry points ``name = "module:STAGE"`` of this project, and of any package that adds stages."""


def is_installed(name: str) -> bool:
    """Return whether a stage of that name is among the installed entry points."""
    return name in entry_points(group=GROUP).names


def load_stage(name: str) -> Stage[Any]:
    """Return the stage of that name, or the ``STAGE`` of that dotted module.

    Raises ThroughlineError if there is none.
    """
    if "." in name:
        stage = getattr(importlib.import_module(name), "STAGE", None)
    else:
        points = entry_points(group=GROUP)
        if name not in points.names:
            known = ", ".join(sorted(points.names)) or "none; is the project installed?"
            raise ThroughlineError(f"no stage {name!r}; installed stages: {known}")
        stage = points[name].load()
    if not isinstance(stage, Stage):
        raise ThroughlineError(f"{name}: defines no stage; name a stage, or a module with a STAGE")
    return stage
