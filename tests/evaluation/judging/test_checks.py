"""Each check passes on a sound output, and fails with a message that gives the reason."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from evaluation.config import JudgeCalibrationConfig
from evaluation.judging.calibration import STAGE, area_under_roc, choose_pairs
from evaluation.judging.checks import check_judge_answer_format, check_judge_calibration, check_missing_scores
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import Conservation
from pipelines.core.model_prompts import NO, YES
from pipelines.laion.sources import scan_entry_list
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageResult
from recaption.engine import VisionAnswer, VisionRequest
from tests.evaluation.worlds import JUDGE, ScriptedPool, plausible_answer, run_stand_in, write_data
from training.config import Strategy
from training.loop.checks import check_loss, check_same_order


def stand_in(
    root: Path, summary: dict[str, Any], table: Conservation | None = None, name: str = "scores"
) -> StageOutput:
    return run_stand_in(
        root, name, lambda _: StageResult(summary=summary, conservation=table), partition=str(len(summary))
    )


def test_missing_scores_are_counted_by_reason(tmp_path: Path) -> None:
    table = Conservation(rows_in=100, rows_out=94, dropped={"missing": 4, "cut": 2})
    scores = stand_in(tmp_path, {}, table)
    assert check_missing_scores(scores, 0.06).passed
    result = check_missing_scores(scores)
    assert not result.passed
    assert result.message == "6 of 100 scores are missing (4 missing, 2 cut)"


def test_no_requested_scores_is_a_failure(tmp_path: Path) -> None:
    assert not check_missing_scores(stand_in(tmp_path, {}, Conservation(rows_in=0, rows_out=0))).passed


def test_answers_off_format_fail_the_check(tmp_path: Path) -> None:
    assert check_judge_answer_format(stand_in(tmp_path, {"num_answers": 100, "num_answers_off_format": 5})).passed
    result = check_judge_answer_format(stand_in(tmp_path / "b", {"num_answers": 100, "num_answers_off_format": 6}))
    assert not result.passed


def test_losses_must_exist_and_fall(tmp_path: Path, checkpoints: dict[Strategy, StageOutput]) -> None:
    assert check_loss(checkpoints[Strategy.JOINT]).passed
    rising = stand_in(tmp_path, {"first_loss": 1.0, "final_loss": 1.1}, name="checkpoint")
    assert not check_loss(rising).passed
    assert not check_loss(stand_in(tmp_path, {}, name="checkpoint")).passed


def test_same_order_is_proven_by_digest_and_dataset(tmp_path: Path, checkpoints: dict[Strategy, StageOutput]) -> None:
    result = check_same_order(list(checkpoints.values()))
    assert result.passed and result.numbers["num_checkpoints"] == 7
    other = stand_in(tmp_path, {"consumption_digest": "0" * 32}, name="checkpoint")
    assert not check_same_order([*checkpoints.values(), other]).passed
    assert not check_same_order([*checkpoints.values(), stand_in(tmp_path / "b", {}, name="checkpoint")]).passed
    assert not check_same_order([]).passed


def calibrate(root: Path, answer: Any, pool: ScriptedPool) -> StageOutput:
    world, _ = write_data(root)
    pool._answer = answer
    config = JudgeCalibrationConfig(judge=JUDGE, num_images=10, images_per_unit=4)
    return STAGE.run(config, {"images": world.images, "captions": world.captions}, root)


def test_a_judge_that_always_says_yes_fails_calibration(pool: ScriptedPool, tmp_path: Path) -> None:
    def yes(_: VisionRequest) -> VisionAnswer:
        logprobs = {YES: -0.01, NO: -4.0}
        return VisionAnswer(text=YES, finish_reason="stop", num_prompt_tokens=1, num_answer_tokens=1, logprobs=logprobs)

    output = calibrate(tmp_path, yes, pool)
    assert output.manifest.summary["accuracy"] == 0.5
    assert output.manifest.summary["auc"] == 0.5
    result = check_judge_calibration(output)
    assert not result.passed
    assert "100.0% of own captions and 0.0% of others'" in result.message


def test_withdrawn_images_are_not_shown_to_the_judge(pool: ScriptedPool, tmp_path: Path) -> None:
    world, _ = write_data(tmp_path)
    pool._answer = plausible_answer

    def keys(**config: Any) -> set[str]:
        config = {"judge": JUDGE, "num_images": 10, **config}
        inputs = {"images": world.images, "captions": world.captions}
        output = STAGE.run(JudgeCalibrationConfig.model_validate(config), inputs, tmp_path)
        return set(pq.read_table(output.path("calibration.parquet"))["sample_key"].to_pylist())

    before = keys()
    (tmp_path / "withdrawn.txt").write_text("\n".join(sorted(before)[:4]))
    after = keys(withdrawn=scan_entry_list(tmp_path / "withdrawn.txt"))
    assert len(before) == len(after) == 10
    assert before - after == set(sorted(before)[:4])


def test_a_judge_that_knows_the_captions_passes(pool: ScriptedPool, tmp_path: Path) -> None:
    own: dict[bytes, str] = {}

    def first_question_is_the_own_caption(request: VisionRequest) -> VisionAnswer:
        yes = own.setdefault(request.image_bytes, request.text) == request.text
        logprobs = {YES: -0.01, NO: -4.0} if yes else {YES: -5.0, NO: -0.01}
        return VisionAnswer(text="", finish_reason="stop", num_prompt_tokens=1, num_answer_tokens=1, logprobs=logprobs)

    output = calibrate(tmp_path, first_question_is_the_own_caption, pool)
    assert output.manifest.summary["auc"] == 1.0
    assert check_judge_calibration(output).passed


def test_unreadable_answers_fail_calibration(pool: ScriptedPool, tmp_path: Path) -> None:
    output = calibrate(tmp_path, lambda _: VisionAnswer.failed("no"), pool)
    table = output.manifest.conservation
    assert table is not None and table.dropped == {"answer_failed": 20}
    assert not check_judge_calibration(output).passed


def test_the_other_caption_is_never_the_same_text() -> None:
    captions = {f"{n:032x}": f"caption {n % 2}" for n in range(9)}
    assert all(captions[key] != captions[other] for key, other in choose_pairs(captions, 8))
    with pytest.raises(ThroughlineError, match="captions are the same"):
        choose_pairs(dict.fromkeys(captions, "same"), 8)


def test_area_under_roc_counts_pairs() -> None:
    assert area_under_roc([0.9, 0.5], [0.5, 0.1]) == 0.875
    assert area_under_roc([], [0.5]) is None
