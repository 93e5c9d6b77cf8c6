"""The small stage `kept`."""

from pipelines.runner.stage import Stage
from tests.orchestration.small.stages import KeepConfig, keep

STAGE = Stage(name="kept", code_version="1", config_type=KeepConfig, produce=keep)
