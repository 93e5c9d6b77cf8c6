"""Snapshots of unfinished runs are written atomically and verified."""

import logging
from pathlib import Path

import pytest
import torch

from training.loop.snapshots import Snapshots


def _save(snapshots: Snapshots, *steps: int) -> None:
    for step in steps:
        snapshots.save(step, {"weights": torch.full((100,), float(step))}, {"consumption_digest": f"{step:02x}"})


def test_the_newest_is_loaded_and_the_last_few_are_retained(tmp_path: Path) -> None:
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


def test_snapshots_at_multiples_of_keep_every_outlast_newer_ones(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, keep=2, keep_every=10)
    _save(snapshots, 5, 10, 15, 20, 25, 30, 35)
    assert [int(path.name[-2:]) for path in sorted(tmp_path.iterdir())] == [10, 20, 30, 35]


@pytest.mark.parametrize("damage", [None, "missing piece", "flipped byte"])
def test_large_snapshots_are_split(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str | None) -> None:
    snapshots = Snapshots(tmp_path, keep=2, max_shard_bytes=1000)
    tensors = {name: torch.full((200,), float(place)) for place, name in enumerate("abc")}
    _save(snapshots, 5)
    folder = snapshots.save(10, tensors | {"d": torch.tensor(1)}, {"seen": 1})
    pieces = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in pieces] == [f"tensors-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    if damage == "missing piece":
        pieces[1].unlink()
    elif damage == "flipped byte":
        pieces[1].write_bytes(pieces[1].read_bytes()[:-1] + b"\xff")
    newest = snapshots.load_newest()
    assert newest is not None
    if damage is None:
        assert (newest.num_steps_done, newest.state) == (10, {"seen": 1})
        assert {name: tensor.tolist() for name, tensor in newest.tensors.items()} == {
            name: tensor.tolist() for name, tensor in (tensors | {"d": torch.tensor(1)}).items()
        }
    else:
        assert newest.num_steps_done == 5
        assert pieces[1].name in caplog.text


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = Snapshots(tmp_path, keep=2)
    _save(snapshots, 5)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.loop.snapshots._sync_file", killed)
    with pytest.raises(KeyboardInterrupt):
        _save(snapshots, 10)
    newest = snapshots.load_newest()
    assert newest is not None
    assert newest.num_steps_done == 5
    monkeypatch.undo()
    _save(snapshots, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000005", "step-000000010"]
