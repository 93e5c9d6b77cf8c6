"""Prompt files: the published formats are parsed, and every problem is reported with file and line."""

import json
from pathlib import Path

import pytest

from evaluation.benchmarks.prompt_files import parse_drawbench, parse_genai_bench, parse_geneval
from evaluation.benchmarks.prompt_sets import STAGE, choose_evenly, read_prompts
from evaluation.config import PromptFile, PromptSetsConfig
from pipelines.core.errors import ThroughlineError
from tests.evaluation.worlds import GENEVAL_LINES, write_prompt_files


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_stage_writes_every_prompt_with_skills_and_stable_ids(tmp_path: Path) -> None:
    config = write_prompt_files(tmp_path / "files")
    output = STAGE.run(config, {}, tmp_path / "out")
    prompts = {prompt.prompt_id: prompt for prompt in read_prompts(output)}
    assert output.manifest.summary["num_prompts"] == {"geneval": 6, "genai_bench": 7, "drawbench": 3}
    assert prompts["geneval-00002"].metadata == {
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
    }
    assert prompts["genai_bench-00000"].skills == ("basic", "attribute", "scene")
    assert prompts["genai_bench-00004"].skills == ("advanced", "universal")  # the skills file has its id as a string
    assert prompts["genai_bench-00006"].skills == ()
    assert prompts["drawbench-00001"].prompt == 'A sign that says "hi, you".'
    assert prompts["drawbench-00001"].skills == ("Text",)  # a published category ends in a space
    assert {source.name for source in output.manifest.sources} >= {"DrawBench.csv", "genai_skills.json"}


def test_a_limit_keeps_ids_and_covers_every_task(tmp_path: Path) -> None:
    config = write_prompt_files(tmp_path / "files", repeats=4)
    unlimited = {p.prompt_id: p for p in read_prompts(STAGE.run(config, {}, tmp_path / "out"))}
    limited = read_prompts(
        STAGE.run(config.model_copy(update={"limits": {"geneval": 6, "genai_bench": 9}}), {}, tmp_path / "out")
    )
    assert all(unlimited[prompt.prompt_id] == prompt for prompt in limited)
    tasks = [prompt.skills[0] for prompt in limited if prompt.benchmark == "geneval"]
    assert len(tasks) == len(set(tasks)) == 6
    covered = {skill for prompt in limited if prompt.benchmark == "genai_bench" for skill in prompt.skills}
    assert covered >= {"attribute", "spatial relation", "counting", "negation", "universal", "comparison"}


