"""The options of the GPU benchmark."""

import argparse

import pytest
import torch

from tests.benchmarks.gpu import parse_arguments, peak_flops


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
