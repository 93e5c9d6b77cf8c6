"""The small stage `total`."""

from tests.orchestration.small.stages import PlainConfig, add_up
from tests.plain_stage import plain_stage

STAGE = plain_stage(name="total", code_version="1", config_type=PlainConfig, produce=add_up)
