"""The stage `trajectory_analysis`: its output for a trained checkpoint, reuse, and the inputs it rejects."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pyarrow.parquet as pq
import pytest

from evaluation.analysis.gate_time import main
from evaluation.analysis.trajectory_analysis import STAGE
from evaluation.config import TrajectoryAnalysisConfig
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from tests.training.conftest import TINY_MODEL, TinyData, llm, tiny_data  # noqa: F401
from training.config import SamplerConfig, Strategy
from training.loop.checkpoint import STAGE as CHECKPOINT


def _checkpoint(data: TinyData, gate_signal: str = "estimated") -> StageOutput:
    model = TINY_MODEL.model_copy(update={"gate_signal": gate_signal})
    training = {"steps": 6, "warmup_steps": 0, "learning_rate": 0.03, "ema_decay": 0.0}
    config = data.config(Strategy.JOINT, **training).model_copy(update={"model": model})
    return CHECKPOINT.run(config, data.inputs, data.root, "joint")


def _config(data: TinyData, **changes: object) -> TrajectoryAnalysisConfig:
    sampler = SamplerConfig(num_steps=3, time_shift=3.0, batch_size=16)
    settings = {"text_encoder": data.llm, "sampler": sampler, "guidance_scales": (1.0, 6.0), "threads": 1, **changes}
    return TrajectoryAnalysisConfig.model_validate(settings)


def _run(data: TinyData, checkpoint: StageOutput, root: Path, **changes: object) -> StageOutput:
    return STAGE.run(_config(data, **changes), {**data.inputs, "checkpoint": [checkpoint]}, root, "joint")


@pytest.fixture(scope="module")
def checkpoint(tiny_data: TinyData) -> StageOutput:  # noqa: F811
    return _checkpoint(tiny_data)


def test_its_numbers_equal_those_of_the_command(
    tiny_data: TinyData,  # noqa: F811
    checkpoint: StageOutput,
    tmp_path: Path,
) -> None:
    output = _run(tiny_data, checkpoint, tmp_path, num_samples=4)
    comparison = json.loads(output.path("times.json").read_bytes())
    path = tmp_path / "comparison.json"
    arguments = ["--steps", "3", "--samples", "4", "--scales", "1", "6", "--json", str(path)]
    main([str(checkpoint.folder), *arguments])
    assert comparison == json.loads(path.read_bytes())
    summary = output.manifest.summary
    assert {name: value for name, value in comparison.items() if name != "steps"} == summary
    assert list(summary["mean_absolute_difference"]) == ["forward", "cfg_1", "cfg_6"]
    rows = pq.read_table(output.path("times.parquet")).to_pylist()
    assert len(rows) == 3 * 3
    for row in rows:
        (step,) = (step for step in comparison["steps"] if step["t"] == row["t"])
        assert {name: row[name] for name in step["cfg_6"]} == step[row["trajectory"]]
    text = "".join(ET.fromstring(output.path("times.svg").read_bytes()).itertext())
    assert "joint: mean time read off the latents" in text and "guidance 6" in text and "held out, noised" in text


def test_a_second_run_is_reused_and_batch_size_does_not_matter(
    tiny_data: TinyData,  # noqa: F811
    checkpoint: StageOutput,
    tmp_path: Path,
) -> None:
    first = _run(tiny_data, checkpoint, tmp_path, num_samples=4)
    again = _run(tiny_data, checkpoint, tmp_path, num_samples=4, threads=None)
    assert again.manifest.environment == first.manifest.environment
    small = SamplerConfig(num_steps=3, time_shift=3.0, batch_size=3)
    split = _run(tiny_data, checkpoint, tmp_path, num_samples=4, sampler=small)
    for name, value in first.manifest.summary["mean_absolute_difference"].items():
        assert split.manifest.summary["mean_absolute_difference"][name] == pytest.approx(value, abs=2e-4)


def test_captions_without_cached_features_are_encoded(
    tiny_data: TinyData,  # noqa: F811
    checkpoint: StageOutput,
    tmp_path: Path,
) -> None:
    cached = _run(tiny_data, checkpoint, tmp_path, num_samples=3)
    encoded = _run(tiny_data.without("text_features"), checkpoint, tmp_path, num_samples=3)
    assert encoded.manifest.fingerprint != cached.manifest.fingerprint
    for name, value in cached.manifest.summary["mean_absolute_difference"].items():
        assert encoded.manifest.summary["mean_absolute_difference"][name] == pytest.approx(value, abs=1e-3)


def test_wrong_inputs_are_rejected(
    tiny_data: TinyData,  # noqa: F811
    checkpoint: StageOutput,
    tmp_path: Path,
) -> None:
    with pytest.raises(ThroughlineError, match="gates follow the nominal time"):
        _run(tiny_data, _checkpoint(tiny_data, "nominal"), tmp_path)
    features = tiny_data.inputs["text_features"]
    other = tiny_data.with_text_features(list(features[:1]), tmp_path / "other")
    with pytest.raises(ThroughlineError, match=r"trained on dataset .*, which holds out other samples"):
        _run(other, checkpoint, tmp_path)
    with pytest.raises(ThroughlineError, match="trained with tiny-llama at"):
        _run(tiny_data, checkpoint, tmp_path, text_encoder={"id": "other", "revision": "1"})
    with pytest.raises(ThroughlineError, match="trajectory_analysis time_wise: got the checkpoint of joint"):
        STAGE.run(_config(tiny_data), {**tiny_data.inputs, "checkpoint": [checkpoint]}, tmp_path, "time_wise")
    with pytest.raises(ValueError, match="expected different scales"):
        _config(tiny_data, guidance_scales=(1.0, 1.0))
