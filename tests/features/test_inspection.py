from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from features.inspection import check_finite, count_not_finite
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


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_infinity_and_nan_are_counted_in_float_types_only(tmp_path: Path, dtype: type) -> None:
    values = np.array([1.0, -np.inf, np.inf, np.nan, 0.0, np.finfo(dtype).max], dtype)
    save_file({"x": values, "ids": np.array([-1], np.int64)}, tmp_path / "x.safetensors")
    assert count_not_finite(tmp_path / "x.safetensors") == 3


def test_bfloat16_is_counted_as_torch_counts_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_tensors

    values = torch.tensor([1.0, float("nan"), float("inf"), -3e38, 0.0], dtype=torch.bfloat16)
    save_tensors({"x": values}, tmp_path / "x.safetensors")
    assert count_not_finite(tmp_path / "x.safetensors") == int((~torch.isfinite(values)).sum())
