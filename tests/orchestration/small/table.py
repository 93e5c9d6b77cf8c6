"""The small stage `table`."""

from tests.orchestration.small.stages import PlainConfig, note_inputs
from tests.plain_stage import plain_stage

STAGE = plain_stage(name="table", code_version="1", config_type=PlainConfig, produce=note_inputs)
