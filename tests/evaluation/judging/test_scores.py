"""Scores: questions, scores from answers, conservation, and resuming."""

import dataclasses
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evaluation.config import ScoresConfig
from evaluation.judging.scores import STAGE
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import DROPPED_NAME
from pipelines.core.model_prompts import NO, YES, unified_reward_prompt, vqascore_question
from pipelines.runner.outputs import StageOutput
from recaption.engine import VisionAnswer, VisionRequest
from tests.evaluation.worlds import JUDGE, ScriptedPool, plausible_answer, write_samples

CONFIG = ScoresConfig(judge=JUDGE, images_per_unit=4)


def yes_with(yes: float) -> VisionAnswer:
    """Return an answer with P("Yes") = `yes`; other words than No get a tenth of the rest."""
    logprobs = {YES: math.log(yes), NO: math.log(0.9 * (1 - yes))}
    return VisionAnswer(text="Yes", finish_reason="length", num_prompt_tokens=9, num_answer_tokens=1, logprobs=logprobs)


def run(root: Path, prompts: StageOutput, benchmark: str, config: ScoresConfig = CONFIG) -> StageOutput:
    samples = write_samples(root, "static", benchmark, prompts, per_prompt=2 if benchmark == "geneval" else 1)
    return STAGE.run(config, {"samples": [samples], "prompt_sets": [prompts]}, root, f"static|{benchmark}")


def rows(output: StageOutput, name: str) -> list[dict[str, object]]:
    return pq.read_table(output.path(name)).to_pylist()


def test_vqascore_is_the_raw_probability_of_yes(pool: ScriptedPool, prompts: StageOutput, tmp_path: Path) -> None:
    requests: list[VisionRequest] = []
    pool._answer = lambda request: requests.append(request) or yes_with(0.8)  # type: ignore[func-returns-value]
    output = run(tmp_path, prompts, "genai_bench")
    scores = rows(output, "scores.parquet")
    assert len(scores) == 7
    assert requests[0].text == vqascore_question("a red apple on grass")
    assert requests[0].want_logprobs_of == (YES, NO)
    assert requests[0].max_tokens == 1
    assert all(row["value"] == pytest.approx(0.8) for row in scores)
    assert all(row["share_yes"] == pytest.approx(0.8 / 0.98) for row in scores)
    assert scores[0]["skills"] == ["basic", "attribute", "scene"]


def test_geneval_needs_every_clause(pool: ScriptedPool, prompts: StageOutput, tmp_path: Path) -> None:
    def knows_two_cats_and_stars(request: VisionRequest) -> VisionAnswer:
        true = ("a star", "a yellow star", "two cats", "a cat", "a dog", "a car")
        return yes_with(0.9 if request.text in {vqascore_question(statement) for statement in true} else 0.2)

    pool._answer = knows_two_cats_and_stars
    output = run(tmp_path, prompts, "geneval")
    fulfilled = {row["prompt_id"] for row in rows(output, "scores.parquet") if row["value"] == 1.0}
    assert fulfilled == {"geneval-00000", "geneval-00002"}  # a star; two cats and not three
    kinds = [row["kind"] for row in rows(output, "answers.parquet") if row["prompt_id"] == "geneval-00004"]
    assert kinds == ["clause:object", "clause:object", "clause:position"] * 2
    assert output.manifest.summary["questions_version"] == "geneval-vqa-1"


def test_every_unreadable_rating_is_a_counted_drop(pool: ScriptedPool, prompts: StageOutput, tmp_path: Path) -> None:
    texts = {
        "A red car.": "Alignment Score (1-5): 4\nCoherence Score (1-5): 6\nStyle Score (1-5): nan",
        "Three cats.": "I cannot rate this.",
    }

    def answer(request: VisionRequest) -> VisionAnswer:
        text = next((text for prompt, text in texts.items() if request.text == unified_reward_prompt(prompt)), None)
        default = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.5"
        return VisionAnswer(text=text or default, finish_reason="stop", num_prompt_tokens=1, num_answer_tokens=1)

    pool._answer = answer
    output = run(tmp_path, prompts, "drawbench", CONFIG.model_copy(update={"max_unscored_share": 0.6}))
    table = output.manifest.conservation
    assert table is not None
    assert (table.rows_in, table.rows_out) == (9, 4)
    assert table.dropped == {"missing": 3, "not_a_number": 1, "out_of_range": 1}
    assert len(rows(output, "scores.parquet")) == 4
    dropped = {(row["sample_key"], row["reason"]) for row in rows(output, DROPPED_NAME)}
    assert ("drawbench-00000-0|unified_style", "not_a_number") in dropped
    raw = [row["raw_answer"] for row in rows(output, "answers.parquet")]
    assert raw[0] == texts["A red car."] and raw[2] == texts["Three cats."]
    assert output.manifest.summary["means"]["unified_style"] == 2.5


