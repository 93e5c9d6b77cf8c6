"""Snapshots of unfinished runs: whole or not at all."""

import logging
from pathlib import Path

import pytest
import torch

from training.snapshots import Snapshots


def _save(snapshots: Snapshots, *steps: int) -> None:
    for step in steps:
        snapshots.save(step, {"weights": torch.full((100,), float(step))}, {"consumption_digest": f"{step:02x}"})


def test_the_newest_is_loaded_and_the_last_few_are_kept(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, keep=2)
    assert snapshots.load_newest() is None
    _save(snapshots, 5, 10, 15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000010", "step-000000015"]
    newest = snapshots.load_newest()
    assert newest is not None
    assert newest.num_steps_done == 15
    assert newest.state == {"consumption_digest": "0f"}
    assert newest.tensors["weights"].tolist() == [15.0] * 100


@pytest.mark.parametrize("damage", ["flipped byte", "cut tensors", "cut state", "no tensors", "state of another kind"])
def test_a_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    snapshots = Snapshots(tmp_path, keep=2)
    _save(snapshots, 5, 10)
    tensors, state = (tmp_path / "step-000000010" / name for name in ("tensors.safetensors", "state.json"))
    data = tensors.read_bytes()
    match damage:
        case "flipped byte":
            tensors.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        case "cut tensors":
            tensors.write_bytes(data[:50])
        case "cut state":
            state.write_text(state.read_text()[:20])
        case "no tensors":
            tensors.unlink()
        case _:
            state.write_text("[]")
    with caplog.at_level(logging.WARNING):
        newest = snapshots.load_newest()
    assert newest is not None
    assert newest.num_steps_done == 5
    assert "step-000000010" in caplog.text
    assert "going back" in caplog.text
    assert snapshots.load_newest() is not None


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = Snapshots(tmp_path, keep=2)
    _save(snapshots, 5)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.snapshots._sync_file", killed)
    with pytest.raises(KeyboardInterrupt):
        _save(snapshots, 10)
    newest = snapshots.load_newest()
    assert newest is not None
    assert newest.num_steps_done == 5
    monkeypatch.undo()
    _save(snapshots, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000005", "step-000000010"]
