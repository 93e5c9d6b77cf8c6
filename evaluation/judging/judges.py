"""Owns what is asked of a judge model about an image of each benchmark, and what its answers are worth as scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.benchmarks.geneval import ClauseQuestion, clause_questions, is_fulfilled
from evaluation.benchmarks.prompt_files import EvaluationPrompt
from evaluation.judging.answers import MISSING, OK, Rating, YesNo, read_ratings, read_yes_no
from pipelines.core.model_prompts import NO, YES, unified_reward_prompt, vqascore_question
from recaption.engine import VisionAnswer

METRICS: Mapping[str, tuple[str, ...]] = {
    "geneval": ("geneval_vqa",),
    "genai_bench": ("vqascore",),
    "drawbench": ("unified_alignment", "unified_coherence", "unified_style"),
}
"""The scores an image of each benchmark gets. geneval_vqa is 0 or 1, vqascore 0 to 1, unified_* 1 to 5."""

ANSWER_FAILED = "answer_failed"
"""Status of a question that the engine gave no answer to."""


@dataclass(frozen=True)
class Question:
    """One question about one image: the words asked, and how the answer is to be read."""

    kind: str
    """"vqascore", "rating" or "clause:<kind>"."""
    text: str
    wants_yes_no: bool
    clause: ClauseQuestion | None = None


@dataclass(frozen=True)
class Score:
    """A score of one image; `value` is None where `status` is not "ok"."""

    metric: str
    value: float | None
    status: str
    share_yes: float | None = None
    """vqascore: P("Yes") / (P("Yes") + P("No")), beside the raw P("Yes") that is the score."""


@dataclass(frozen=True)
class Reading:
    """What was read from one answer, for the table of raw answers."""

    parsed: str
    status: str
    yes_no: YesNo | None = None


def questions_for(prompt: EvaluationPrompt) -> list[Question]:
    """Return what a judge is asked about an image made for `prompt`."""
    if prompt.benchmark == "geneval":
        return [
            Question(f"clause:{clause.kind}", vqascore_question(clause.statement), True, clause)
            for clause in clause_questions(prompt.metadata)
        ]
    if prompt.benchmark == "genai_bench":
        return [Question("vqascore", vqascore_question(prompt.prompt), True)]
    return [Question("rating", unified_reward_prompt(prompt.prompt), False)]


def wanted_words(question: Question) -> tuple[str, ...]:
    """Return the words whose log-probabilities the question needs."""
    return (YES, NO) if question.wants_yes_no else ()


def read_answer(question: Question, answer: VisionAnswer) -> Reading:
    """Return what the answer says, with a status that is "ok" only where a score can be made of it."""
    if answer.error is not None:
        return Reading("", ANSWER_FAILED)
    if question.wants_yes_no:
        found = read_yes_no(answer.text, answer.logprobs)
        return Reading(found.said, found.status, found)
    ratings = _ratings_of(answer)
    worst = next((rating.status for rating in ratings.values() if rating.status != OK), OK)
    parsed = ";".join(f"{axis}={'' if r.value is None else f'{r.value:g}'}:{r.status}" for axis, r in ratings.items())
    return Reading(parsed, worst)


def scores_of(prompt: EvaluationPrompt, questions: Sequence[Question], answers: Sequence[VisionAnswer]) -> list[Score]:
    """Return one score for each metric of the prompt's benchmark, whatever the answers were."""
    readings = [read_answer(question, answer) for question, answer in zip(questions, answers, strict=True)]
    if prompt.benchmark == "geneval":
        return [_geneval_score(questions, readings)]
    if prompt.benchmark == "genai_bench":
        (reading,) = readings
        value = reading.yes_no.probability_yes if reading.yes_no else None
        return [Score("vqascore", value, reading.status, reading.yes_no.share_yes if reading.yes_no else None)]
    (answer,) = answers
    if answer.error is not None:
        return [Score(metric, None, ANSWER_FAILED) for metric in METRICS["drawbench"]]
    return [
        Score(f"unified_{axis.lower()}", rating.value, rating.status) for axis, rating in _ratings_of(answer).items()
    ]


def _ratings_of(answer: VisionAnswer) -> dict[str, Rating]:
    return read_ratings(answer.text, is_cut=answer.finish_reason == "length")


def _geneval_score(questions: Sequence[Question], readings: Sequence[Reading]) -> Score:
    clauses = [question.clause for question in questions if question.clause is not None]
    verdicts = [reading.yes_no.verdict if reading.yes_no else None for reading in readings]
    fulfilled = is_fulfilled(clauses, verdicts)
    if fulfilled is None:
        unknown = next(r for r, verdict in zip(readings, verdicts, strict=True) if verdict is None)
        return Score("geneval_vqa", None, unknown.status if unknown.status != OK else MISSING)
    return Score("geneval_vqa", float(fulfilled), OK)


def is_usable(score: Score) -> bool:
    """Whether the score is a finite number."""
    return score.value is not None and math.isfinite(score.value)


def answer_row(image: Mapping[str, Any], question: Question, answer: VisionAnswer) -> dict[str, Any]:
    """Return the row of the table of raw answers."""
    reading = read_answer(question, answer)
    return {
        "prompt_id": image["prompt_id"],
        "sample_index": image["sample_index"],
        "kind": question.kind,
        "question": question.text,
        "expected": None if question.clause is None else ("yes" if question.clause.expected else "no"),
        "raw_answer": answer.text,
        "finish_reason": answer.finish_reason,
        "logprob_yes": reading.yes_no and reading.yes_no.logprob_yes,
        "logprob_no": reading.yes_no and reading.yes_no.logprob_no,
        "share_yes": reading.yes_no and reading.yes_no.share_yes,
        "parsed": reading.parsed,
        "parse_status": reading.status,
        "error": answer.error,
    }
