"""Makes the numbers of tables 1 and 2 from score tables: estimates, intervals and paired differences per arm."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.analysis.bootstrap import Interval, PromptScores, bootstrap_intervals, paired_differences, seed_of
from evaluation.benchmarks.prompt_files import GENAI_ADVANCED, GENAI_BASIC

ROUND_DIGITS = 6
"""Digits kept of every number: more would depend on a machine's order of summation."""

PAPER_TABLE_1: Mapping[str, tuple[float, float, float]] = {
    "penultimate": (64.54, 74.96, 3.02),
    "uniform": (66.51, 76.82, 3.06),
    "static": (64.77, 76.31, 3.05),
    "fuse_dit": (60.95, 75.02, 3.05),
    "time_wise": (63.41, 76.20, 2.97),
    "time_wise+shift": (63.65, 76.46, 2.98),
    "depth_wise": (67.07, 79.07, 3.06),
    "joint": (66.05, 77.44, 3.06),
}
"""GenEval, GenAI-Bench and UnifiedReward style as printed in Table 1 of arXiv 2602.03510, by its own judges."""


@dataclass(frozen=True)
class Column:
    """A column of a table: which scores it averages, over which prompts, and the factor it is shown with."""

    name: str
    benchmark: str
    metric: str
    factor: float = 1.0
    skill: str | None = None
    """Only prompts that carry this skill; None takes all."""
    tagged_only: bool = False
    """Leave out prompts without any skill, as GenAI-Bench's overall mean does."""
    by_task: bool = False
    """Unweighted mean over the prompts' first skills, as GenEval's score is."""


TABLE_1 = (
    Column("geneval", "geneval", "geneval_vqa", 100.0, by_task=True),
    Column("genai", "genai_bench", "vqascore", 100.0, tagged_only=True),
    Column("unified_style", "drawbench", "unified_style"),
    Column("unified_alignment", "drawbench", "unified_alignment"),
    Column("unified_coherence", "drawbench", "unified_coherence"),
)
TABLE_2 = (
    *(Column(skill, "genai_bench", "vqascore", 100.0, skill=skill) for skill in (*GENAI_BASIC, "basic")),
    *(Column(skill, "genai_bench", "vqascore", 100.0, skill=skill) for skill in (*GENAI_ADVANCED, "advanced")),
    Column("overall", "genai_bench", "vqascore", 100.0, tagged_only=True),
)
GENEVAL_TASKS = tuple(
    Column(task, "geneval", "geneval_vqa", 100.0, skill=task)
    for task in ("single_object", "two_object", "counting", "colors", "position", "color_attr")
)


@dataclass(frozen=True)
class ScoreRow:
    """One score of one image."""

    arm: str
    benchmark: str
    prompt_id: str
    metric: str
    value: float
    skills: tuple[str, ...]


def prompt_scores(rows: Iterable[ScoreRow], column: Column, arms: Sequence[str]) -> PromptScores:
    """Return the column's scores, summed per prompt (sorted by id) and arm."""
    chosen = [row for row in rows if _belongs(row, column)]
    prompts = sorted({row.prompt_id for row in chosen})
    place = {prompt_id: index for index, prompt_id in enumerate(prompts)}
    arm_place = {arm: index for index, arm in enumerate(arms)}
    sums = np.zeros((len(prompts), len(arms)))
    counts = np.zeros((len(prompts), len(arms)))
    tasks = {row.prompt_id: row.skills[0] if column.by_task and row.skills else "" for row in chosen}
    names = sorted(set(tasks.values()))
    for row in chosen:
        sums[place[row.prompt_id], arm_place[row.arm]] += row.value * column.factor
        counts[place[row.prompt_id], arm_place[row.arm]] += 1
    strata = np.array([names.index(tasks[prompt_id]) for prompt_id in prompts], dtype=np.int64)
    return PromptScores(sums, counts, strata)


def _belongs(row: ScoreRow, column: Column) -> bool:
    if row.benchmark != column.benchmark or row.metric != column.metric:
        return False
    if column.skill is not None and column.skill not in row.skills:
        return False
    return bool(row.skills) or not column.tagged_only


def column_cells(
    rows: Sequence[ScoreRow],
    column: Column,
    arms: Sequence[str],
    *,
    baseline: str,
    num_resamples: int,
    confidence: float,
    seed: int,
) -> list[dict[str, Any] | None]:
    """Return one cell per arm: value, low, high, num_prompts, num_images, and `difference` from the baseline.

    None where the arm has no score in the column. Where the baseline isn't among the arms, differences are None.
    """
    scores = prompt_scores(rows, column, arms)
    if not scores.num_prompts:
        return [None] * len(arms)
    seeds = seed_of(seed, column.benchmark, column.name)
    settings: dict[str, Any] = {"num_resamples": num_resamples, "seed": seeds, "confidence": confidence}
    intervals = bootstrap_intervals(scores, **settings)
    differences: list[Interval | None] = [None] * len(arms)
    if baseline in arms:
        differences = paired_differences(scores, arms.index(baseline), **settings)
    cells: list[dict[str, Any] | None] = []
    for arm, (interval, difference) in enumerate(zip(intervals, differences, strict=True)):
        if interval is None:
            cells.append(None)
            continue
        is_other = arms[arm] != baseline and difference is not None
        cells.append(
            _rounded(interval)
            | {"num_images": int(scores.counts[:, arm].sum())}
            | {"difference": _rounded(difference) if is_other and difference is not None else None}
        )
    return cells


def _rounded(interval: Interval) -> dict[str, Any]:
    values = asdict(interval)
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return {
        name: round(value, ROUND_DIGITS) + 0.0 if isinstance(value, float) else value for name, value in values.items()
    }


def table(
    rows: Sequence[ScoreRow], columns: Sequence[Column], arms: Sequence[str], **settings: Any
) -> list[dict[str, Any]]:
    """Return one row per arm: {"arm": name, <column>: cell or None, ...}; `settings` as for `column_cells`."""
    result: list[dict[str, Any]] = [{"arm": arm} for arm in arms]
    for column in columns:
        for row, cell in zip(result, column_cells(rows, column, arms, **settings), strict=True):
            row[column.name] = cell
    return result
