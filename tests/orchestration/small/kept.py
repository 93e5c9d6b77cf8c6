"""The small stage `kept`."""

from pipelines.stage import Stage
from tests.orchestration.small.stages import KeepConfig, keep

STAGE = Stage(name="kept", code_version="1", config_type=KeepConfig, produce=keep)

if __name__ == "__main__":
    from tests.orchestration.small.kept import STAGE as stage

    stage.main()
