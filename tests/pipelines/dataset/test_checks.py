from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.core.config import FrozenConfig
from pipelines.dataset.checks import check_duplicate_keys
from pipelines.runner.units import StageRun
from tests.plain_stage import plain_stage


@pytest.mark.parametrize(("keys", "num_duplicates"), [(["a", "b"], 0), (["a", "b", "a"], 1)])
def test_duplicate_keys_fail_the_check(tmp_path: Path, keys: list[str], num_duplicates: int) -> None:
    def produce(run: StageRun[FrozenConfig]) -> None:
        with run.unit("all") as unit, unit.open("samples.parquet") as stream:
            pq.write_table(pa.table({"sample_key": keys}), stream)

    stage = plain_stage(name="dataset", code_version="1", config_type=FrozenConfig, produce=produce)
    result = check_duplicate_keys(stage.run(FrozenConfig(), {}, tmp_path))
    assert result.passed is (num_duplicates == 0)
    assert result.numbers == {"num_samples": len(keys), "num_duplicates": num_duplicates}
