"""The options of the GPU benchmark."""

import argparse
from typing import Any

import pytest
import torch

from tests.benchmarks.gpu import main, parse_arguments, peak_flops


def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse_arguments([])
    assert "no GPU here; --device cpu --shape tiny" in capsys.readouterr().err


def test_the_tiny_shape_is_small_in_every_way() -> None:
    args = parse_arguments(["--shape", "tiny", "--device", "cpu", "--batches", "2", "64"])
    assert (args.batches, args.sizes, args.tokens) == ([2], [64], 16)
    paper = parse_arguments(["--device", "cpu", "--batches", "2", "64"])
    assert (paper.batches, paper.sizes, paper.tokens) == ([2, 64], [256, 512], 512)


def test_the_peak_is_the_one_given_or_none() -> None:
    args = argparse.Namespace(peak_tflops=2.5, device="cpu")
    assert peak_flops(args) == 2.5e12
    assert peak_flops(argparse.Namespace(peak_tflops=None, device="cpu")) is None


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--device", "cpu", "--strategies", "mean"])


@pytest.mark.slow
def test_it_measures_training_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr("tests.benchmarks.gpu.write_results", lambda name, measured: written.update({name: measured}))
    options = ["--shape", "tiny", "--device", "cpu", "--steps", "2", "--rounds", "1", "--modes", "eager"]
    main([*options, "--strategies", "uniform", "joint", "fuse_dit"])
    for strategy in ("uniform", "joint", "fuse_dit"):
        assert written["gpu"][f"{strategy}, training, eager, batch 4"]["ms"] > 0
        assert written["gpu"][f"{strategy}, sampling, 64 px"]["ms"] > 0
