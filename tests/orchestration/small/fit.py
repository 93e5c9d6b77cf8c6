"""The small stage `fit`."""

from pipelines.runner.stage import Stage
from tests.orchestration.small.stages import PlainConfig, note_inputs

STAGE = Stage(name="fit", code_version="1", config_type=PlainConfig, produce=note_inputs)
