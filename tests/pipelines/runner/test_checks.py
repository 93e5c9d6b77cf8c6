import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.core.config import FrozenConfig
from pipelines.runner.checks import (
    Check,
    CheckResult,
    SiblingsCheck,
    check_conservation,
    check_digests,
    conservation_problems,
    run_check,
)
from pipelines.runner.outputs import StageOutput
from pipelines.runner.preview import table_cell, thumbnail
from pipelines.runner.units import StageRun
from tests.plain_stage import plain_stage


def _produce(run: StageRun[FrozenConfig]) -> None:
    with run.unit("00000") as unit:
        unit.write("rows.bin", b"rows", num_rows=2)
        unit.drop("c", "too_small")
        unit.account(rows_in=3, rows_out=2)


@pytest.fixture
def output(tmp_path: Path) -> StageOutput:
    stage = plain_stage(name="small", code_version="1", config_type=FrozenConfig, produce=_produce)
    return stage.run(FrozenConfig(), {}, tmp_path)


def test_a_sound_output_passes(output: StageOutput) -> None:
    result = check_conservation(output)
    assert result.passed
    assert result.numbers == {"rows_in": 3, "rows_out": 2, "dropped_too_small": 1}
    assert check_digests(output, read_bytes=True).passed


def test_only_reading_the_bytes_finds_a_flipped_bit(output: StageOutput) -> None:
    path = output.path("rows.bin")
    path.write_bytes(b"rowt")
    result = check_digests(output, read_bytes=True)
    assert not result.passed and str(path) in result.message
    assert result.numbers["num_damaged"] == 1
    assert check_digests(output, read_bytes=False).passed


def test_drops_that_differ_from_the_manifest_are_reported(output: StageOutput) -> None:
    table = pa.table({"sample_key": ["c"], "reason": ["another"], "detail": [""], "unit": ["00000"]})
    pq.write_table(table, output.path("dropped.parquet"))
    assert conservation_problems(output) == [
        "dropped.parquet lists {'another': 1}, the manifest counts {'too_small': 1}"
    ]
    assert not check_conservation(output).passed


def test_a_check_of_siblings_gets_all_of_them_and_unknown_numbers_are_left_out(output: StageOutput) -> None:
    def count(outputs: Sequence[StageOutput]) -> CheckResult:
        return CheckResult(True, "", {"num_outputs": len(outputs), "unknown": None})

    check = SiblingsCheck(name="count", description="", function=count)
    assert run_check(check, output, lambda: [output, output]).numbers == {"num_outputs": 2}
    single = Check(name="partition", description="", function=lambda item: CheckResult(False, item.manifest.stage))
    assert run_check(single, output, list).message == "small"


def test_thumbnails_embed_the_image_and_escape_the_alt_text() -> None:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (256, 128), "red").save(stream, "PNG")
    text = thumbnail(stream.getvalue(), "a ](javascript:x) cow")
    assert text.startswith("![a javascriptx cow](data:image/jpeg;base64,")
    assert len(text) < 4000
    assert table_cell("a | b\nc") == "a / b c"
