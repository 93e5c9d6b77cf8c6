"""A finished checkpoint's weights in several files: read like one, and a missing file is named."""

from pathlib import Path

import pytest
import torch

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from tests.training.conftest import TinyData
from tests.training.loop.test_checkpoint import run
from training.config import Strategy
from training.models.saved_model import load_model
from training.models.weight_files import INDEX_NAME, read_weights


@pytest.fixture
def split(tiny_data: TinyData, tmp_path: Path) -> StageOutput:
    return run(tiny_data, tmp_path / "split", Strategy.JOINT, max_shard_bytes=50_000)


def test_split_weights_are_those_of_one_file(split: StageOutput, tiny_data: TinyData, tmp_path: Path) -> None:
    whole = run(tiny_data, tmp_path / "whole", Strategy.JOINT)
    pieces = split.files(".safetensors")
    assert len(pieces) > 3
    assert max(path.stat().st_size for path in pieces) < 60_000
    assert not (split.folder / "model.safetensors").exists()
    assert not (whole.folder / INDEX_NAME).exists()
    one, several = load_model(whole).model.state_dict(), load_model(split).model.state_dict()
    assert all(torch.equal(one[name], several[name]) for name in one)
    assert set(read_weights(split, "fusion.")) == {name for name in one if name.startswith("fusion.")}


@pytest.mark.parametrize("damage", ["missing", "cut", "swapped", "no index"])
def test_a_missing_file_is_named(split: StageOutput, damage: str) -> None:
    first, second = split.files(".safetensors")[:2]
    match damage:
        case "missing":
            second.unlink()
            said = f"{second}: missing, one of .* files of weights; re-run checkpoint joint"
        case "cut":
            second.write_bytes(second.read_bytes()[:-100])
            said = f"{second}: not a readable safetensors file .*; re-run checkpoint joint"
        case "swapped":
            second.write_bytes(first.read_bytes())
            said = f"{second}: tensor .* is missing, which model.safetensors.index.json places here; re-run"
        case _:
            split.path(INDEX_NAME).write_text("{}")
            said = "not a readable index of weights"
    with pytest.raises(ThroughlineError, match=said):
        load_model(split)
