"""Confidence intervals: percentile bootstrap over prompts, per arm and paired between arms on the same prompts.

Shapes: P prompts, R resamples, A arms. A resample is a row of weights: how often each prompt was drawn. All arms share
the weights, so a difference between arms is taken within each resample.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
_CHUNK = 256


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval, and the number of prompts behind it."""

    value: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True)
class PromptScores:
    """Scores summed per prompt, for A arms over the same P prompts in the same order.

    `sums` (P, A) and `counts` (P, A): the sum and number of an arm's scored images for a prompt; a count of 0 means
    that no image of the prompt has a score. `strata` (P,): non-negative integers; the statistic is the unweighted mean
    over strata of the mean over their images, and prompts are resampled within their stratum.
    """

    sums: FloatArray
    counts: FloatArray
    strata: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.sums.shape != self.counts.shape or self.sums.ndim != 2 or len(self.strata) != len(self.sums):
            raise ValueError(f"shapes differ: sums {self.sums.shape}, counts {self.counts.shape}, {self.strata.shape}")

    @property
    def num_prompts(self) -> int:
        return len(self.strata)

    def select(self, keep: NDArray[np.bool_]) -> "PromptScores":
        """Return the scores of the prompts marked in `keep` (P,)."""
        return PromptScores(self.sums[keep], self.counts[keep], self.strata[keep])


def derive_seed(seed: int, *names: str) -> list[int]:
    """Return a generator seed derived from `seed` and names, so that no two tables share resamples."""
    return [seed, zlib.crc32("\0".join(names).encode())]


def draw_weights(strata: NDArray[np.int64], num_resamples: int, seed: Sequence[int]) -> NDArray[np.int32]:
    """Return weights (R, P): each stratum is resampled with replacement, keeping its number of prompts."""
    generator = np.random.Generator(np.random.PCG64(list(seed)))
    weights = np.zeros((num_resamples, len(strata)), dtype=np.int32)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        size = len(members)
        for start in range(0, num_resamples, _CHUNK):  # limits the memory of `draws`
            rows = min(_CHUNK, num_resamples - start)
            draws = generator.integers(0, size, size=(rows, size))
            flat = (draws + size * np.arange(rows)[:, None]).ravel()
            counts = np.bincount(flat, minlength=rows * size).reshape(rows, size)
            weights[start : start + rows, members] = counts
    return weights


def estimates(scores: PromptScores, weights: NDArray[np.integer] | None = None) -> FloatArray:
    """Return the estimates (R, A) under `weights` (R, P), or the point estimate (1, A) without weights.

    An estimate is NaN if some stratum has no scored image in the resample.
    """
    if weights is None:
        weights = np.ones((1, scores.num_prompts), dtype=np.int32)
    real_weights = weights.astype(np.float64)
    total = np.zeros((len(weights), scores.sums.shape[1]))
    names = np.unique(scores.strata)
    for stratum in names:
        members = scores.strata == stratum
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = real_weights[:, members]
            total += (drawn @ scores.sums[members]) / (drawn @ scores.counts[members])
    return total / max(len(names), 1) if len(names) else np.full_like(total, np.nan)


def bootstrap_intervals(
    scores: PromptScores, *, num_resamples: int, seed: Sequence[int], confidence: float = 0.95
) -> list[Interval | None]:
    """Return an interval per arm; None if the arm has no scored image in some stratum."""
    point = estimates(scores)[0]
    resampled = _resample(scores, num_resamples, seed)
    num_prompts = np.count_nonzero(scores.counts, axis=0)
    return [
        _interval(point[arm], resampled[:, arm], int(num_prompts[arm]), confidence)
        for arm in range(scores.sums.shape[1])
    ]


def paired_differences(
    scores: PromptScores, baseline: int, *, num_resamples: int, seed: Sequence[int], confidence: float = 0.95
) -> list[Interval | None]:
    """Return the interval of each arm's estimate minus that of arm number `baseline`.

    Each difference uses the prompts for which both arms have scored images, in the same resamples.
    """
    num_arms = scores.sums.shape[1]
    shared: FloatArray | None = None
    result = []
    for arm in range(num_arms):
        both = (scores.counts[:, arm] > 0) & (scores.counts[:, baseline] > 0)
        if both.all():
            # The usual case. Resamples depend only on the prompts, so all such arms share them.
            shared = _resample(scores, num_resamples, seed) if shared is None else shared
            pair, resampled = scores, shared[:, [arm, baseline]]
            point = estimates(scores)[0, [arm, baseline]]
        else:
            pair = scores.select(both)
            pair = PromptScores(pair.sums[:, [arm, baseline]], pair.counts[:, [arm, baseline]], pair.strata)
            point, resampled = estimates(pair)[0], _resample(pair, num_resamples, seed)
        difference = resampled[:, 0] - resampled[:, 1]
        result.append(_interval(point[0] - point[1], difference, pair.num_prompts, confidence))
    return result


def _resample(scores: PromptScores, num_resamples: int, seed: Sequence[int]) -> FloatArray:
    return estimates(scores, draw_weights(scores.strata, num_resamples, seed))


def _interval(value: float, resampled: FloatArray, num_prompts: int, confidence: float) -> Interval | None:
    if not np.isfinite(value):
        return None
    finite = resampled[np.isfinite(resampled)]
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1.0 - tail]) if len(finite) else (value, value)
    return Interval(float(value), float(low), float(high), num_prompts)
