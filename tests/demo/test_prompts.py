"""The demo's prompt files: the benchmarks' formats, every tag and skill, and the scenes' vocabulary."""

import re
from collections import Counter
from pathlib import Path

from demo.prompts import ADVANCED_SKILLS, BASIC_SKILLS, GENEVAL_TAGS, PROMPTS_DIR, write_prompt_files
from demo.questions import SKILLS
from demo.scenes import BACKGROUND_PHRASES, NUMBER_WORDS, RELATIONS, plural
from demo.sprites import COLOURS, NOUNS
from evaluation.benchmarks.prompt_files import EvaluationPrompt, parse_drawbench, parse_genai_bench, parse_geneval

GENEVAL = PROMPTS_DIR / "geneval" / "evaluation_metadata.jsonl"
GENAI = (PROMPTS_DIR / "genai_bench" / "genai_image.json", PROMPTS_DIR / "genai_bench" / "genai_skills.json")
DRAWBENCH = PROMPTS_DIR / "drawbench" / "DrawBench.csv"
OTHER_WORDS = {
    "photo",
    "of",
    "a",
    "an",
    "and",
    "left",
    "right",
    "one",
    "more",
    "than",
    "no",
    "all",
    "objects",
    "are",
}


def every_prompt() -> list[EvaluationPrompt]:
    return [*parse_geneval(GENEVAL), *parse_genai_bench(*GENAI), *parse_drawbench(DRAWBENCH)]


def test_committed_files_equal_the_scripts_output(tmp_path: Path) -> None:
    for path in write_prompt_files(tmp_path):
        assert path.read_bytes() == (PROMPTS_DIR / path.relative_to(tmp_path)).read_bytes()


def test_geneval_has_three_prompts_of_each_tag() -> None:
    assert Counter(prompt.skills[0] for prompt in parse_geneval(GENEVAL)) == dict.fromkeys(GENEVAL_TAGS, 3)


def test_genai_bench_covers_all_eight_skills_basic_and_advanced() -> None:
    assert set(BASIC_SKILLS + ADVANCED_SKILLS) == set(SKILLS)
    prompts = parse_genai_bench(*GENAI)
    counts = Counter(skill for prompt in prompts for skill in prompt.skills)
    assert len(prompts) == 24
    assert counts["basic"] + counts["advanced"] == 24
    assert all(counts[skill] >= 3 for skill in SKILLS)


def test_drawbench_has_twelve_prompts_in_its_own_categories() -> None:
    prompts = parse_drawbench(DRAWBENCH)
    assert len(prompts) == 12
    assert {prompt.skills[0] for prompt in prompts} == {"Colors", "Counting", "Positional", "Descriptions"}


def test_no_prompt_is_repeated_within_a_benchmark() -> None:
    counts = Counter((prompt.benchmark, prompt.prompt) for prompt in every_prompt())
    assert max(counts.values()) == 1


def test_prompts_use_only_the_vocabulary_of_the_scenes() -> None:
    known = {*NOUNS, *map(plural, NOUNS), *COLOURS, *NUMBER_WORDS, *OTHER_WORDS}
    known |= {word for phrase in (*BACKGROUND_PHRASES.values(), *RELATIONS) for word in phrase.split()}
    for prompt in every_prompt():
        assert set(re.findall(r"[a-z]+", prompt.prompt)) <= known, prompt.prompt
