"""Turns the clauses of a GenEval prompt into yes/no questions to a judge model, all of which must be answered right.

GenEval itself (arXiv 2310.11513) checks the same clauses with a detector (Mask2Former) and CLIP. A judge model is a
different instrument: its score is called ``geneval_vqa`` and is always reported with the judge's name.
`evaluation.benchmarks.prompt_files` parses the clauses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUESTIONS_VERSION = "geneval-vqa-1"
"""Version of the wording below; change it with the wording."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_RELATIONS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
_VOWELS = "aeiou"
_ALWAYS_PLURAL = ("scissors", "skis")
_PLURALS = {"person": "people", "sheep": "sheep", "scissors": "scissors", "skis": "skis", "knife": "knives",
            "mouse": "mice", "fish": "fish"}  # fmt: skip


@dataclass(frozen=True)
class ClauseQuestion:
    """A statement about the image, and the answer that fulfils the prompt."""

    kind: str
    """"object", "count", "color" or "position"; "exclude" for objects that must not appear."""
    statement: str
    expected: bool
    """True for Yes, False for No."""


def clause_questions(metadata: Mapping[str, Any]) -> list[ClauseQuestion]:
    """Return the questions of a GenEval prompt, without duplicates, in the order of its clauses.

    `metadata` holds `include` and `exclude` as in GenEval's file. As there, every include clause must hold (AND), and
    an exclude clause fails if the image shows as many objects as it names. Differs from GenEval: colour and position
    are one statement about the objects, where GenEval searches for any detected pair that satisfies them.
    """
    include: Sequence[Mapping[str, Any]] = metadata["include"]
    questions = []
    for clause in include:
        name, count = clause["class"], clause["count"]
        if "color" in clause:  # implies that the object is present
            questions.append(ClauseQuestion("color", _counted(count, f"{clause['color']} {name}"), True))
        else:
            questions.append(ClauseQuestion("object" if count == 1 else "count", _counted(count, name), True))
        if "position" in clause:
            relation, target = clause["position"]
            statement = f"{_counted(count, name)} {_RELATIONS[relation]} {_counted(**_object_of(include[target]))}"
            questions.append(ClauseQuestion("position", statement, True))
    for clause in metadata.get("exclude", ()):
        name = f"{clause['color']} {clause['class']}" if "color" in clause else clause["class"]
        questions.append(ClauseQuestion("exclude", _counted(clause["count"], name), False))
    return list(dict.fromkeys(questions))


def is_fulfilled(questions: Sequence[ClauseQuestion], answers: Sequence[bool | None]) -> bool | None:
    """Return True if all answers are the expected ones, False if any is wrong, None if it depends on an unknown one."""
    if any(
        answer is not None and answer != question.expected for question, answer in zip(questions, answers, strict=True)
    ):
        return False
    return None if any(answer is None for answer in answers) else True


def _object_of(clause: Mapping[str, Any]) -> dict[str, Any]:
    return {"count": clause["count"], "name": clause["class"]}


def _counted(count: int, name: str) -> str:
    return _with_article(name) if count == 1 else f"{_number(count)} {_plural(name)}"


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _with_article(name: str) -> str:
    """Return "a bench", "an apple" or "skis": plurals take no article."""
    return name if name in _ALWAYS_PLURAL else f"{'an' if name[0].lower() in _VOWELS else 'a'} {name}"


def _plural(name: str) -> str:
    head, _, last = name.rpartition(" ")
    if last in _PLURALS:
        plural = _PLURALS[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        plural = last + "es"
    elif last.endswith("y") and last[-2:-1] not in _VOWELS:
        plural = last[:-1] + "ies"
    else:
        plural = last + "s"
    return f"{head} {plural}" if head else plural