def test_a_failed_answer_is_counted_with_its_error(pool: ScriptedPool, prompts: StageOutput, tmp_path: Path) -> None:
    def answer(request: VisionRequest) -> VisionAnswer:
        return VisionAnswer.failed("image too large") if "red apple" in request.text else yes_with(0.5)

    pool._answer = answer
    output = run(tmp_path, prompts, "genai_bench")
    table = output.manifest.conservation
    assert table is not None and table.dropped == {"answer_failed": 1}
    assert rows(output, DROPPED_NAME)[0]["detail"] == "image too large"


def test_a_judge_that_cannot_answer_stops_the_stage(pool: ScriptedPool, prompts: StageOutput, tmp_path: Path) -> None:
    pool._answer = lambda _: VisionAnswer.failed("no")
    with pytest.raises(ThroughlineError, match=r"4 of 4 scores cannot be read .* \(test/judge\)"):
        run(tmp_path, prompts, "genai_bench")


@pytest.mark.parametrize("benchmark", ["geneval", "genai_bench", "drawbench"])
def test_a_killed_run_resumes_and_gives_the_same_bytes(
    pool: ScriptedPool, prompts: StageOutput, tmp_path: Path, benchmark: str
) -> None:
    config = CONFIG.model_copy(update={"images_per_unit": 2})
    uninterrupted = run(tmp_path / "a", prompts, benchmark, config)
    num_batches, answered = pool.num_batches, []

    def killed_at_the_third(request: VisionRequest) -> VisionAnswer:
        if len({r.image_bytes for r in answered} | {request.image_bytes}) > 2:
            raise KeyboardInterrupt
        answered.append(request)
        return plausible_answer(request)

    pool._answer = killed_at_the_third
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", prompts, benchmark, config)
    pool.num_batches, pool._answer = 0, plausible_answer
    resumed = run(tmp_path / "b", prompts, benchmark, config)
    assert pool.num_batches == num_batches - 1
    assert resumed.data_version == uninterrupted.data_version


def test_batches_answered_out_of_order_give_the_same_bytes(
    pool: ScriptedPool, prompts: StageOutput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = run(tmp_path / "a", prompts, "geneval")
    real = pool.answer
    monkeypatch.setattr(pool, "answer", lambda batches: iter(list(real(batches))[::-1]))
    assert run(tmp_path / "b", prompts, "geneval").data_version == in_order.data_version


def test_the_endpoints_address_does_not_change_the_scores(
    pool: ScriptedPool, prompts: StageOutput, tmp_path: Path
) -> None:
    once = run(tmp_path / "a", prompts, "genai_bench")
    elsewhere = JUDGE.model_copy(update={"base_url": "http://10.0.0.1/v1"})
    again = run(tmp_path / "b", prompts, "genai_bench", CONFIG.model_copy(update={"judge": elsewhere}))
    assert once.data_version == again.data_version


def test_samples_of_another_partition_are_rejected(pool: ScriptedPool, prompts: StageOutput, tmp_path: Path) -> None:
    samples = write_samples(tmp_path, "static", "geneval", prompts)
    with pytest.raises(ThroughlineError, match="got samples of static"):
        STAGE.run(CONFIG, {"samples": [samples], "prompt_sets": [prompts]}, tmp_path, "joint|geneval")


def test_the_answer_table_holds_raw_and_parsed_answers(
    pool: ScriptedPool, prompts: StageOutput, tmp_path: Path
) -> None:
    pool._answer = lambda request: dataclasses.replace(plausible_answer(request), text="Hm")
    output = run(tmp_path, prompts, "genai_bench")
    answers = rows(output, "answers.parquet")
    assert {row["raw_answer"] for row in answers} == {"Hm"}
    assert {row["parsed"] for row in answers} == {"other"}
    assert output.manifest.summary["num_answers_off_format"] == 7
