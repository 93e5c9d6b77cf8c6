"""The documents name files, options and functions that exist."""

import re
from pathlib import Path

import pytest

from training.config import ModelConfig, Strategy
from training.flops import KNOWN_TEXT_ENCODERS, count_flops

ROOT = Path(__file__).resolve().parents[1]
COMPARISON = ROOT / "docs" / "paper-and-released-code.md"
FREE_WORDS = {"adaln", "paper", "single_gpu", "+shift", "throughline"}
"""Values and names of other things than a module's contents."""


def _rows() -> list[str]:
    lines = COMPARISON.read_text().splitlines()
    return [line.rsplit("|", 2)[1] for line in lines if re.match(r"\| \d+ \|", line)]


def _passages() -> list[str]:
    text = COMPARISON.read_text()
    section = text[text.index("## Where ours") : text.index("## What sampling")]
    return [*_rows(), *section.split("\n- ")[1:]]


def test_the_comparison_has_its_fifteen_rows() -> None:
    assert len(_rows()) == 15


@pytest.mark.parametrize("passage", _passages(), ids=lambda passage: passage.strip()[:40])
def test_every_name_in_the_comparison_stands_in_a_file_it_names(passage: str) -> None:
    words = re.findall(r"`([^`]+)`", passage)
    paths = [word for word in words if word.endswith(".py")]
    assert paths, "names no file"
    contents = "".join((ROOT / path).read_text() for path in paths)
    for word in set(words) - set(paths) - FREE_WORDS:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", contents), f"{word} is in none of {paths}"


def _sampling_costs() -> dict[Strategy, list[str]]:
    """The printed figures of each strategy: text anew at every step, text once."""
    section = COMPARISON.read_text().partition("## What sampling")[2]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {
        Strategy(name): [figure.strip() for figure in figures]
        for names, *figures in rows[2:]
        for name in names.strip().split(", ")
    }


@pytest.mark.parametrize("strategy", Strategy)
def test_the_comparison_prints_what_the_counter_counts(strategy: Strategy) -> None:
    encoder = KNOWN_TEXT_ENCODERS["Qwen/Qwen3-VL-4B-Instruct"]
    counted = [
        count_flops(ModelConfig(), strategy, encoder, latent_size=64, cached=cached).total for cached in (False, True)
    ]
    assert _sampling_costs()[strategy] == [f"{total / 1e12:.2f}" for total in counted]
