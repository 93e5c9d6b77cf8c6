"""Charts: well-formed SVG for any numbers, with correct axes."""

import math
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.analysis.charts import (
    IntervalRow,
    Panel,
    Series,
    bar_chart,
    heatmap,
    inline_svg,
    interval_chart,
    line_chart,
    nice_ticks,
    standalone_svg,
)
from evaluation.analysis.fusion_analysis import flow_times, summarise, weight_panels
from training.config import Strategy

finite = st.floats(-1e6, 1e6, allow_nan=False).map(lambda value: round(value, 6))


def parse(panel: Panel) -> ET.Element:
    svg = standalone_svg([panel], 'a "quoted" <description>')
    assert "nan" not in svg and "inf" not in svg.replace("info", "")
    return ET.fromstring(svg)


@given(finite, finite)
def test_ticks_are_evenly_spaced_within_the_range(first: float, second: float) -> None:
    low, high = min(first, second), max(first, second)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-6)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    steps = np.diff(ticks)
    assert len(steps) == 0 or np.allclose(steps, steps[0], rtol=1e-3)
    assert len(ticks) <= 12


@given(st.lists(finite, min_size=1, max_size=20))
def test_lines_and_bars_are_well_formed_for_any_values(values: list[float]) -> None:
    parse(line_chart([Series("a & b", range(len(values)), values)], title="<t>", x_label="x", y_label="y"))
    parse(bar_chart(values, title="<t>", x_label="x", y_label="y", lows=values, highs=values, rule_at=0.0))


def test_a_gap_in_a_line_stays_a_gap() -> None:
    chart = line_chart([Series("a", [0, 1, 2, 3], [1.0, 2.0, math.nan, 3.0])], title="t", x_label="x", y_label="y")
    path = next(item for item in parse(chart).iter() if item.get("class") == "line")
    assert (path.get("d") or "").count("M") == 2


def test_an_interval_chart_without_scores_says_so() -> None:
    svg = inline_svg([interval_chart([IntervalRow("a", None), IntervalRow("b", None)], title="t")], "d")
    assert "no scores" in svg
    parse(interval_chart([IntervalRow("a", (0.0, 0.0, 0.0)), IntervalRow("b", None)], title="t"))


def test_a_heatmap_draws_no_cell_at_the_centre() -> None:
    settings = {"title": "t", "x_label": "x", "y_label": "y", "row_names": ["0"], "column_names": ["1", "2", "3"]}
    cells = [
        item.get("fill")
        for item in parse(heatmap([[0.5, 1.0, 0.0]], centre=0.5, scale=0.5, **settings)).iter()
        if item.get("fill-opacity")
    ]
    assert cells == ["var(--above)", "var(--below)"]


@pytest.mark.parametrize("strategy", Strategy)
@pytest.mark.parametrize("size", [1.0, 0.001, 0.0])
def test_weight_panels_of_every_strategy_are_well_formed(strategy: Strategy, size: float) -> None:
    times = flow_times(5)
    assert times == [0.0, 0.25, 0.5, 0.75, 1.0]
    rng = np.random.default_rng(1)
    weights = np.exp(size * rng.normal(size=(3, 5, 7)))
    weights /= weights.sum(-1, keepdims=True)
    panels = weight_panels(weights, times, strategy)
    assert panels
    for panel in panels:
        parse(panel)
    if strategy is Strategy.STATIC and size == 0.001:
        assert "against uniform" in panels[0].body
    assert summarise(weights, strategy)["effective_num_layers"] <= 7.0
