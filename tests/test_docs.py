"""The documents name files, options and functions that exist."""

import re
from pathlib import Path

import pytest

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
