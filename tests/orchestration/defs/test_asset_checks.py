import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from orchestration.defs.asset_checks import (
    conservation_problems,
    look_at_conservation,
    look_at_digests,
    look_at_duplicate_keys,
    look_for_nan,
)
from orchestration.defs.metadata import conservation_table, describe, picture
from pipelines.core.config import FrozenConfig
from pipelines.runner.outputs import StageOutput
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageRun


class _Config(FrozenConfig):
    keys: tuple[str, ...] = ("a", "b")
    with_nan: bool = False


def _produce(run: StageRun[_Config]) -> None:
    with run.unit("00000") as unit:
        with unit.open("samples.parquet", num_rows=len(run.config.keys)) as stream:
            pq.write_table(pa.table({"sample_key": list(run.config.keys)}), stream)
        values = np.ones((4, 8), np.float16)
        if run.config.with_nan:
            values[2, 3] = np.nan
        save_file({"mean": values}, run.scratch / "latents.safetensors")
        unit.adopt(run.scratch / "latents.safetensors", "latents-00000.safetensors")
        unit.drop("c", "too_small")
        unit.account(rows_in=len(run.config.keys) + 1, rows_out=len(run.config.keys))


STAGE = Stage(name="small", code_version="1", config_type=_Config, produce=_produce)
PLAN: Any = SimpleNamespace(profile=SimpleNamespace(check_bytes=True))


def _task(root: Path, **config: Any) -> Any:
    output = STAGE.run(_Config(**config), {}, root)
    return SimpleNamespace(node=SimpleNamespace(name="small"), partition=None, inputs={}, output=output)


def _output(task: Any) -> StageOutput:
    return task.output


def test_sound_output_passes_every_look(tmp_path: Path) -> None:
    task = _task(tmp_path)
    for look in (look_at_conservation, look_at_digests, look_at_duplicate_keys, look_for_nan):
        assert look(PLAN, task).passed, look.__name__


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    task = _task(tmp_path)
    path = _output(task).path("latents-00000.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    finding = look_at_digests(PLAN, task)
    assert not finding.passed and str(path) in finding.sentence
    sizes_alone: Any = SimpleNamespace(profile=SimpleNamespace(check_bytes=False))
    assert look_at_digests(sizes_alone, task).passed


def test_a_key_that_stands_twice_is_found(tmp_path: Path) -> None:
    finding = look_at_duplicate_keys(PLAN, _task(tmp_path, keys=("a", "b", "a")))
    assert not finding.passed and finding.numbers["num_duplicates"] == 1


def test_nan_is_found_without_torch(tmp_path: Path) -> None:
    finding = look_for_nan(PLAN, _task(tmp_path, with_nan=True))
    assert not finding.passed
    assert finding.sentence == "latents-00000.safetensors: 1 values are NaN or infinite"


def test_drops_that_are_not_listed_are_found(tmp_path: Path) -> None:
    output = _output(_task(tmp_path))
    table = pa.table({"sample_key": ["c"], "reason": ["another"], "detail": [""], "unit": ["00000"]})
    pq.write_table(table, output.path("dropped.parquet"))
    assert conservation_problems(output) == [
        "dropped.parquet lists {'another': 1}, the manifest counts {'too_small': 1}"
    ]


def test_metadata_holds_counts_and_the_conservation_table(tmp_path: Path) -> None:
    task = _task(tmp_path)
    metadata = describe(task, reused=False)
    assert metadata["dagster/row_count"] == 2
    assert "| dropped: too_small | 1 |" in conservation_table(_output(task))
    assert metadata["data_version"] == _output(task).data_version


def test_pictures_carry_their_own_bytes_and_harmless_words() -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (256, 128), "red").save(stream, "PNG")
    text = picture(stream.getvalue(), "a ](javascript:x) cow")
    assert text.startswith("![a javascriptx cow](data:image/jpeg;base64,")
    assert len(text) < 4000
