"""Owns the questions to a judge model about an image of each benchmark, and the scores made of its answers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.benchmarks.geneval import ClauseQuestion, clause_questions, is_fulfilled
from evaluation.benchmarks.prompt_files import EvaluationPrompt
from evaluation.judging.answers import MISSING, OK, Rating, YesNoAnswer, parse_ratings, parse_yes_no
from pipelines.core.model_prompts import NO, YES, unified_reward_prompt, vqascore_question
from recaption.engine import VisionAnswer

METRICS: Mapping[str, tuple[str, ...]] = {
    "geneval": ("geneval_vqa",),
    "genai_bench": ("vqascore",),
    "drawbench": ("unified_alignment", "unified_coherence", "unified_style"),
}
"""Benchmark -> the scores of an image. geneval_vqa is 0 or 1, vqascore 0 to 1, unified_* 1 to 5."""

ANSWER_FAILED = "answer_failed"
"""Status of a question that the engine failed to answer."""


@dataclass(frozen=True)
class JudgeQuestion:
    """One question about one image: its text, and the kind of answer expected."""

    kind: str
    """"vqascore", "rating" or "clause:<kind>"."""
    text: str
    is_yes_no: bool
    clause: ClauseQuestion | None = None


@dataclass(frozen=True)
class Score:
    """A score of one image; `value` is None if `status` is not "ok"."""

    metric: str
    value: float | None
    status: str
    share_yes: float | None = None
    """Only for vqascore: P("Yes") / (P("Yes") + P("No")); the score itself is the raw P("Yes")."""


@dataclass(frozen=True)
class ParsedAnswer:
    """One answer as parsed, for the table of raw answers."""

    text: str
    status: str
    yes_no: YesNoAnswer | None = None


def judge_questions(prompt: EvaluationPrompt) -> list[JudgeQuestion]:
    """Return the questions about an image generated for `prompt`."""
    if prompt.benchmark == "geneval":
        return [
            JudgeQuestion(f"clause:{clause.kind}", vqascore_question(clause.statement), True, clause)
            for clause in clause_questions(prompt.metadata)
        ]
    if prompt.benchmark == "genai_bench":
        return [JudgeQuestion("vqascore", vqascore_question(prompt.prompt), True)]
    return [JudgeQuestion("rating", unified_reward_prompt(prompt.prompt), False)]


def logprob_words(question: JudgeQuestion) -> tuple[str, ...]:
    """Return the words whose log-probabilities are needed to score the answer."""
    return (YES, NO) if question.is_yes_no else ()


def parse_answer(question: JudgeQuestion, answer: VisionAnswer) -> ParsedAnswer:
    """Parse an answer; its status is "ok" only if a score can be made of it."""
    if answer.error is not None:
        return ParsedAnswer("", ANSWER_FAILED)
    if question.is_yes_no:
        yes_no = parse_yes_no(answer.text, answer.logprobs)
        return ParsedAnswer(yes_no.text_answer, yes_no.status, yes_no)
    ratings = _ratings_of(answer)
    status = next((rating.status for rating in ratings.values() if rating.status != OK), OK)
    text = ";".join(f"{axis}={'' if r.value is None else f'{r.value:g}'}:{r.status}" for axis, r in ratings.items())
    return ParsedAnswer(text, status)


def score_image(
    prompt: EvaluationPrompt, questions: Sequence[JudgeQuestion], answers: Sequence[VisionAnswer]
) -> list[Score]:
    """Return one score for each metric of the prompt's benchmark, even if answers are missing or malformed."""
    parsed = [parse_answer(question, answer) for question, answer in zip(questions, answers, strict=True)]
    if prompt.benchmark == "geneval":
        return [_geneval_score(questions, parsed)]
    if prompt.benchmark == "genai_bench":
        yes_no = parsed[0].yes_no
        value, share_yes = (yes_no.probability_yes, yes_no.share_yes) if yes_no else (None, None)
        return [Score("vqascore", value, parsed[0].status, share_yes)]
    (answer,) = answers
    if answer.error is not None:
        return [Score(metric, None, ANSWER_FAILED) for metric in METRICS["drawbench"]]
    return [
        Score(f"unified_{axis.lower()}", rating.value, rating.status) for axis, rating in _ratings_of(answer).items()
    ]


def _ratings_of(answer: VisionAnswer) -> dict[str, Rating]:
    return parse_ratings(answer.text, is_truncated=answer.finish_reason == "length")


def _geneval_score(questions: Sequence[JudgeQuestion], answers: Sequence[ParsedAnswer]) -> Score:
    clauses = [question.clause for question in questions if question.clause is not None]
    verdicts = [answer.yes_no.verdict if answer.yes_no else None for answer in answers]
    fulfilled = is_fulfilled(clauses, verdicts)
    if fulfilled is None:
        unknown = next(answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict is None)
        return Score("geneval_vqa", None, unknown.status if unknown.status != OK else MISSING)
    return Score("geneval_vqa", float(fulfilled), OK)


def is_usable(score: Score) -> bool:
    """Return True if the score is a finite number."""
    return score.value is not None and math.isfinite(score.value)


def answer_row(image: Mapping[str, Any], question: JudgeQuestion, answer: VisionAnswer) -> dict[str, Any]:
    """Return a row of the table of raw answers."""
    parsed = parse_answer(question, answer)
    return {
        "prompt_id": image["prompt_id"],
        "sample_index": image["sample_index"],
        "kind": question.kind,
        "question": question.text,
        "expected": None if question.clause is None else ("yes" if question.clause.expected else "no"),
        "raw_answer": answer.text,
        "finish_reason": answer.finish_reason,
        "logprob_yes": parsed.yes_no and parsed.yes_no.logprob_yes,
        "logprob_no": parsed.yes_no and parsed.yes_no.logprob_no,
        "share_yes": parsed.yes_no and parsed.yes_no.share_yes,
        "parsed": parsed.text,
        "parse_status": parsed.status,
        "error": answer.error,
    }
