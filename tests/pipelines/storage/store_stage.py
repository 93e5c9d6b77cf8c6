"""A stage of one small and one large file, and a program that runs it on an output root in an object store."""

import sys
from pathlib import Path
from typing import Any

from pipelines.runner.units import StageRun
from pipelines.storage.mirror import bind
from tests.pipelines.runner.toy_stage import ToyConfig
from tests.plain_stage import plain_stage
from tests.s3_server import PART_BYTES, config_of

NUM_BYTES = 2 * PART_BYTES + 77


def produce(run: StageRun[ToyConfig]) -> None:
    """Write ``first.bin``, its sidecar, and ``large.bin`` of three parts; append a byte to `count_file`."""
    if run.config.count_file:
        with Path(run.config.count_file).open("a") as stream:
            stream.write("x")
    with run.unit("files") as unit:
        unit.write("first.bin", b"first" * run.config.value)
        unit.write("first.index.json", b"{}")
        unit.write("large.bin", bytes(range(256)) * (NUM_BYTES // 256) + bytes(NUM_BYTES % 256))


STAGE = plain_stage(name="stored", code_version="1", config_type=ToyConfig, produce=produce)


def mirrored(root: Path, bucket: str, **changes: Any) -> Path:
    """Return `root` as a working folder of the bucket."""
    bind(root, config_of(bucket, **changes))
    return root


if __name__ == "__main__":
    folder, name, count = sys.argv[1:]
    from tests.pipelines.storage import store_stage  # by its own name, so that the stage is that of the test

    print(store_stage.STAGE.run(ToyConfig(count_file=count), {}, mirrored(Path(folder), name)).data_version)
