"""Writes the demo's prompt files in the formats of GenEval, GenAI-Bench and DrawBench, with the scenes' vocabulary.

The prompts are the project's own; only the formats are the benchmarks'. The tiny judge was trained on statements of
this form; another wording would test its language instead of the images. The files are committed; run
``python -m demo.prompts`` after a change of vocabulary.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from demo.questions import statement
from demo.scenes import Scene, caption, group_phrase, sample_scene
from demo.sprites import COLOURS, NOUNS
from pipelines.core.atomic import write_bytes

PROMPTS_DIR = Path(__file__).parent / "prompt_files"
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
BASIC_SKILLS = ("attribute", "scene", "spatial relation")
ADVANCED_SKILLS = ("counting", "comparison", "differentiation", "negation", "universal")
PROMPTS_PER_TAG = 3
PROMPTS_PER_SKILL = 3
DRAWBENCH_CATEGORIES = ("Colors", "Counting", "Positional", "Descriptions")
PROMPTS_PER_CATEGORY = 3
_SEED = 20_240_607
_POSITIONS = ("left of", "right of", "above", "below")


def write_prompt_files(out_dir: Path = PROMPTS_DIR) -> list[Path]:
    """Write the four prompt files under `out_dir`; the same vocabulary gives the same bytes. Return their paths."""
    images, skills = genai_bench()
    contents = {
        "geneval/evaluation_metadata.jsonl": "".join(json.dumps(row) + "\n" for row in geneval()),
        "genai_bench/genai_image.json": json.dumps(images, indent=4) + "\n",
        "genai_bench/genai_skills.json": json.dumps(skills, indent=4) + "\n",
        "drawbench/DrawBench.csv": drawbench(),
    }
    for name, text in contents.items():
        (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out_dir / name, text.encode())
    return [out_dir / name for name in contents]


def geneval() -> list[dict[str, Any]]:
    """Return GenEval rows: tag, objects that the image must include and exclude, prompt."""
    rng = np.random.default_rng((_SEED, 1))
    return [_geneval_row(tag, rng) for tag in GENEVAL_TAGS for _ in range(PROMPTS_PER_TAG)]


def _geneval_row(tag: str, rng: np.random.Generator) -> dict[str, Any]:
    """Return a random row. If the tag does not test colour, the class itself is coloured ("red kite"): scenes and the
    judge's training contain no uncoloured objects. Counts stop at 3, so that scenes contain the excluded count too.
    """
    nouns = [str(noun) for noun in rng.choice(sorted(NOUNS), 2, replace=False)]
    colours = [str(colour) for colour in rng.choice(sorted(COLOURS), 2, replace=False)]
    first, second = zip(colours, nouns, strict=True)
    plain = [{"class": f"{colour} {noun}", "count": 1} for colour, noun in (first, second)]
    coloured = [{"class": noun, "count": 1, "color": colour} for colour, noun in (first, second)]
    row: dict[str, Any] = {"tag": tag}
    match tag:
        case "single_object":
            row["include"] = plain[:1]
            shown = group_phrase(first, 1)
        case "two_object":
            row["include"] = plain
            shown = f"{group_phrase(first, 1)} and {group_phrase(second, 1)}"
        case "counting":
            count = int(rng.integers(2, 4))
            row["include"] = [plain[0] | {"count": count}]
            row["exclude"] = [plain[0] | {"count": count + 1}]
            shown = group_phrase(first, count)
        case "colors":
            row["include"] = coloured[:1]
            shown = group_phrase(first, 1)
        case "position":
            relation = _POSITIONS[rng.integers(len(_POSITIONS))]
            row["include"] = [plain[0], plain[1] | {"position": [relation, 0]}]
            shown = f"{group_phrase(second, 1)} {relation} {group_phrase(first, 1)}"
        case "color_attr":
            row["include"] = coloured
            shown = f"{group_phrase(first, 1)} and {group_phrase(second, 1)}"
        case _:
            raise ValueError(f"{tag!r} is not a tag of GenEval")
    return row | {"prompt": f"a photo of {shown}"}


def genai_bench() -> tuple[dict[str, dict[str, str]], dict[str, list[int]]]:
    """Return GenAI-Bench's two files: prompts by id, and ids by skill."""
    rng = np.random.default_rng((_SEED, 2))
    images: dict[str, dict[str, str]] = {}
    skills: dict[str, list[int]] = {name: [] for name in ("basic", "advanced", *BASIC_SKILLS, *ADVANCED_SKILLS)}
    for skill in (*BASIC_SKILLS, *ADVANCED_SKILLS):
        for _ in range(PROMPTS_PER_SKILL):
            number = len(images)
            key = f"{number:05d}"
            prompt = _genai_prompt(skill, rng, {image["prompt"] for image in images.values()})
            images[key] = {"id": key, "prompt": prompt}
            skills["basic" if skill in BASIC_SKILLS else "advanced"].append(number)
            for name in _skills_of(skill):
                skills[name].append(number)
    return images, skills


def _skills_of(skill: str) -> tuple[str, ...]:
    """Return every skill that a prompt for `skill` tests."""
    return {
        "attribute": ("attribute", "scene"),
        "scene": ("attribute", "scene"),
        "spatial relation": ("attribute", "scene", "spatial relation"),
        "counting": ("attribute", "scene", "counting"),
        "differentiation": ("attribute", "differentiation"),
    }.get(skill, (skill,))


def _genai_prompt(skill: str, rng: np.random.Generator, used: set[str]) -> str:
    """Return a prompt for `skill` that is not in `used`: a whole caption if it tests the skill, else a statement."""
    fits: dict[str, Callable[[Scene], bool]] = {
        "attribute": lambda scene: list(scene.groups().values()) == [1],
        "scene": lambda scene: list(scene.groups().values()) == [1],
        "spatial relation": lambda scene: list(scene.groups().values()) == [1, 1],
        "counting": lambda scene: len(scene.groups()) == 1 and len(scene.objects) > 1,
    }
    for scene in _scenes(rng):
        if skill in fits:
            text = caption(scene) if fits[skill](scene) else None
        else:
            item = statement(scene, skill, True, rng)
            text = item.text if item else None
        if text is not None and text not in used:
            return text
    raise AssertionError("unreachable: _scenes is infinite")


def _scenes(rng: np.random.Generator) -> Iterator[Scene]:
    while True:
        yield sample_scene(rng)


def drawbench() -> str:
    """Return DrawBench's CSV: captions of scenes by category."""
    rng = np.random.default_rng((_SEED, 3))
    fits: dict[str, Callable[[dict[tuple[str, str], int]], bool]] = {
        "Colors": lambda groups: list(groups.values()) == [1],
        "Counting": lambda groups: len(groups) == 1 and max(groups.values()) > 1,
        "Positional": lambda groups: list(groups.values()) == [1, 1],
        "Descriptions": lambda groups: len(groups) > 2,
    }
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["Prompts", "Category"])
    for category in DRAWBENCH_CATEGORIES:
        chosen: list[str] = []
        while len(chosen) < PROMPTS_PER_CATEGORY:
            scene = sample_scene(rng)
            if fits[category](scene.groups()) and (text := caption(scene)) not in chosen:
                chosen.append(text)
        writer.writerows([text, category] for text in chosen)
    return stream.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PROMPTS_DIR)
    for path in write_prompt_files(parser.parse_args().out):
        print(path)
