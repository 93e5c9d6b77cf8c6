"""Samples: images from real checkpoints of tiny models by the real sampler."""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from evaluation.benchmarks import samples
from evaluation.benchmarks.prompt_files import EvaluationPrompt
from evaluation.benchmarks.samples import STAGE
from evaluation.config import SamplesConfig
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import Inputs, StageOutput
from training.config import SamplerConfig, Strategy


@pytest.fixture
def config(encoder: ModelRef, autoencoder: ModelRef) -> SamplesConfig:
    return SamplesConfig(
        text_encoder=encoder,
        autoencoder=autoencoder,
        sampler=SamplerConfig(num_steps=3, guidance_scale=3.0, batch_size=4),
        images_per_prompt={"geneval": 2, "genai_bench": 1, "drawbench": 1},
        prompts_per_unit=3,
        threads=1,
    )


def inputs(checkpoint: StageOutput, prompts: StageOutput) -> Inputs:
    return {"checkpoint": [checkpoint], "prompt_sets": [prompts]}


def pixels(output: StageOutput) -> dict[str, bytes]:
    rows = pq.read_table(output.path("samples.parquet")).to_pylist()
    return {row["path"]: Image.open(output.path(row["path"])).tobytes() for row in rows}


def test_every_prompt_gets_its_images_with_digests(
    config: SamplesConfig, checkpoints: dict[Strategy, StageOutput], prompts: StageOutput, tmp_path: Path
) -> None:
    output = STAGE.run(config, inputs(checkpoints[Strategy.STATIC], prompts), tmp_path, "static|geneval")
    rows = pq.read_table(output.path("samples.parquet")).to_pylist()
    assert [(row["prompt_id"], row["sample_index"]) for row in rows] == [
        (f"geneval-{prompt:05d}", index) for prompt in range(6) for index in range(2)
    ]
    for row in rows:
        data = output.path(row["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert Image.open(output.path(row["path"])).size == (32, 32)
    table = output.manifest.conservation
    assert table is not None
    assert (table.rows_in, table.rows_out) == (12, 12)
    assert len(set(pixels(output).values())) == 12


def test_a_killed_run_resumes_and_gives_the_same_bytes(
    config: SamplesConfig,
    checkpoints: dict[Strategy, StageOutput],
    prompts: StageOutput,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = inputs(checkpoints[Strategy.JOINT], prompts)
    uninterrupted = STAGE.run(config, given, tmp_path / "a", "joint|geneval")
    real, made = samples.png_bytes, []

    def killed_at_the_ninth(image: Image.Image) -> bytes:
        made.append(image)
        if len(made) == 9:
            raise KeyboardInterrupt
        return real(image)

    monkeypatch.setattr(samples, "png_bytes", killed_at_the_ninth)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(config, given, tmp_path / "b", "joint|geneval")
    made.clear()
    made += [Image.new("RGB", (1, 1))] * 9
    resumed = STAGE.run(config, given, tmp_path / "b", "joint|geneval")
    assert len(made) == 9 + 6  # the first unit, three prompts with two images each, is reused
    assert resumed.data_version == uninterrupted.data_version


def test_arms_share_loaded_models_and_encoded_prompts(
    config: SamplesConfig,
    checkpoints: dict[Strategy, StageOutput],
    prompts: StageOutput,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import training.data.feature_source
    import training.sampling.sampler

    loaded: list[str] = []
    for module, name in (
        (training.data.feature_source, "load_text_encoder"),
        (training.sampling.sampler, "load_autoencoder"),
    ):
        real = getattr(module, name)

        def counting(*args: object, real: object = real, name: str = name) -> object:
            loaded.append(name)
            return real(*args)  # type: ignore[operator]

        monkeypatch.setattr(module, name, counting)
    samples._text_encoder.cache_clear()
    samples._autoencoder.cache_clear()
    alone = STAGE.run(config, inputs(checkpoints[Strategy.UNIFORM], prompts), tmp_path / "a", "uniform|drawbench")
    for strategy in (Strategy.STATIC, Strategy.UNIFORM):
        output = STAGE.run(config, inputs(checkpoints[strategy], prompts), tmp_path / "b", f"{strategy}|drawbench")
    assert sorted(loaded) == ["load_autoencoder", "load_text_encoder"]
    assert output.data_version == alone.data_version


def test_the_shifted_arm_gives_other_images_from_the_same_checkpoint(
    config: SamplesConfig, checkpoints: dict[Strategy, StageOutput], prompts: StageOutput, tmp_path: Path
) -> None:
    given = inputs(checkpoints[Strategy.TIME_WISE], prompts)
    plain = STAGE.run(config, given, tmp_path, "time_wise|drawbench")
    shifted = STAGE.run(config, given, tmp_path, "time_wise+shift|drawbench")
    assert pixels(plain).keys() == pixels(shifted).keys()
    assert pixels(plain) != pixels(shifted)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ("joint|geneval", "got the checkpoint of static"),
        ("static+shift|geneval", "needs a time gate"),
        ("mean|geneval", "unknown strategy"),
        ("static|imagenet", "expected '<arm>|<benchmark>'"),
        (None, "expected '<arm>|<benchmark>'"),
    ],
)
def test_a_wrong_partition_is_rejected(
    config: SamplesConfig,
    checkpoints: dict[Strategy, StageOutput],
    prompts: StageOutput,
    tmp_path: Path,
    partition: str | None,
    message: str,
) -> None:
    with pytest.raises(ThroughlineError) as caught:
        STAGE.run(config, inputs(checkpoints[Strategy.STATIC], prompts), tmp_path, partition)
    assert message in str(caught.value)


@pytest.mark.parametrize("killed", [False, True])
def test_truncated_prompts_are_counted_and_warned_about(
    killed: bool,
    config: SamplesConfig,
    checkpoints: dict[Strategy, StageOutput],
    prompts: StageOutput,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = samples.read_prompts

    def lengthened(output: StageOutput, benchmark: str | None = None) -> list[EvaluationPrompt]:
        """Return six prompts, of which the second and the last are longer than 512 tokens."""
        return [
            replace(prompt, prompt=prompt.prompt + " dog" * 600 * (index in (1, 5)))
            for index, prompt in enumerate(real(output, benchmark))
        ]

    monkeypatch.setattr(samples, "read_prompts", lengthened)
    given = inputs(checkpoints[Strategy.STATIC], prompts)
    if killed:  # after the first unit of three prompts
        draw = samples._sample
        chunks: list[object] = []

        def killed_at_the_second(*args: object) -> object:
            chunks.append(args)
            if len(chunks) == 2:
                raise KeyboardInterrupt
            return draw(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(samples, "_sample", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            STAGE.run(config, given, tmp_path, "static|geneval")
    with caplog.at_level(logging.WARNING):
        output = STAGE.run(config, given, tmp_path, "static|geneval")
    assert output.manifest.summary["num_truncated_prompts"] == 2
    (message,) = [record.getMessage() for record in caplog.records if record.name == samples.__name__]
    assert "samples static|geneval: 2 prompts, such as geneval-00001, are longer" in message
    assert "512 tokens" in message and "shorten them" in message


def test_complete_prompts_give_no_warning(
    config: SamplesConfig,
    checkpoints: dict[Strategy, StageOutput],
    prompts: StageOutput,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = STAGE.run(config, inputs(checkpoints[Strategy.STATIC], prompts), tmp_path, "static|geneval")
    assert output.manifest.summary["num_truncated_prompts"] == 0
    assert "longer" not in caplog.text
