"""Computes tables 1 and 2 from scores: estimates, intervals and paired differences per arm."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.analysis.bootstrap import Interval, PromptScores, bootstrap_intervals, derive_seed, paired_differences
from evaluation.benchmarks.prompt_files import GENAI_ADVANCED, GENAI_BASIC

ROUND_DIGITS = 6
"""Decimals of every number; further ones would depend on a machine's order of summation."""

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
"""GenEval, GenAI-Bench and UnifiedReward style from Table 1 of arXiv 2602.03510, by the paper's judges."""


@dataclass(frozen=True)
class TableColumn:
    """A column of a table: the scores it averages, the prompts they come from, and a display factor."""

    name: str
    benchmark: str
    metric: str
    factor: float = 1.0
    skill: str | None = None
    """Use only prompts with this skill; None uses all."""
    tagged_only: bool = False
    """Omit prompts without any skill, as GenAI-Bench's overall mean does."""
    by_task: bool = False
    """Take the unweighted mean over the prompts' first skills, as GenEval's score does."""


TABLE_1 = (
    TableColumn("geneval", "geneval", "geneval_vqa", 100.0, by_task=True),
    TableColumn("genai", "genai_bench", "vqascore", 100.0, tagged_only=True),
    TableColumn("unified_style", "drawbench", "unified_style"),
    TableColumn("unified_alignment", "drawbench", "unified_alignment"),
    TableColumn("unified_coherence", "drawbench", "unified_coherence"),
)
TABLE_2 = (
    *(TableColumn(skill, "genai_bench", "vqascore", 100.0, skill=skill) for skill in (*GENAI_BASIC, "basic")),
    *(TableColumn(skill, "genai_bench", "vqascore", 100.0, skill=skill) for skill in (*GENAI_ADVANCED, "advanced")),
    TableColumn("overall", "genai_bench", "vqascore", 100.0, tagged_only=True),
)
GENEVAL_TASKS = tuple(
    TableColumn(task, "geneval", "geneval_vqa", 100.0, skill=task)
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


def prompt_scores(rows: Iterable[ScoreRow], column: TableColumn, arms: Sequence[str]) -> PromptScores:
    """Return the column's scores, summed per prompt (sorted by id) and arm."""
    chosen = [row for row in rows if _belongs(row, column)]
    prompts = sorted({row.prompt_id for row in chosen})
    prompt_index = {prompt_id: index for index, prompt_id in enumerate(prompts)}
    arm_index = {arm: index for index, arm in enumerate(arms)}
    sums = np.zeros((len(prompts), len(arms)))
    counts = np.zeros((len(prompts), len(arms)))
    tasks = {row.prompt_id: row.skills[0] if column.by_task and row.skills else "" for row in chosen}
    names = sorted(set(tasks.values()))
    for row in chosen:
        cell = (prompt_index[row.prompt_id], arm_index[row.arm])
        sums[cell] += row.value * column.factor
        counts[cell] += 1
    strata = np.array([names.index(tasks[prompt_id]) for prompt_id in prompts], dtype=np.int64)
    return PromptScores(sums, counts, strata)


def _belongs(row: ScoreRow, column: TableColumn) -> bool:
    if row.benchmark != column.benchmark or row.metric != column.metric:
        return False
    if column.skill is not None and column.skill not in row.skills:
        return False
    return bool(row.skills) or not column.tagged_only


def column_cells(
    rows: Sequence[ScoreRow],
    column: TableColumn,
    arms: Sequence[str],
    *,
    baseline: str,
    num_resamples: int,
    confidence: float,
    seed: int,
) -> list[dict[str, Any] | None]:
    """Return one cell per arm: value, low, high, num_prompts, num_images, and `difference` from the baseline.

    A cell is None if the arm has no score in the column. Differences are None if the baseline is not among the arms.
    """
    scores = prompt_scores(rows, column, arms)
    if not scores.num_prompts:
        return [None] * len(arms)
    seeds = derive_seed(seed, column.benchmark, column.name)
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
        cells.append(
            _round(interval)
            | {"num_images": int(scores.counts[:, arm].sum())}
            | {"difference": _round(difference) if difference is not None and arms[arm] != baseline else None}
        )
    return cells


def _round(interval: Interval) -> dict[str, Any]:
    values = asdict(interval)
    # Adding 0.0 turns -0.0 into 0.0.
    return {
        name: round(value, ROUND_DIGITS) + 0.0 if isinstance(value, float) else value for name, value in values.items()
    }


def table(
    rows: Sequence[ScoreRow], columns: Sequence[TableColumn], arms: Sequence[str], **settings: Any
) -> list[dict[str, Any]]:
    """Return one row per arm: {"arm": name, <column>: cell or None, ...}; `settings` are those of `column_cells`."""
    result: list[dict[str, Any]] = [{"arm": arm} for arm in arms]
    for column in columns:
        for row, cell in zip(result, column_cells(rows, column, arms, **settings), strict=True):
            row[column.name] = cell
    return result