def test_choose_evenly_returns_exactly_the_limit(tmp_path: Path) -> None:
    prompts = parse_geneval(write(tmp_path / "g.jsonl", "\n".join(json.dumps(line) for line in GENEVAL_LINES * 5)))
    for limit in (1, 5, 6, 7, 29, 30, 31):
        assert len(choose_evenly(prompts, limit)) == min(limit, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "colour"}, "tag 'colour' is none of"),
        ({"prompt": "  "}, "prompt is missing or empty"),
        ({"include": []}, "include is missing or empty"),
        ({"include": [{"class": "cat"}]}, "include[0]: count None"),
        ({"include": [{"class": "cat", "count": True}]}, "include[0]: count True"),
        ({"include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "color 'mauve' is none of"),
        (
            {"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
            "clause 0, which is not an earlier clause",
        ),
        ({"exclude": {"class": "cat"}}, "exclude is not a list"),
    ],
)
def test_geneval_problems_are_reported_with_file_and_line(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    lines = [json.dumps(GENEVAL_LINES[0]), "", json.dumps({**GENEVAL_LINES[0], **change})]
    path = write(tmp_path / "evaluation_metadata.jsonl", "\n".join(lines))
    with pytest.raises(ThroughlineError, match=r"evaluation_metadata\.jsonl:3: ") as caught:
        parse_geneval(path)
    assert message in str(caught.value)


def test_all_problems_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", '{"tag": 1}\nnot json\n' + json.dumps(GENEVAL_LINES[0]))
    with pytest.raises(ThroughlineError) as caught:
        parse_geneval(path)
    assert "g.jsonl:1: tag" in str(caught.value)
    assert "g.jsonl:2: not JSON" in str(caught.value)


def test_a_prompt_may_hold_a_unicode_line_separator(tmp_path: Path) -> None:
    line = {**GENEVAL_LINES[0], "prompt": "a photo\u2028of a star"}
    path = write(tmp_path / "g.jsonl", json.dumps(line, ensure_ascii=False) + "\n")
    assert parse_geneval(path)[0].prompt == "a photo\u2028of a star"


@pytest.mark.parametrize(
    ("image", "skills", "message"),
    [
        ('{\n"00000": {"id": "00001", "prompt": "x"}}', "{}", "image.json:2: entry '00000' has id '00001'"),
        ('{"00000": {"id": "00000"},\n"00001": {"id": "00001", "prompt": ""}}', "{}", "image.json:2: entry '00001'"),
        ('{"00000": {"id": "00000",\n "prompt": }}', "{}", "image.json:2: not JSON"),
        ('{"00000": {"prompt": "x"},\n"00000": {"prompt": "y"}}', "{}", "duplicate key '00000'"),
        ("[]", "{}", "image.json:1: expected an object"),
        ('{"00000": {"prompt": "x"}}', '{\n"attribute": [0, 7]}', "skills.json:2: skill 'attribute' lists id 7"),
        ('{"00000": {"prompt": "x"}}', '{"humour": [0]}', "skill 'humour' is none of"),
        ('{"00000": {"prompt": "x"}}', '{"scene": {"0": 1}}', "expected a list of ids"),
    ],
)
def test_genai_bench_problems_are_reported_with_file_and_line(
    tmp_path: Path, image: str, skills: str, message: str
) -> None:
    with pytest.raises(ThroughlineError) as caught:
        parse_genai_bench(write(tmp_path / "image.json", image), write(tmp_path / "skills.json", skills))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Prompt,Kind\nx,y\n", "d.csv:1: header is"),
        ("Prompts,Category\na red car, or not,Colors\n", "d.csv:2: 3 columns"),
        ('Prompts,Category\n"two\nlines",Text\n,Text\n', "d.csv:4: prompt is empty"),
        ("Prompts,Category\n", "no prompts"),
    ],
)
def test_drawbench_problems_are_reported_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ThroughlineError) as caught:
        parse_drawbench(write(tmp_path / "d.csv", text))
    assert message in str(caught.value)


def test_a_file_that_is_not_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(b"Prompts,Category\nfine,Text\ncaf\xe9,Text\n")
    with pytest.raises(ThroughlineError, match=r"d\.csv:3: not UTF-8"):
        parse_drawbench(path)


def test_another_version_of_a_file_is_rejected(tmp_path: Path) -> None:
    config = write_prompt_files(tmp_path / "files")
    assert config.drawbench is not None
    Path(config.drawbench.path).write_text("Prompts,Category\nx,y\n")
    with pytest.raises(ThroughlineError, match="another version of the file"):
        STAGE.run(config, {}, tmp_path / "out")


def test_a_file_with_too_few_prompts_is_rejected(tmp_path: Path) -> None:
    config = write_prompt_files(tmp_path / "files")
    assert config.geneval is not None
    pinned = config.geneval.model_copy(update={"num_prompts": 553})
    with pytest.raises(ThroughlineError, match="6 prompts, expected 553"):
        STAGE.run(config.model_copy(update={"geneval": pinned}), {}, tmp_path / "out")


def test_genai_bench_needs_both_of_its_files(tmp_path: Path) -> None:
    file = PromptFile(path="x", sha256="0" * 64)
    with pytest.raises(ValueError, match="needs both"):
        PromptSetsConfig(genai_image=file)
    with pytest.raises(ValueError, match="no benchmark has a prompt file"):
        PromptSetsConfig()
