"""The small stage `fit`."""

from pipelines.stage import Stage
from tests.orchestration.small.stages import PlainConfig, note_inputs

STAGE = Stage(name="fit", code_version="1", config_type=PlainConfig, produce=note_inputs)

if __name__ == "__main__":
    from tests.orchestration.small.fit import STAGE as stage

    stage.main()
