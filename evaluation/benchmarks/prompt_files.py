"""Parses the prompt files of GenEval, GenAI-Bench and DrawBench in their published formats.

All problems in a file are reported in one error, each with its line.
"""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.config import PromptFile
from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")
GENAI_BASIC = ("attribute", "scene", "spatial relation", "action relation", "part relation")
GENAI_ADVANCED = ("counting", "comparison", "differentiation", "negation", "universal")
_UNIONS = ("basic", "advanced")
_MAX_PROBLEMS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """A prompt of a benchmark; `prompt_id` depends only on its position in the benchmark's file."""

    benchmark: str
    prompt_id: str
    prompt: str
    skills: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "prompt_id": self.prompt_id,
            "prompt": self.prompt,
            "skills": list(self.skills),
            "metadata": json.dumps(self.metadata, sort_keys=True, ensure_ascii=False),
        }


class _Problems:
    """Collects the problems of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._messages: list[str] = []

    def add(self, line: int, message: str) -> None:
        self._messages.append(f"{self.path}:{line}: {message}")

    def raise_if_any(self, expected: str) -> None:
        if not self._messages:
            return
        shown = self._messages[:_MAX_PROBLEMS_SHOWN]
        num_more = len(self._messages) - len(shown)
        tail = [f"... and {num_more} more"] if num_more else []
        raise ThroughlineError("\n".join([*shown, *tail, f"expected {expected}; fix the file and run again"]))


def scan_prompt_file(path: Path, num_prompts: int | None = None) -> PromptFile:
    """Return a reference that pins the file's current content. Raises ThroughlineError if it cannot be read."""
    try:
        return PromptFile(path=str(path.absolute()), sha256=file_sha256(path), num_prompts=num_prompts)
    except OSError as error:
        raise ThroughlineError(f"{path}: prompt file cannot be read ({error.strerror}); check its path") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ThroughlineError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def parse_geneval(path: Path) -> list[EvaluationPrompt]:
    """Read GenEval's ``evaluation_metadata.jsonl``: one object per line with tag, include, exclude and prompt.

    `skills` is the task tag; `metadata` holds the include and exclude clauses unchanged.
    """
    problems = _Problems(path)
    prompts: list[EvaluationPrompt] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(number, f"not JSON ({error.msg} at column {error.colno})")
            continue
        messages = _geneval_problems(row)
        for message in messages:
            problems.add(number, message)
        if not messages:
            prompts.append(
                EvaluationPrompt(
                    benchmark="geneval",
                    prompt_id=f"geneval-{len(prompts):05d}",
                    prompt=row["prompt"],
                    skills=(row["tag"],),
                    metadata={"include": row["include"], "exclude": row.get("exclude", [])},
                )
            )
    if not prompts:
        problems.add(1, "no prompts")
    problems.raise_if_any("one JSON object per line with tag, include, prompt and, for counting, exclude")
    return prompts


