"""The small stage `kept`."""

from tests.orchestration.small.stages import KeepConfig, keep
from tests.plain_stage import plain_stage

STAGE = plain_stage(name="kept", code_version="1", config_type=KeepConfig, produce=keep)
