"""Bootstrap intervals: compared with brute force and scipy, and the properties of paired comparisons."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from evaluation.analysis.bootstrap import (
    PromptScores,
    bootstrap_intervals,
    derive_seed,
    draw_weights,
    estimates,
    paired_differences,
)

SEED = derive_seed(0, "test")


def make(values: np.ndarray, counts: np.ndarray | None = None, strata: np.ndarray | None = None) -> PromptScores:
    counts = np.ones_like(values) if counts is None else counts
    strata = np.zeros(len(values), dtype=np.int64) if strata is None else strata
    return PromptScores(values * (counts > 0), counts, strata)


def random_scores(seed: int, prompts: int, arms: int, strata: int) -> PromptScores:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 4, size=(prompts, arms)).astype(float)
    return PromptScores(rng.normal(size=(prompts, arms)) * counts, counts, np.sort(rng.integers(0, strata, prompts)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3))
def test_estimates_equal_those_of_a_plain_loop(seed: int, prompts: int, arms: int, strata: int) -> None:
    scores = random_scores(seed, prompts, arms, strata)
    weights = draw_weights(scores.strata, 5, SEED)
    found = estimates(scores, weights)
    for resample, arm in np.ndindex(5, arms):
        means = []
        for stratum in sorted(set(scores.strata.tolist())):
            total = number = 0.0
            for prompt in range(prompts):
                if scores.strata[prompt] == stratum:
                    total += weights[resample, prompt] * scores.sums[prompt, arm]
                    number += weights[resample, prompt] * scores.counts[prompt, arm]
            means.append(total / number if number else np.nan)
        np.testing.assert_allclose(found[resample, arm], np.mean(means), rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 600))
@settings(max_examples=30, deadline=None)
def test_resampling_keeps_the_size_of_each_stratum(strata: list[int], num_resamples: int) -> None:
    array = np.array(strata, dtype=np.int64)
    weights = draw_weights(array, num_resamples, SEED)
    assert weights.shape == (num_resamples, len(strata))
    for stratum in set(strata):
        assert (weights[:, array == stratum].sum(1) == strata.count(stratum)).all()


def test_the_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(3).gamma(2.0, size=(120, 1))
    (ours,) = bootstrap_intervals(make(values), num_resamples=20_000, seed=SEED)
    theirs = stats.bootstrap(
        (values[:, 0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours is not None
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_the_paired_interval_agrees_with_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(size=150)
    values = np.stack([base, base + rng.normal(0.2, 0.3, size=150)], axis=1)
    ours = paired_differences(make(values), 0, num_resamples=20_000, seed=SEED)[1]
    theirs = stats.bootstrap(
        (values[:, 1], values[:, 0]), lambda a, b, axis=-1: np.mean(a, axis) - np.mean(b, axis), paired=True,
        n_resamples=20_000, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_a_paired_interval_is_narrower_than_two_single_ones() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(scale=3.0, size=(200, 1))
    scores = make(np.hstack([base, base + rng.normal(0.3, 0.2, size=(200, 1))]))
    alone = bootstrap_intervals(scores, num_resamples=2000, seed=SEED)
    paired = paired_differences(scores, 0, num_resamples=2000, seed=SEED)[1]
    assert alone[0] is not None and alone[1] is not None and paired is not None
    assert alone[0].high > alone[1].low
    assert paired.low > 0
    assert paired.high - paired.low < 0.2 * (alone[0].high - alone[0].low)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_an_arm_does_not_differ_from_itself_and_differences_are_antisymmetric(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(20, 2))
    forth = paired_differences(make(values), 0, num_resamples=200, seed=SEED)
    back = paired_differences(make(values), 1, num_resamples=200, seed=SEED)
    assert forth[0] is not None and (forth[0].value, forth[0].low, forth[0].high) == (0.0, 0.0, 0.0)
    assert forth[1] is not None and back[0] is not None
    assert (forth[1].value, forth[1].low, forth[1].high) == pytest.approx(
        (-back[0].value, -back[0].high, -back[0].low), abs=1e-9
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 100), st.floats(-50, 50))
def test_intervals_shift_and_scale_with_the_scores(seed: int, factor: float, offset: float) -> None:
    values = np.random.default_rng(seed).normal(size=(30, 1))
    (plain,) = bootstrap_intervals(make(values), num_resamples=300, seed=SEED)
    (moved,) = bootstrap_intervals(make(values * factor + offset), num_resamples=300, seed=SEED)
    assert plain is not None and moved is not None
    expected = [factor * value + offset for value in (plain.value, plain.low, plain.high)]
    assert [moved.value, moved.low, moved.high] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_same_seed_gives_the_same_interval_and_another_gives_another() -> None:
    scores = make(np.random.default_rng(1).normal(size=(50, 2)))
    once = bootstrap_intervals(scores, num_resamples=500, seed=derive_seed(4, "geneval"))
    assert once == bootstrap_intervals(scores, num_resamples=500, seed=derive_seed(4, "geneval"))
    assert once != bootstrap_intervals(scores, num_resamples=500, seed=derive_seed(4, "drawbench"))


def test_coverage_is_close_to_the_confidence_level() -> None:
    rng = np.random.default_rng(11)
    values = rng.normal(loc=2.0, size=(80, 300))  # 300 independent experiments, as arms
    intervals = bootstrap_intervals(make(values), num_resamples=1000, seed=SEED)
    covered = sum(interval is not None and interval.low <= 2.0 <= interval.high for interval in intervals)
    assert 0.90 <= covered / 300 <= 0.98


def test_tasks_have_equal_weight_whatever_their_number_of_prompts() -> None:
    values = np.array([[1.0]] * 9 + [[0.0]])
    scores = make(values, strata=np.array([0] * 9 + [1]))
    assert estimates(scores)[0, 0] == 0.5


def test_prompts_without_a_score_enter_neither_mean_nor_difference() -> None:
    values = np.array([[1.0, 5.0], [2.0, 6.0], [9.0, 0.0]])
    scores = make(values, counts=np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]))
    alone = bootstrap_intervals(scores, num_resamples=100, seed=SEED)
    paired = paired_differences(scores, 0, num_resamples=100, seed=SEED)
    assert alone[0] is not None and (alone[0].value, alone[0].num_prompts) == (4.0, 3)
    assert alone[1] is not None and (alone[1].value, alone[1].num_prompts) == (5.5, 2)
    assert paired[1] is not None and (paired[1].value, paired[1].num_prompts) == (4.0, 2)


def test_an_arm_without_any_score_has_no_interval() -> None:
    scores = make(np.ones((3, 2)), counts=np.array([[1.0, 0.0]] * 3))
    assert bootstrap_intervals(scores, num_resamples=100, seed=SEED)[1] is None
    assert paired_differences(scores, 0, num_resamples=100, seed=SEED)[1] is None
