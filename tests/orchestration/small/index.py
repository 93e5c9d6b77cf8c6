"""The small stage `laion_index`."""

from pipelines.runner.stage import Stage
from tests.orchestration.small.stages import IndexConfig, make_index

STAGE = Stage(name="laion_index", code_version="1", config_type=IndexConfig, produce=make_index)
