"""GenEval's clauses: the questions to the judge, and how the answers combine."""

import itertools

import pytest

from evaluation.benchmarks.geneval import ClauseQuestion, clause_questions, is_fulfilled
from tests.evaluation.worlds import GENEVAL_LINES


def questions_of(line: dict[str, object]) -> list[tuple[str, str, bool]]:
    return [(q.kind, q.statement, q.expected) for q in clause_questions(line)]


@pytest.mark.parametrize(
    ("line", "expected"),
    list(zip(
        GENEVAL_LINES,
        [
            [("object", "a star", True)],
            [("object", "a star", True), ("object", "a fish", True)],
            [("count", "two cats", True), ("exclude", "three cats", False)],
            [("color", "a red apple", True)],
            [("object", "a dog", True), ("object", "a cat", True), ("position", "a cat to the left of a dog", True)],
            [("color", "a blue car", True), ("color", "a yellow star", True)],
        ],
        strict=True,
    )),
)  # fmt: skip
def test_each_task_asks_about_all_its_clauses(line: dict[str, object], expected: list[object]) -> None:
    assert questions_of(line) == expected


@pytest.mark.parametrize(
    ("name", "count", "statement"),
    [
        ("bus", 3, "three buses"), ("bench", 2, "two benches"), ("knife", 4, "four knives"),
        ("person", 2, "two people"),
        ("sheep", 2, "two sheep"), ("sheep", 1, "a sheep"), ("fish", 1, "a fish"), ("skis", 1, "skis"),
        ("scissors", 1, "scissors"), ("computer mouse", 2, "two computer mice"), ("wine glass", 2, "two wine glasses"),
        ("fire hydrant", 1, "a fire hydrant"), ("umbrella", 1, "an umbrella"), ("cherry", 2, "two cherries"),
        ("key", 2, "two keys"), ("apple", 12, "12 apples"),
    ],
)  # fmt: skip
def test_counts_are_plain_english(name: str, count: int, statement: str) -> None:
    assert questions_of({"include": [{"class": name, "count": count}]})[0][1] == statement


def test_the_same_statement_is_asked_once() -> None:
    clause = {"class": "cat", "count": 1}
    assert len(questions_of({"include": [clause, clause]})) == 1


def test_an_excluded_colour_is_asked_with_its_colour() -> None:
    line = {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 1, "color": "red"}]}
    assert questions_of(line)[-1] == ("exclude", "a red cat", False)


def test_all_clauses_must_come_out_right() -> None:
    questions = [ClauseQuestion("object", "a cat", True), ClauseQuestion("exclude", "two cats", False)]
    outcomes = {
        answers: is_fulfilled(questions, answers) for answers in itertools.product([True, False, None], repeat=2)
    }
    assert [answers for answers, outcome in outcomes.items() if outcome is True] == [(True, False)]
    assert [answers for answers, outcome in outcomes.items() if outcome is None] == [
        (True, None),
        (None, False),
        (None, None),
    ]
