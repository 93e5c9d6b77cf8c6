"""The small stage `laion_index`."""

from tests.orchestration.small.stages import IndexConfig, make_index
from tests.plain_stage import plain_stage

STAGE = plain_stage(name="laion_index", code_version="1", config_type=IndexConfig, produce=make_index)
