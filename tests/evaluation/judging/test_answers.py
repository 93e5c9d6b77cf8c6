"""Judge answers: well-formed ones are parsed, all others get a status and are never guessed or dropped."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.judging.answers import (
    AMBIGUOUS,
    MISSING,
    NOT_A_NUMBER,
    OK,
    OUT_OF_RANGE,
    RATING_RANGE,
    STATUSES,
    TRUNCATED,
    parse_ratings,
    parse_yes_no,
)
from pipelines.core.model_prompts import RATING_AXES, unified_reward_answer

CLEAN = unified_reward_answer(3.5, 4.25, 2.69)


@given(st.lists(st.floats(1, 5), min_size=3, max_size=3))
def test_an_answer_in_the_protocols_format_is_parsed(values: list[float]) -> None:
    ratings = parse_ratings(unified_reward_answer(*values))
    for axis, value in zip(RATING_AXES, values, strict=True):
        assert ratings[axis].status == OK
        assert ratings[axis].value == pytest.approx(value, abs=0.00501)


@pytest.mark.parametrize(
    "line",
    [
        "Style Score (1-5): 2.69",
        "**Style Score (1-5):** 2.69",
        "- **Style Score (1-5)**: 2.69",
        "* Style Score (1-5): **2.69**",
        "### Style Score (1–5): 2.69",
        "style score (1-5) = 2.69",
        "Style: 2.69",
        "Style Score: 2.69/5",
        "Style Score (1-5): 2.69 out of 5",
        "Style Score (1-5): 2,69",
        "Style Score (1-5) – 2.69",
        "Style Score (1-5): [2.69]",
        "  Style Score (1-5):2.69.",
        "Style Score [1-5]: 2.69 (pleasant colours)",
    ],
)
def test_common_variations_of_a_line_are_parsed(line: str) -> None:
    answer = f"Let me look.\nAlignment Score (1-5): 4\r\nCoherence Score (1-5): 3\n{line}\nThat is all."
    style = parse_ratings(answer)["Style"]
    assert (style.status, style.value) == (OK, 2.69)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("", MISSING),
        ("Style Score (1-5):", MISSING),
        ("Style Score (1-5): **", MISSING),
        ("The style is pleasant.", MISSING),
        ("My Style Score (1-5): 3", MISSING),
        ("Style Score (1-5): nan", NOT_A_NUMBER),
        ("Style Score (1-5): NaN", NOT_A_NUMBER),
        ("Style Score (1-5): N/A", NOT_A_NUMBER),
        ("Style Score (1-5): X", NOT_A_NUMBER),
        ("Style Score (1-5): inf", NOT_A_NUMBER),
        ("Style Score (1-5): 70%", NOT_A_NUMBER),
        ("Style Score (1-5): 4th", NOT_A_NUMBER),
        ("Style Score (1-5): high", NOT_A_NUMBER),
        ("Style Score (1-5): 0.99", OUT_OF_RANGE),
        ("Style Score (1-5): 5.01", OUT_OF_RANGE),
        ("Style Score (1-5): -3", OUT_OF_RANGE),
        ("Style Score (1-5): 27", OUT_OF_RANGE),
        ("Style Score (1-5): 0", OUT_OF_RANGE),
        ("Style Score (1-5): 2\nStyle Score (1-5): 4", AMBIGUOUS),
        ("Style Score (1-5): 2\nStyle Score (1-5): nan", AMBIGUOUS),
    ],
)
def test_a_malformed_line_gets_its_status(line: str, status: str) -> None:
    ratings = parse_ratings(f"Alignment Score (1-5): 4.00\nCoherence Score (1-5): 3.10\n{line}")
    assert (ratings["Style"].status, ratings["Style"].value) == (status, None)
    assert (ratings["Alignment"].value, ratings["Coherence"].value) == (4.0, 3.1)


def test_a_repeated_line_is_one_rating() -> None:
    assert parse_ratings(f"{CLEAN}\n\n{CLEAN}") == parse_ratings(CLEAN)


def test_a_value_on_the_next_line_is_not_read() -> None:
    assert parse_ratings("Style Score (1-5):\n4.5")["Style"].status == MISSING


@pytest.mark.parametrize("length", range(len(CLEAN) + 1))
def test_an_answer_truncated_anywhere_never_gives_another_number(length: int) -> None:
    complete, ratings = parse_ratings(CLEAN), parse_ratings(CLEAN[:length], is_truncated=True)
    for axis in RATING_AXES:
        assert ratings[axis].status in (OK, MISSING, TRUNCATED)
        assert ratings[axis].status != OK or ratings[axis] == complete[axis]
    assert ratings["Style"].status != OK


@given(st.text(max_size=300))
def test_any_text_gives_every_axis_a_known_status(text: str) -> None:
    ratings = parse_ratings(text)
    assert list(ratings) == list(RATING_AXES)
    for rating in ratings.values():
        assert rating.status in STATUSES
        assert (rating.value is not None) == (rating.status == OK)
        assert rating.value is None or RATING_RANGE[0] <= rating.value <= RATING_RANGE[1]


@given(st.floats(-50, -1e-9), st.floats(-50, -1e-9))
def test_yes_and_no_give_probability_and_share(yes: float, no: float) -> None:
    answer = parse_yes_no("Yes", {"Yes": yes, "No": no})
    assert answer.status == OK
    assert answer.probability_yes == pytest.approx(math.exp(yes))
    assert answer.share_yes == pytest.approx(math.exp(yes) / (math.exp(yes) + math.exp(no)), rel=1e-9)
    assert answer.verdict == (yes > no)


def test_the_share_is_right_if_probabilities_underflow() -> None:
    answer = parse_yes_no("Maybe", {"Yes": -900.0, "No": -900.0 - math.log(3)})
    assert answer.probability_yes == 0.0
    assert answer.share_yes == pytest.approx(0.75)
    assert answer.text_answer == "other"


@pytest.mark.parametrize(
    ("logprobs", "status", "verdict"),
    [
        ({}, MISSING, None),
        ({"No": -0.1}, MISSING, False),
        ({"Yes": -0.1}, OK, True),
        ({"Yes": math.nan, "No": -0.1}, NOT_A_NUMBER, False),
        ({"Yes": 0.5, "No": -0.1}, OUT_OF_RANGE, False),
        ({"Yes": -math.inf, "No": -0.1}, OK, False),
        ({"Yes": -0.1, "No": -math.inf}, OK, True),
        ({"Yes": -0.7, "No": -0.7}, OK, False),
    ],
)
def test_odd_logprobs_get_a_status(logprobs: dict[str, float], status: str, verdict: bool | None) -> None:
    answer = parse_yes_no("Yes", logprobs)
    assert (answer.status, answer.verdict) == (status, verdict)
    assert (answer.probability_yes is not None) == (status == OK)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes", "yes"), (" no.", "no"), ("**Yes**", "yes"), ("Yesterday", "other"), ("", "other"), ("Not", "other")],
)
def test_the_text_answer_is_the_first_word(text: str, expected: str) -> None:
    assert parse_yes_no(text, {"Yes": -1.0, "No": -1.0}).text_answer == expected
