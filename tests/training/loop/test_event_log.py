"""Event files, byte for byte as TensorBoard's own writer makes them."""

from pathlib import Path

from training.loop.event_log import EventLog

# tensorboard 2.21: RecordWriter on three Events at times 1.5, 2.5 and 3.5: the file's version, SessionLog START at step
# 300, and the scalars loss/train 0.75 and grad_norm 2 at step 300.
WRITTEN_BY_TENSORBOARD = bytes.fromhex(
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "100000000000000095fbfe1809000000000000044010ac023a0208017d05b37d"
    "33000000000000000ca72056090000000000000c4010ac022a250a110a0a6c6f73732f747261696e150000403f"
    "0a100a09677261645f6e6f726d1500000040406a2dd1"
)


def test_event_files_are_those_of_tensorboard(tmp_path: Path) -> None:
    times = iter([0.0, 1.5, 2.5, 3.5])
    log = EventLog(tmp_path / "run", resumed_at_step=300, clock=lambda: next(times))
    log.scalars(300, {"loss/train": 0.75, "left out": None, "grad_norm": 2.0})
    log.scalars(301, {"left out": None})
    log.close()
    (path,) = (tmp_path / "run").iterdir()
    assert "tfevents" in path.name
    assert path.read_bytes() == WRITTEN_BY_TENSORBOARD
