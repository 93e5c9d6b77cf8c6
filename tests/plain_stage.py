"""Stages for tests that care about running one, not about how its outputs are shown."""

from typing import Any

from pipelines.runner.rows import NO_ROWS
from pipelines.runner.stage import Stage

_NONE = {
    "description": "A stage of the tests.",
    "rows": NO_ROWS,
    "checks": (),
    "preview": None,
    "funnel_label": None,
    "cost": None,
}


def plain_stage(**fields: Any) -> Stage[Any]:
    """Return a stage that states "none" for each descriptive field that is not given."""
    return Stage(**{**_NONE, **fields})
