"""The small stage `fit`."""

from tests.orchestration.small.stages import PlainConfig, note_inputs
from tests.plain_stage import plain_stage

STAGE = plain_stage(name="fit", code_version="1", config_type=PlainConfig, produce=note_inputs)
