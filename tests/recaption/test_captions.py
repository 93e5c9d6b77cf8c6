import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import recaption.captions as captions_module
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageRun
from recaption.captions import STAGE
from recaption.checks import caption_quality
from recaption.config import CaptionsConfig
from tests.plain_stage import plain_stage
from tests.recaption.conftest import POOL, noise_jpeg

pytestmark = pytest.mark.slow


class _ImagesConfig(FrozenConfig):
    rows_per_table: tuple[int, ...] = (10, 7, 0, 9)
    num_broken: int = 0


def _produce(run: StageRun[_ImagesConfig]) -> None:
    index = 0
    for number, count in enumerate(run.config.rows_per_table):
        rows = []
        for _ in range(count):
            image = b"broken" if index < run.config.num_broken else noise_jpeg(index)
            rows.append({"sample_key": f"{index:032x}", "image": image})
            index += 1
        schema = pa.schema({"sample_key": pa.string(), "image": pa.binary()})
        with run.unit(f"{number:05d}") as unit:
            with unit.open(f"images-{number:05d}.parquet", num_rows=count) as stream:
                pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)
            unit.write(f"status-{number:05d}.parquet", b"not a table of images")
            unit.account(rows_in=count, rows_out=count)


def make_images(root, **kwargs) -> StageOutput:
    stage = plain_stage(name="images", code_version="1", config_type=_ImagesConfig, produce=_produce)
    return stage.run(_ImagesConfig(**kwargs), {}, root, partition="00000")


@pytest.fixture
def config(engine_config) -> CaptionsConfig:
    return CaptionsConfig(
        captioner=engine_config, prompt_version="brief-1", max_caption_tokens=8, rows_per_batch=4, pool=POOL
    )


def test_every_image_gets_one_caption_in_table_order(pool, config, tmp_path):
    images = make_images(tmp_path)
    output = STAGE.run(config, {"images": [images]}, tmp_path, "00000")
    assert [path.name for path in output.files(".parquet")] == [f"captions-{number:05d}.parquet" for number in range(4)]
    for path in output.files(".parquet"):
        table = pq.read_table(path)
        keys = pq.read_table(images.path(path.name.replace("captions", "images")), columns=["sample_key"])
        assert table.column("sample_key").to_pylist() == keys.column("sample_key").to_pylist()
        assert set(table.column("prompt_version").to_pylist()) <= {"brief-1"}
        assert set(table.column("finish_reason").to_pylist()) <= {"stop", "length"}
    assert output.manifest.conservation.rows_out == 26
    assert output.manifest.models[0].revision == config.captioner.model.revision
    quality = caption_quality(output)
    assert quality.num_captions == 26
    assert dict(quality.num_flagged) == output.manifest.summary["num_flagged"]


def test_a_killed_run_resumes_and_gives_the_same_bytes(pool, config, tmp_path, monkeypatch):
    images = make_images(tmp_path)
    uninterrupted = STAGE.run(config, {"images": [images]}, tmp_path / "a", "00000")
    written = []
    write_table = captions_module._write_table

    def write_until_killed(run, name, table):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        write_table(run, name, table)

    monkeypatch.setattr(captions_module, "_write_table", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(config, {"images": [images]}, tmp_path / "b", "00000")
    monkeypatch.setattr(
        captions_module, "_write_table", lambda run, name, table: (written.append(name), write_table(run, name, table))
    )
    resumed = STAGE.run(config, {"images": [images]}, tmp_path / "b", "00000")
    assert sorted(written) == ["00000", "00001", "00002", "00003"]  # none was captioned again
    assert resumed.data_version == uninterrupted.data_version


def test_unreadable_images_are_dropped_with_a_reason_up_to_the_limit(pool, config, tmp_path):
    images = make_images(tmp_path, num_broken=1)
    with pytest.raises(ThroughlineError, match=r"images-00000.parquet: 1 of 10 images got no caption, allowed are 2%"):
        STAGE.run(config, {"images": [images]}, tmp_path, "00000")
    output = STAGE.run(config.model_copy(update={"max_failed_share": 0.1}), {"images": [images]}, tmp_path, "00000")
    assert output.manifest.conservation.dropped == {"no_caption": 1}
    dropped = pq.read_table(output.path("dropped.parquet")).to_pylist()
    assert dropped[0]["sample_key"] == f"{0:032x}"


def test_an_unknown_prompt_version_is_rejected(engine_config):
    with pytest.raises(ValueError, match="known: brief-1, dense-1"):
        CaptionsConfig(captioner=engine_config, prompt_version="brief-0")
