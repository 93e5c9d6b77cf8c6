"""The documents name files, options and functions that exist."""

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestration.graph.nodes import GRAPH
from orchestration.profiles.loading import load_profile
from pipelines.dataset.order import SampleOrder
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.presets import PRESETS, TOP_SHARES
from tests.pipelines.dataset.test_stream import NUM_SAMPLES, write_shards
from training.config import ModelConfig, Strategy
from training.cost.flops import KNOWN_TEXT_ENCODERS, count_flops

ROOT = Path(__file__).resolve().parents[1]
COMPARISON = ROOT / "docs" / "paper-and-released-code.md"
DATA = ROOT / "docs" / "data.md"
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


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DATA.read_text(), re.DOTALL)


def _rules_in(cell: str) -> dict[str, Any]:
    found = {}
    for name, sign, text in re.findall(r"`(\w+)([=>])([^`]+)`", cell):
        value = json.loads(text)
        found[name] = math.nextafter(value, math.inf) if sign == ">" else value
    return found


def test_the_table_of_presets_is_the_presets() -> None:
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in DATA.read_text().splitlines()]
    rows = {row[0].strip("`"): row for row in cells if len(row) == 3 and row[0].strip("`") in PRESETS}
    assert rows.keys() == PRESETS.keys()
    plain = LaionSubsetConfig().model_dump(mode="json")
    for name, (_, rules, _) in rows.items():
        preset = PRESETS[name]().model_dump(mode="json")
        assert _rules_in(rules) == {field: value for field, value in preset.items() if value != plain[field]}, name
        assert f"top {TOP_SHARES[name][1]:.0%}".replace("%", " %") in rules if name in TOP_SHARES else True


@pytest.mark.parametrize("block", _blocks("toml"))
def test_profiles_in_the_page_about_data_can_be_loaded(block: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(block.replace("<sha256sum of the file>", "0" * 64))
    assert tomllib.loads(path.read_text()).keys() > {"base"}
    assert load_profile(str(path), tmp_path) != load_profile("single_gpu", tmp_path)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_example_reads_shards_and_goes_on_in_another_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = _blocks("python")
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    order = SampleOrder(names["samples"].data_version, 7, NUM_SAMPLES).take(0, NUM_SAMPLES)
    assert (names["consumed"], list(names["captions"])) == (12, [str(index) for index in order[8:12]])
    assert capsys.readouterr().out.strip() == str(order[12:14])
    np.testing.assert_array_equal(next(names["rest"]).indices, order[18:20])


def test_the_profile_of_estimated_gates_trains_them_and_analyses_their_times(tmp_path: Path) -> None:
    profile = load_profile(str(ROOT / "docs" / "estimated_gate.toml"), tmp_path)
    assert profile.model.gate_signal == "estimated"
    assert GRAPH["trajectory_analysis"].is_enabled(profile)
