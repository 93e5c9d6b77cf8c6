import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.core.config import FrozenConfig
from pipelines.download.inspection import preview_images
from pipelines.runner.outputs import StageOutput
from pipelines.runner.preview import NUM_IMAGES
from pipelines.runner.units import StageRun
from recaption.preview import preview_captions
from tests.plain_stage import plain_stage


def _output(root: Path, name: str, tables: Mapping[str, Mapping[str, Sequence[object]]]) -> StageOutput:
    def produce(run: StageRun[FrozenConfig]) -> None:
        with run.unit("all") as unit:
            for file, columns in tables.items():
                with unit.open(file) as stream:
                    pq.write_table(pa.table(dict(columns)), stream)

    stage = plain_stage(name=name, code_version="1", config_type=FrozenConfig, produce=produce)
    return stage.run(FrozenConfig(), {}, root)


def _jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "JPEG")
    return stream.getvalue()


def test_previews_show_the_first_images_with_their_own_captions(tmp_path: Path) -> None:
    keys = [f"{number:032x}" for number in range(NUM_IMAGES + 3)]
    alt_texts = [f"text {number}" for number in range(len(keys))]
    rows = {"sample_key": keys, "alt_text": alt_texts, "image": [_jpeg()] * len(keys)}
    images = _output(tmp_path, "images", {"images-00000.parquet": rows, "status-00000.parquet": {"sample_key": keys}})
    captions = [f"caption | {number}" for number in range(len(keys))]
    table = {"sample_key": keys[::-1], "caption": captions[::-1]}
    captioned = _output(tmp_path, "captions", {"captions-00000.parquet": table})
    assert preview_images(images, {}).count("data:image/jpeg;base64,") == NUM_IMAGES
    lines = preview_captions(captioned, {"images": [images]}).splitlines()[2:]
    assert len(lines) == NUM_IMAGES
    assert lines[3].endswith("| text 3 | caption / 3 |"), "a row that contains a separator stays one row"
