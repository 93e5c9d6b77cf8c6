from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from features.inspection import check_finite
from pipelines.core.config import FrozenConfig
from pipelines.runner.units import StageRun
from tests.plain_stage import plain_stage


class _Config(FrozenConfig):
    with_nan: bool = False


def _produce(run: StageRun[_Config]) -> None:
    values = np.ones((4, 8), np.float16)
    if run.config.with_nan:
        values[2, 3] = np.nan
    with run.unit("00000") as unit:
        save_file({"mean": values}, run.scratch / "latents.safetensors")
        unit.adopt(run.scratch / "latents.safetensors", "latents-00000.safetensors")


def test_the_check_names_the_file_with_nan(tmp_path: Path) -> None:
    stage = plain_stage(name="latents", code_version="1", config_type=_Config, produce=_produce)
    assert check_finite(stage.run(_Config(), {}, tmp_path)).passed
    result = check_finite(stage.run(_Config(with_nan=True), {}, tmp_path))
    assert not result.passed
    assert result.message == "latents-00000.safetensors: 1 values are NaN or infinite"
