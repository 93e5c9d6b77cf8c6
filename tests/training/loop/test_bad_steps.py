"""Bad steps: detected by loss and gradient, skipped without an effect on the weights, and recorded."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.core.errors import ThroughlineError
from tests.training.conftest import TINY_TRAINING, TinyData
from tests.training.loop.test_checkpoint import metrics, run
from training.config import Strategy
from training.data.data_order import DataOrder
from training.data.feature_source import read_splits
from training.loop import loop
from training.loop.bad_steps import BadSteps

KEYS = [f"{index:032x}" for index in range(4)]


def _judge(**training: Any) -> BadSteps:
    return BadSteps(TINY_TRAINING.model_copy(update={"max_loss_jump": 2.0, "loss_jump_window": 3, **training}))


def test_samples_with_non_finite_losses_are_named() -> None:
    judge = _judge()
    bad = judge.judge(7, torch.tensor([1.0, float("nan"), 1.0, float("inf")]), KEYS, 1.0)
    assert bad is not None
    assert (bad.step, bad.reason, bad.sample_keys) == (7, "loss_not_finite", (KEYS[1], KEYS[3]))
    bad = judge.judge(7, torch.tensor([1.0, 3.0, 2.0, 0.5]), KEYS, float("inf"))
    assert bad is not None
    assert (bad.reason, bad.sample_keys[:2]) == ("grad_norm_not_finite", (KEYS[1], KEYS[2]))


def test_a_jump_is_measured_against_the_median_of_the_last_good_steps() -> None:
    judge, high = _judge(), torch.full((4,), 2.5)
    for loss in (1.0, 9.0):
        assert judge.judge(0, high, KEYS, 1.0) is None  # too few steps for a median
        judge.record_good(loss)
    judge.record_good(1.0)
    bad = judge.judge(3, high, KEYS, 1.0)
    assert bad is not None and bad.reason == "loss_jump"
    assert judge.judge(3, torch.full((4,), 2.0), KEYS, 1.0) is None
    again = _judge()
    again.load_state_dict(judge.state_dict())
    for loss in (2.0, 2.0):
        again.record_good(loss)
    assert again.judge(5, high, KEYS, 1.0) is None
    assert _judge(max_loss_jump=None).judge(3, torch.full((4,), 1e9), KEYS, 1.0) is None


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Multiply the losses of some steps by a factor."""

    def multiply(steps: set[int], factor: float) -> None:
        original, original_step, at = loop.batch_losses, loop.train_step, [0]

        def counted(state: loop.TrainingRun, step: int) -> loop.StepResult:
            at[0] = step
            return original_step(state, step)

        def spoiled(model: torch.nn.Module, batch: loop.Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
            losses, head_loss = original(model, batch)
            return losses * (factor if at[0] in steps else 1.0), head_loss

        monkeypatch.setattr(loop, "train_step", counted)
        monkeypatch.setattr(loop, "batch_losses", spoiled)

    return multiply


def _keys_at(data: TinyData, step: int) -> list[str]:
    dataset = data.inputs["dataset"][0]
    split = read_splits(dataset)["train"]
    return [split.key(int(index)) for index in DataOrder(dataset.data_version, 0, 8, len(split)).indices(step)]


def _stopped(data: TinyData, root: Path, at: int, monkeypatch: pytest.MonkeyPatch, **training: Any) -> None:
    current = loop.train_step

    def stopping(state: loop.TrainingRun, step: int) -> loop.StepResult:
        if step == at:
            raise KeyboardInterrupt
        return current(state, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", stopping)
        run(data, root, **training)


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_and_is_recorded(
    tiny_data: TinyData, tmp_path: Path, spoil: Callable[..., None], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    spoil({0, 3}, float("nan"))
    settings: dict[str, Any] = {"on_bad_step": "skip", "checkpoint_every": 1, "keep_checkpoints": 9}
    with caplog.at_level(logging.WARNING):
        _stopped(tiny_data, tmp_path, 5, monkeypatch, **settings)
    assert "step 3 is skipped: loss of" in caplog.text
    folders = sorted(tmp_path.glob("checkpoint/unfinished/*/scratch/snapshots/step-*"))
    before, after, later = (load_file(next(folders[place].glob("*.safetensors"))) for place in (2, 3, 4))
    moving = [name for name in before if not name.startswith("ledger.")]
    assert all(torch.equal(before[name], after[name]) for name in moving)
    assert not any(torch.equal(after[name], later[name]) for name in moving if ".blocks.0." in name)
    assert int(after["ledger.times_seen"].sum()) == int(before["ledger.times_seen"].sum()) + 8
    resumed = run(tiny_data, tmp_path, **settings)
    assert resumed.manifest.measurements["resumed_at_step"] == 5
    rows = metrics(resumed)
    assert [row["step"] for row in rows if "skipped" in row] == [0, 3]
    assert (rows[3]["loss"], rows[3]["grad_norm"]) == (None, None)
    summary = resumed.manifest.summary
    assert summary["num_skipped_steps"] == 2
    assert summary["skipped_steps"][1] == {
        "step": 3, "reason": "loss_not_finite", "sample_keys": _keys_at(tiny_data, 3),
    }  # fmt: skip
    assert summary["first_loss"] == rows[1]["loss"]
    undisturbed = run(tiny_data, tmp_path / "whole", **settings)
    assert undisturbed.data_version == resumed.data_version


@pytest.mark.slow
def test_a_resumed_run_judges_a_jump_like_an_uninterrupted_one(
    tiny_data: TinyData, tmp_path: Path, spoil: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil({4}, 20.0)
    settings: dict[str, Any] = {"on_bad_step": "skip", "max_loss_jump": 5.0, "loss_jump_window": 3}
    whole = run(tiny_data, tmp_path / "whole", Strategy.JOINT, **settings)
    assert [row["step"] for row in metrics(whole) if "skipped" in row] == [4]
    assert whole.manifest.summary["skipped_steps"][0]["reason"] == "loss_jump"
    _stopped(tiny_data, tmp_path, 4, monkeypatch, **settings)
    resumed = run(tiny_data, tmp_path, **settings)
    assert resumed.manifest.summary["num_skipped_steps"] == 1
    assert resumed.data_version == run(tiny_data, tmp_path / "static", **settings).data_version
    with pytest.raises(ThroughlineError, match=r"step 4: loss .* against a median of .* over the last 3 steps"):
        run(tiny_data, tmp_path, Strategy.JOINT, **settings | {"on_bad_step": "stop"})


def test_too_many_in_a_row_stop_the_run(tiny_data: TinyData, tmp_path: Path, spoil: Callable[..., None]) -> None:
    spoil({1, 3, 4}, float("inf"))
    with pytest.raises(ThroughlineError, match=r"step 4: .*this is bad step 2 in a row"):
        run(tiny_data, tmp_path, on_bad_step="skip", max_bad_steps_in_row=2)
