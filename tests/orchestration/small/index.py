"""The small stage `laion_index`."""

from pipelines.stage import Stage
from tests.orchestration.small.stages import IndexConfig, make_index

STAGE = Stage(name="laion_index", code_version="1", config_type=IndexConfig, produce=make_index)

if __name__ == "__main__":
    from tests.orchestration.small.index import STAGE as stage

    stage.main()
