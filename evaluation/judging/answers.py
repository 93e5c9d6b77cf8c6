"""Parses the answers of judge models: the Yes/No of VQAScore and the ratings of UnifiedReward.

Every answer gets a status. Nothing is guessed from a malformed answer, and none is dropped silently: the caller counts
it under its status.
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
TRUNCATED = "cut"
STATUSES = (OK, MISSING, NOT_A_NUMBER, OUT_OF_RANGE, AMBIGUOUS, TRUNCATED)
RATING_RANGE = (1.0, 5.0)

_LOGPROB_TOLERANCE = 1e-3
"""Rounding may put a log-probability above 0 by this much at most."""

_LOG_ZERO = -1e9
"""Replaces log 0, which JSON cannot represent."""


@dataclass(frozen=True)
class YesNoAnswer:
    """A judge's answer to a Yes/No question: log-probabilities at the first answer token, and the answer as text."""

    status: str
    """Status of the log-probability of "Yes", on which the score depends."""
    logprob_yes: float | None
    logprob_no: float | None
    text_answer: str
    """First word of the text: "yes", "no" or "other"."""

    @property
    def probability_yes(self) -> float | None:
        """P("Yes") over the whole vocabulary, which is the published VQAScore."""
        return None if self.logprob_yes is None else min(math.exp(self.logprob_yes), 1.0)

    @property
    def share_yes(self) -> float | None:
        """P("Yes") / (P("Yes") + P("No")), computed in log space so that tiny probabilities do not underflow."""
        if self.logprob_yes is None or self.logprob_no is None:
            return None
        difference = self.logprob_no - self.logprob_yes
        if difference > 0:
            return math.exp(-difference) / (1.0 + math.exp(-difference))
        return 1.0 / (1.0 + math.exp(difference))

    @property
    def verdict(self) -> bool | None:
        """True if Yes is more likely than No; a tie is a No; None if neither probability is known.

        An endpoint that returns only its most likely tokens may leave out one of the two words: the other is more
        likely.
        """
        if self.logprob_yes is None:
            return None if self.logprob_no is None else False
        return self.logprob_no is None or self.logprob_yes > self.logprob_no


def parse_yes_no(text: str, logprobs: Mapping[str, float]) -> YesNoAnswer:
    """Parse a Yes/No answer from its text and the log-probabilities of "Yes" and "No".

    -inf, the logarithm of probability zero, is valid. A missing, NaN or positive log-probability of "Yes" gives a
    status other than "ok", and no score.
    """
    status, yes = _parse_logprob(logprobs.get(YES))
    _, no = _parse_logprob(logprobs.get(NO))
    match = re.match(r"\W*(\w+)", text)
    word = match.group(1).lower() if match else ""
    return YesNoAnswer(status, yes, no, word if word in ("yes", "no") else "other")


def _parse_logprob(value: float | None) -> tuple[str, float | None]:
    if value is None:
        return MISSING, None
    if math.isnan(value):
        return NOT_A_NUMBER, None
    if value > _LOGPROB_TOLERANCE:
        return OUT_OF_RANGE, None
    return OK, max(float(value), _LOG_ZERO)


@dataclass(frozen=True)
class Rating:
    """The rating on one axis: its value if the status is "ok", else None."""

    status: str
    value: float | None


# "Style Score (1-5): 2.69", also with bold marks, other separators or dashes, a trailing "/5", or without a value.
_LABEL = (
    r"(?im)^[^\S\n]*(?:[-*•>#]+[^\S\n]*)*[*_`]*{axis}(?:[^\S\n]+score)?[*_`]*(?:[^\S\n]*[(\[][^)\]\n]*[)\]])?[*_`]*"
)
_SEPARATOR = r"[^\S\n]*[:=–—-][^\S\n]*[*_`]*[^\S\n]*"
_VALUE = re.compile(
    r"(?P<number>[+-]?(?:\d+(?:[.,]\d+)?|\.\d+))(?P<scale>[^\S\n]*(?:/|out of)[^\S\n]*5(?:\.0+)?)?(?![\w%])"
)


def parse_ratings(text: str, *, is_truncated: bool = False) -> dict[str, Rating]:
    """Return a rating for each axis of `RATING_AXES`, from an answer in UnifiedReward's format.

    "missing": no line for the axis, or nothing after its label. "not_a_number": anything but a number (NaN, N/A, X).
    "out_of_range": a number outside 1 to 5; it is never clipped. "ambiguous": several lines for the axis that
    disagree. "cut": the axis is in the last line of an answer that ended at the token limit (`is_truncated`), where
    2.69 may have become 2. Lines may come in any order, with Markdown around them and prose between them.
    """
    if not is_truncated:
        return {axis: _parse_axis(text, axis) for axis in RATING_AXES}
    complete_lines, _, last_line = text.rpartition("\n")
    ratings = {axis: _parse_axis(complete_lines, axis) for axis in RATING_AXES}
    truncated = {axis for axis in RATING_AXES if _parse_axis(last_line, axis).status != MISSING}
    return {axis: Rating(TRUNCATED, None) if axis in truncated else rating for axis, rating in ratings.items()}


def _parse_axis(text: str, axis: str) -> Rating:
    pattern = re.compile(_LABEL.format(axis=axis) + _SEPARATOR + r"(?P<rest>[^\n]*)")
    ratings = {_parse_value(match.group("rest")) for match in pattern.finditer(text)}
    if not ratings:
        return Rating(MISSING, None)
    if len(ratings) > 1:
        return Rating(AMBIGUOUS, None)
    return ratings.pop()


def _parse_value(rest: str) -> Rating:
    rest = rest.strip().strip("*_`[]()").strip()
    if not rest:
        return Rating(MISSING, None)
    match = _VALUE.match(rest)
    if match is None:
        return Rating(NOT_A_NUMBER, None)
    value = float(match.group("number").replace(",", "."))
    low, high = RATING_RANGE
    return Rating(OK, value) if low <= value <= high else Rating(OUT_OF_RANGE, None)
