"""Reads what judge models answer: the Yes/No of VQAScore and the ratings of UnifiedReward.

Every answer gets a status word. Nothing is guessed from a malformed answer, and nothing malformed is dropped: the
caller counts it under its status.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.core.model_prompts import NO, RATING_AXES, YES

OK = "ok"
MISSING = "missing"
NOT_A_NUMBER = "not_a_number"
OUT_OF_RANGE = "out_of_range"
AMBIGUOUS = "ambiguous"
CUT = "cut"
STATUSES = (OK, MISSING, NOT_A_NUMBER, OUT_OF_RANGE, AMBIGUOUS, CUT)
RATING_RANGE = (1.0, 5.0)

# A probability recomputed from a logarithm may pass 1 by rounding, not by more.
_LOGPROB_SLACK = 1e-3


_IMPOSSIBLE_LOGPROB = -1e9
"""Stands for log 0, which neither JSON nor a table's reader takes."""


@dataclass(frozen=True)
class YesNo:
    """A judge's answer to a Yes/No question: log-probabilities at the first answer token, and what the text says."""

    status: str
    """Of the log-probability of "Yes", on which the score rests."""
    logprob_yes: float | None
    logprob_no: float | None
    said: str
    """"yes", "no" or "other"."""

    @property
    def probability_yes(self) -> float | None:
        """P("Yes") over the whole vocabulary: VQAScore as published."""
        return None if self.logprob_yes is None else min(math.exp(self.logprob_yes), 1.0)

    @property
    def share_yes(self) -> float | None:
        """P("Yes") / (P("Yes") + P("No")), from the logarithms, so that tiny probabilities keep their ratio."""
        if self.logprob_yes is None or self.logprob_no is None:
            return None
        difference = self.logprob_no - self.logprob_yes
        if difference > 0:
            return math.exp(-difference) / (1.0 + math.exp(-difference))
        return 1.0 / (1.0 + math.exp(difference))

    @property
    def verdict(self) -> bool | None:
        """Whether Yes is likelier than No; a tie is a No.

        An endpoint that tells its likeliest tokens alone may leave one of the two words out: the other is likelier.
        """
        if self.logprob_yes is None:
            return None if self.logprob_no is None else False
        return self.logprob_no is None or self.logprob_yes > self.logprob_no


def read_yes_no(text: str, logprobs: Mapping[str, float]) -> YesNo:
    """Return the reading of a Yes/No answer: its text and the log-probabilities of "Yes" and "No".

    A probability of zero may come as -inf and is kept as a number. A missing, NaN or positive log-probability of
    "Yes" gives a status other than "ok", and no score.
    """
    status, yes = _read_logprob(logprobs.get(YES))
    _, no = _read_logprob(logprobs.get(NO))
    word = re.match(r"\W*(\w+)", text)
    said = word.group(1).lower() if word else ""
    return YesNo(status, yes, no, said if said in ("yes", "no") else "other")


def _read_logprob(value: float | None) -> tuple[str, float | None]:
    if value is None:
        return MISSING, None
    if math.isnan(value):
        return NOT_A_NUMBER, None
    if value > _LOGPROB_SLACK:
        return OUT_OF_RANGE, None
    return OK, max(float(value), _IMPOSSIBLE_LOGPROB)


@dataclass(frozen=True)
class Rating:
    """One axis of a rating: its value where the status is "ok", else None."""

    status: str
    value: float | None


# "Style Score (1-5): 2.69", with bold marks, other separators, another dash, or "/5" behind; and the label alone.
_LABEL = (
    r"(?im)^[^\S\n]*(?:[-*•>#]+[^\S\n]*)*[*_`]*{axis}(?:[^\S\n]+score)?[*_`]*(?:[^\S\n]*[(\[][^)\]\n]*[)\]])?[*_`]*"
)
_SEPARATOR = r"[^\S\n]*[:=–—-][^\S\n]*[*_`]*[^\S\n]*"
_VALUE = re.compile(
    r"(?P<number>[+-]?(?:\d+(?:[.,]\d+)?|\.\d+))(?P<scale>[^\S\n]*(?:/|out of)[^\S\n]*5(?:\.0+)?)?(?![\w%])"
)


def read_ratings(text: str, *, is_cut: bool = False) -> dict[str, Rating]:
    """Return a rating for each axis of `RATING_AXES`, from an answer in UnifiedReward's format.

    "missing": no line for the axis, or nothing behind its label. "not_a_number": something that is no number (NaN,
    N/A, X). "out_of_range": a number outside 1 to 5; it is never clipped. "ambiguous": several lines for the axis
    that disagree. "cut": the axis stands in the last line of an answer that ended at the token limit (`is_cut`), where
    2.69 may have become 2. Lines may come in any order, with Markdown around them and prose between them.
    """
    if not is_cut:
        return {axis: _read_axis(text, axis) for axis in RATING_AXES}
    whole_lines, _, last_line = text.rpartition("\n")
    ratings = {axis: _read_axis(whole_lines, axis) for axis in RATING_AXES}
    touched = {axis for axis in RATING_AXES if _read_axis(last_line, axis).status != MISSING}
    return {axis: Rating(CUT, None) if axis in touched else rating for axis, rating in ratings.items()}


def _read_axis(text: str, axis: str) -> Rating:
    pattern = re.compile(_LABEL.format(axis=axis) + _SEPARATOR + r"(?P<rest>[^\n]*)")
    found = {_read_value(match.group("rest")) for match in pattern.finditer(text)}
    if not found:
        return Rating(MISSING, None)
    if len(found) > 1:
        return Rating(AMBIGUOUS, None)
    return found.pop()


def _read_value(rest: str) -> Rating:
    rest = rest.strip().strip("*_`[]()").strip()
    if not rest:
        return Rating(MISSING, None)
    match = _VALUE.match(rest)
    if match is None:
        return Rating(NOT_A_NUMBER, None)
    value = float(match.group("number").replace(",", "."))
    low, high = RATING_RANGE
    return Rating(OK, value) if low <= value <= high else Rating(OUT_OF_RANGE, None)
