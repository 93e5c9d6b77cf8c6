"""Trackers write the curves of a run, and name the extra that a missing package needs."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.core.config import identity_of
from pipelines.core.errors import ThroughlineError
from tests.training.conftest import TINY_TRAINING
from training.config import TrainingConfig
from training.loop.trackers import Trackers


@pytest.fixture(autouse=True)
def _one_process() -> None:
    PartialState(cpu=True)


def _read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars of a folder as TensorBoard reads them: name -> (step, value)."""
    events = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_reads_the_scalars(tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path / "run", config={})
    trackers.log(4, {"loss/train": 0.75, "omitted": None})
    trackers.log(9, {"loss/train": 0.5, "grad_norm": 2.0})
    trackers.log(10, {"omitted": None})
    assert _read(tmp_path / "run") == {"loss/train": [(4, 0.75), (9, 0.5)], "grad_norm": [(9, 2.0)]}, "flushed at once"
    trackers.close()


def test_tensorboard_discards_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    for resumed_at_step, values in ((None, {0: 1.0, 1: 0.9, 2: 0.8}), (2, {2: 0.7, 3: 0.6})):
        trackers = Trackers(["tensorboard"], tmp_path / "run", config={}, resumed_at_step=resumed_at_step)
        for step, value in values.items():
            trackers.log(step, {"loss": value})
        trackers.close()
        time.sleep(1.1)  # TensorBoard reads files in the order of the second in their names
    assert dict(_read(tmp_path / "run")["loss"]) == pytest.approx({0: 1.0, 1: 0.9, 2: 0.7, 3: 0.6})


class _Recorder(GeneralTracker):
    """Takes the place of Weights & Biases in accelerate's registry."""

    name = "wandb"
    requires_logging_directory = False
    opened: list["_Recorder"] = []  # noqa: RUF012

    def __init__(self, run_name: str, **settings: Any) -> None:
        super().__init__()
        self.run_name, self.settings = run_name, settings
        self.logged: list[tuple[int | None, dict]] = []
        self.is_started = self.is_finished = False
        self.opened.append(self)

    @property
    def tracker(self) -> "_Recorder":
        return self

    def start(self) -> None:
        self.is_started = True

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        assert self.is_started and not self.is_finished
        self.logged.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


def test_several_trackers_get_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", _Recorder)
    monkeypatch.setattr(_Recorder, "opened", [])
    trackers = Trackers(["tensorboard", "wandb"], tmp_path / "run", config={"strategy": "joint"}, resumed_at_step=7)
    trackers.log(7, {"loss": 0.5, "omitted": None})
    trackers.close()
    (recorder,) = _Recorder.opened
    assert recorder.logged == [(7, {"loss": 0.5})]
    assert recorder.is_finished
    assert (recorder.run_name, recorder.settings["id"]) == ("throughline", "run"), "a resumed run keeps its id"
    assert recorder.settings["config"] == {"strategy": "joint"}
    assert _read(tmp_path / "run") == {"loss": [(7, 0.5)]}


def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ThroughlineError,
        match=r"tracker wandb: its package is not installed .*; install throughline\[wandb\], or leave",
    ):
        Trackers(["wandb"], tmp_path / "run", config={})


def test_trackers_are_chosen_by_name_and_are_no_part_of_the_result() -> None:
    chosen = TrainingConfig.model_validate({**TINY_TRAINING.model_dump(), "trackers": ["tensorboard", "wandb"]})
    assert chosen.trackers == ("tensorboard", "wandb")
    assert identity_of(chosen) == identity_of(TINY_TRAINING)
    with pytest.raises(ValueError, match="trackers"):
        TrainingConfig.model_validate({**TINY_TRAINING.model_dump(), "trackers": ["paper"]})
