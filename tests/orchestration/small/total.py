"""The small stage `total`."""

from pipelines.runner.stage import Stage
from tests.orchestration.small.stages import PlainConfig, add_up

STAGE = Stage(name="total", code_version="1", config_type=PlainConfig, produce=add_up)
