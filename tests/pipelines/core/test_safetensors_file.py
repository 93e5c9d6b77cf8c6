"""The reader of safetensors files agrees with the library and rejects damaged files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from pipelines.core.errors import ThroughlineError
from pipelines.core.safetensors_file import SafetensorsFile, count_not_finite


def test_arrays_and_metadata_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": values, "empty": torch.zeros(0, 5)}
    save_tensors(tensors, path, metadata={"format": "test"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "test"}
    assert file.array("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert file.is_bfloat16("b") and not file.is_bfloat16("a")
    assert torch.equal(torch.from_numpy(file.array("b").copy()).view(torch.bfloat16), values)
    assert file.array("empty").shape == (0, 5)
    assert not file.array("a").flags.writeable
    with pytest.raises(ThroughlineError, match="no tensor 'c'; it holds a, b, empty"):
        file.array("c")


def test_a_file_without_values_is_read(tmp_path: Path) -> None:
    save_file({"keys": np.zeros((0, 16), np.uint8)}, tmp_path / "x.safetensors")
    assert SafetensorsFile(tmp_path / "x.safetensors").array("keys").shape == (0, 16)


@pytest.mark.parametrize("damage", ["truncated", "no header", "not JSON", "huge header", "missing"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones(4, np.float32)}, path)
    content = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(content[:-1])
        case "no header":
            path.write_bytes(b"")
        case "not JSON":
            path.write_bytes(content[:8] + b"?" + content[9:])
        case "huge header":
            path.write_bytes(b"\xff" * 8 + content[8:])
        case "missing":
            path.unlink()
    with pytest.raises(ThroughlineError, match=r"x.safetensors: not a readable safetensors file .*; re-run its stage"):
        SafetensorsFile(path)


def test_a_shape_that_contradicts_the_size_is_named(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ThroughlineError, match=r"tensor 'x' of 8 bytes is not F32 of shape \(3,\)"):
        SafetensorsFile(tmp_path / "x.safetensors").array("x")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_infinities_and_nans_are_counted_in_every_float_type(tmp_path: Path, dtype: type) -> None:
    values = np.array([1.0, -np.inf, np.inf, np.nan, 0.0, np.finfo(dtype).max], dtype)
    save_file({"x": values, "ids": np.array([-1], np.int64)}, tmp_path / "x.safetensors")
    assert count_not_finite(tmp_path / "x.safetensors") == 3


def test_bfloat16_is_counted_as_torch_counts_it(tmp_path: Path) -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -3e38, 0.0], dtype=torch.bfloat16)
    save_tensors({"x": values}, tmp_path / "x.safetensors")
    assert count_not_finite(tmp_path / "x.safetensors") == int((~torch.isfinite(values)).sum())