def _geneval_problems(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return [f"expected an object, found {type(row).__name__}"]
    messages = []
    if row.get("tag") not in GENEVAL_TAGS:
        messages.append(f"tag {row.get('tag')!r} is none of {', '.join(GENEVAL_TAGS)}")
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        messages.append("prompt is missing or empty")
    include, exclude = row.get("include"), row.get("exclude", [])
    if not isinstance(include, list) or not include:
        messages.append("include is missing or empty")
        include = []
    if not isinstance(exclude, list):
        messages.append("exclude is not a list")
        exclude = []
    for index, clause in enumerate(include):
        messages += [f"include[{index}]: {message}" for message in _clause_problems(clause, index)]
    for index, clause in enumerate(exclude):
        messages += [f"exclude[{index}]: {message}" for message in _clause_problems(clause, 0)]
    return messages


def _clause_problems(clause: Any, num_earlier: int) -> list[str]:
    if not isinstance(clause, dict):
        return [f"expected an object, found {type(clause).__name__}"]
    messages = []
    if not isinstance(clause.get("class"), str) or not clause["class"].strip():
        messages.append("class is missing or empty")
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        messages.append(f"count {count!r} is not a positive integer")
    if "color" in clause and clause["color"] not in GENEVAL_COLOURS:
        messages.append(f"color {clause['color']!r} is none of {', '.join(GENEVAL_COLOURS)}")
    if "position" in clause:
        messages += _position_problems(clause["position"], num_earlier)
    return messages


def _position_problems(position: Any, num_earlier: int) -> list[str]:
    if not isinstance(position, list) or len(position) != 2:
        return [f"position {position!r} is not [relation, index of an earlier clause]"]
    relation, target = position
    messages = []
    if relation not in GENEVAL_RELATIONS:
        messages.append(f"position relation {relation!r} is none of {', '.join(GENEVAL_RELATIONS)}")
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < num_earlier:
        messages.append(f"position refers to clause {target!r}, which is not an earlier clause")
    return messages


def parse_genai_bench(image_path: Path, skills_path: Path) -> list[EvaluationPrompt]:
    """Read GenAI-Bench's ``genai_image.json`` (prompts by id) and ``genai_skills.json`` (ids by skill).

    `skills` holds the skills, and the unions "basic" and "advanced", that the second file lists for the prompt, in the
    order of that file; a few prompts have none. Human ratings of other models are ignored.
    """
    text, problems = _read_text(image_path), _Problems(image_path)
    lines = _JsonLines(text)
    entries = _json_object(text, image_path)
    skills = _genai_skills(skills_path, set(entries))
    prompts = []
    for key, entry in entries.items():
        if not isinstance(entry, dict):
            problems.add(lines.of_key(key), f"entry {key!r}: expected an object, found {type(entry).__name__}")
            continue
        if not key.isdecimal() or entry.get("id", key) != key:
            problems.add(lines.of_key(key), f"entry {key!r} has id {entry.get('id')!r}; ids must be decimal and equal")
        if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
            problems.add(lines.of_key(key), f"entry {key!r}: prompt is missing or empty")
            continue
        prompts.append(
            EvaluationPrompt(
                benchmark="genai_bench",
                prompt_id=f"genai_bench-{key}",
                prompt=entry["prompt"],
                skills=tuple(name for name, ids in skills.items() if key in ids),
            )
        )
    if not prompts:
        problems.add(1, "no prompts")
    problems.raise_if_any('{"00000": {"id": "00000", "prompt": "..."}, ...}')
    return prompts


class _JsonLines:
    """Finds the line of a key in a JSON text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def of_key(self, key: str) -> int:
        match = re.search(re.escape(json.dumps(key)) + r"\s*:", self._text)
        return self._text.count("\n", 0, match.start()) + 1 if match else 1


def _json_object(text: str, path: Path) -> dict[str, Any]:
    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            key = next(name for name in result if names.count(name) > 1)
            raise ThroughlineError(f"{path}:{_JsonLines(text).of_key(key)}: duplicate key {key!r}")
        return result

    try:
        value = json.loads(text, object_pairs_hook=reject_duplicates)
    except json.JSONDecodeError as error:
        raise ThroughlineError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise ThroughlineError(f"{path}:1: expected an object, found {type(value).__name__}")
    return value


def _genai_skills(path: Path, known: set[str]) -> dict[str, set[str]]:
    text, problems = _read_text(path), _Problems(path)
    lines = _JsonLines(text)
    by_number = {int(key): key for key in known if key.isdecimal()}
    skills: dict[str, set[str]] = {}
    for name, ids in _json_object(text, path).items():
        line = lines.of_key(name)
        if name not in (*_UNIONS, *GENAI_BASIC, *GENAI_ADVANCED):
            problems.add(line, f"skill {name!r} is none of {', '.join((*_UNIONS, *GENAI_BASIC, *GENAI_ADVANCED))}")
            continue
        if not isinstance(ids, list):
            problems.add(line, f"skill {name!r}: expected a list of ids, found {type(ids).__name__}")
            continue
        skills[name] = set()
        for value in ids:
            number = int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else None
            if number not in by_number:
                problems.add(line, f"skill {name!r} lists id {value!r}, which no prompt has")
            else:
                skills[name].add(by_number[number])
    problems.raise_if_any('{"attribute": [0, 1, ...], ...} with ids of the prompt file')
    return skills


def parse_drawbench(path: Path) -> list[EvaluationPrompt]:
    """Read DrawBench's CSV with the columns Prompts and Category.

    `skills` is the category, stripped because one published category ends in a space.
    """
    problems = _Problems(path)
    prompts: list[EvaluationPrompt] = []
    reader = csv.reader(_read_text(path).splitlines(keepends=True), strict=True)
    try:
        header = next(reader, [])
        if [name.strip() for name in header] != ["Prompts", "Category"]:
            raise ThroughlineError(f"{path}:1: header is {header}, expected Prompts,Category; is this DrawBench's CSV?")
        for row in reader:
            if not row:
                continue
            if len(row) != 2:
                problems.add(reader.line_num, f"{len(row)} columns, expected 2 (a comma inside a prompt needs quotes)")
            elif not row[0].strip() or not row[1].strip():
                problems.add(reader.line_num, f"{'prompt' if row[1].strip() else 'category'} is empty")
            else:
                prompts.append(
                    EvaluationPrompt(
                        benchmark="drawbench",
                        prompt_id=f"drawbench-{len(prompts):05d}",
                        prompt=row[0].strip(),
                        skills=(row[1].strip(),),
                    )
                )
    except csv.Error as error:
        problems.add(reader.line_num, f"not CSV ({error})")
    if not prompts:
        problems.add(1, "no prompts")
    problems.raise_if_any("rows of prompt and category")
    return prompts
