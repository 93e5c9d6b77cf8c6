"""The time that a head estimates from the latents, along sampling."""

import json
from pathlib import Path

import pytest

from evaluation.analysis.gate_time import main, scheduled_times
from pipelines.core.errors import ThroughlineError
from tests.training.conftest import TINY_MODEL, TinyData, llm, tiny_data  # noqa: F401
from training.config import SamplerConfig, Strategy
from training.loop.checkpoint import STAGE


def _checkpoint(data: TinyData, gate_signal: str) -> Path:
    model = TINY_MODEL.model_copy(update={"gate_signal": gate_signal})
    training = {"steps": 6, "warmup_steps": 0, "learning_rate": 0.03, "ema_decay": 0.0}
    config = data.config(Strategy.TIME_WISE, **training).model_copy(update={"model": model})
    return STAGE.run(config, data.inputs, data.root, "time_wise").folder


def test_the_command_compares_nominal_and_estimated_times(
    tiny_data: TinyData,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "comparison.json"
    checkpoint = _checkpoint(tiny_data, "estimated")
    main([str(checkpoint), "--steps", "3", "--samples", "4", "--scales", "1", "6", "--json", str(path)])
    comparison = json.loads(path.read_text())
    assert [step["t"] for step in comparison["steps"]] == [
        round(t, 4) for t in scheduled_times(SamplerConfig(num_steps=3, time_shift=3.0))
    ]
    assert comparison["steps"][0]["t"] == 0
    # The first estimate sees only the initial noise, which does not depend on guidance.
    assert comparison["steps"][0]["cfg_1"] == comparison["steps"][0]["cfg_6"]
    assert comparison["steps"][2]["cfg_1"] != comparison["steps"][2]["cfg_6"]
    for name in ("forward", "cfg_1", "cfg_6"):
        errors = [step[name]["mean_absolute_difference"] for step in comparison["steps"]]
        assert comparison["mean_absolute_difference"][name] == pytest.approx(sum(errors) / 3, abs=2e-4)
    assert "cfg_6" in capsys.readouterr().out


def test_a_checkpoint_without_a_head_is_rejected(tiny_data: TinyData) -> None:  # noqa: F811
    with pytest.raises(ThroughlineError, match="gates follow the nominal time"):
        main([str(_checkpoint(tiny_data, "nominal"))])
