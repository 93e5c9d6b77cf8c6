"""Results: the tables' numbers recomputed by hand, one judge per table, reproducible bytes."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from evaluation.analysis.fusion_analysis import STAGE as FUSION_ANALYSIS
from evaluation.analysis.results import PAPER_LABEL, STAGE
from evaluation.analysis.tables import GENEVAL_TASKS, TABLE_2, ScoreRow, table
from evaluation.config import BENCHMARKS, FusionAnalysisConfig, ResultsConfig, ScoresConfig
from evaluation.judging.scores import STAGE as SCORES
from pipelines.core.config import ModelRef
from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from tests.evaluation.worlds import JUDGE, ScriptedPool, plausible_answer, use_judge, write_samples
from training.config import Strategy

CONFIG = ResultsConfig(num_resamples=500)
ARMS = ("penultimate", "joint")


def write_scores(root: Path, prompts: StageOutput, arms: tuple[str, ...] = ARMS) -> list[StageOutput]:
    outputs = []
    for arm in arms:
        for benchmark in BENCHMARKS:
            samples = write_samples(root, arm, benchmark, prompts, per_prompt=2 if benchmark == "geneval" else 1)
            given = {"samples": [samples], "prompt_sets": [prompts]}
            outputs.append(SCORES.run(ScoresConfig(judge=JUDGE), given, root, f"{arm}|{benchmark}"))
    return outputs


@pytest.fixture(scope="module")
def scores(prompts: StageOutput, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[StageOutput]]:
    with use_judge(ScriptedPool(plausible_answer)):
        yield write_scores(tmp_path_factory.mktemp("scores"), prompts)


def read(output: StageOutput) -> dict[str, object]:
    return json.loads(output.path("results.json").read_bytes())


def test_tables_hold_the_plain_means(scores: list[StageOutput], tmp_path: Path) -> None:
    results = read(STAGE.run(CONFIG, {"scores": scores}, tmp_path))
    rows = [
        row | {"arm": (output.manifest.partition or "").split("|")[0]}
        for output in scores
        for row in pq.read_table(output.path("scores.parquet")).to_pylist()
    ]
    for index, arm in enumerate(ARMS):
        tasks: dict[str, list[float]] = {}
        for row in rows:
            if row["arm"] == arm and row["metric"] == "geneval_vqa":
                tasks.setdefault(row["skills"][0], []).append(row["value"])
        cells = results["table_1"][index]
        assert cells["geneval"]["value"] == pytest.approx(100 * np.mean([np.mean(v) for v in tasks.values()]), abs=1e-5)
        tagged = [r["value"] for r in rows if r["arm"] == arm and r["metric"] == "vqascore" and r["skills"]]
        assert len(tagged) == 6  # one of the seven prompts has no skill
        assert cells["genai"]["value"] == pytest.approx(100 * np.mean(tagged), abs=1e-5)
        basic = [r["value"] for r in rows if r["arm"] == arm and r["metric"] == "vqascore" and "basic" in r["skills"]]
        assert results["table_2"][index]["basic"]["value"] == pytest.approx(100 * np.mean(basic), abs=1e-5)
        assert results["table_2"][index]["part relation"] is None


def test_the_first_arm_is_the_baseline_and_has_no_difference(scores: list[StageOutput], tmp_path: Path) -> None:
    results = read(STAGE.run(CONFIG, {"scores": scores}, tmp_path))
    base, other = results["table_1"]
    assert base["arm"] == "penultimate" and base["genai"]["difference"] is None
    difference = other["genai"]["difference"]
    assert difference["value"] == pytest.approx(other["genai"]["value"] - base["genai"]["value"], abs=1e-5)
    assert difference["low"] <= difference["value"] <= difference["high"]


def test_tables_name_the_judge_and_the_number_of_prompts(scores: list[StageOutput], tmp_path: Path) -> None:
    output = STAGE.run(CONFIG, {"scores": scores}, tmp_path)
    for name, prefixes in (("table1.csv", ("geneval_", "genai_", "unified_")), ("table2.csv", ("",))):
        with output.path(name).open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        for prefix in prefixes:
            assert {row[f"{prefix}judge"] for row in rows} == {"test/judge"}
            assert {row[f"{prefix}judge_revision"] for row in rows} == {JUDGE.model.revision}
    with output.path("table1.csv").open(newline="") as stream:
        first = next(csv.DictReader(stream))
    assert (first["geneval_num_prompts"], first["geneval_num_images"]) == ("6", "12")
    assert first[f"geneval ({PAPER_LABEL})"] == "64.54"


def test_the_order_of_scores_does_not_change_the_bytes(
    scores: list[StageOutput], checkpoints: dict[Strategy, StageOutput], tmp_path: Path
) -> None:
    once = STAGE.run(CONFIG, {"scores": scores, "checkpoint": [checkpoints[Strategy.JOINT]]}, tmp_path / "a")
    again = STAGE.run(CONFIG, {"scores": scores, "checkpoint": [checkpoints[Strategy.JOINT]]}, tmp_path / "b")
    assert once.data_version == again.data_version
    reversed_order = STAGE.run(CONFIG, {"scores": scores[::-1]}, tmp_path / "c")
    original_order = STAGE.run(CONFIG, {"scores": scores}, tmp_path / "d")
    assert reversed_order.path("results.json").read_bytes() == original_order.path("results.json").read_bytes()


def test_scores_of_two_judges_are_rejected(scores: list[StageOutput], prompts: StageOutput, tmp_path: Path) -> None:
    samples = write_samples(tmp_path, "joint", "geneval", prompts)
    other = ScoresConfig(judge=JUDGE.model_copy(update={"model": ModelRef(id="other/judge", revision="1")}))
    foreign = SCORES.run(other, {"samples": [samples], "prompt_sets": [prompts]}, tmp_path, "joint|geneval")
    with pytest.raises(ThroughlineError, match=r"different judges.*other/judge"):
        STAGE.run(CONFIG, {"scores": [*scores[:3], foreign]}, tmp_path)


def test_a_benchmark_may_have_its_own_judge(
    scores: list[StageOutput], prompts: StageOutput, pool: ScriptedPool, tmp_path: Path
) -> None:
    rater = ScoresConfig(judge=JUDGE.model_copy(update={"model": ModelRef(id="other/rater", revision="1")}))
    chosen = [item for item in scores if not (item.manifest.partition or "").endswith("drawbench")]
    for arm in ("penultimate", "joint"):
        given = {"samples": [write_samples(tmp_path, arm, "drawbench", prompts)], "prompt_sets": [prompts]}
        chosen.append(SCORES.run(rater, given, tmp_path, f"{arm}|drawbench"))
    results = read(STAGE.run(CONFIG, {"scores": chosen}, tmp_path))
    judges = {benchmark: judge["id"] for benchmark, judge in results["judges"].items()}
    assert judges == {"geneval": "test/judge", "genai_bench": "test/judge", "drawbench": "other/rater"}


def test_without_scores_the_next_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(ThroughlineError, match="run samples and scores first"):
        STAGE.run(CONFIG, {}, tmp_path)


def test_unreadable_answers_are_counted_per_arm_and_benchmark(scores: list[StageOutput], tmp_path: Path) -> None:
    results = read(STAGE.run(CONFIG, {"scores": scores}, tmp_path))
    counted = {(row["arm"], row["benchmark"]): row for row in results["unscored"]}
    assert len(counted) == 6
    for output in scores:
        arm, benchmark = (output.manifest.partition or "").split("|")
        conservation = output.manifest.conservation
        assert conservation is not None
        assert counted[arm, benchmark]["num_scores_wanted"] == conservation.rows_in
        assert counted[arm, benchmark]["unscored"] == conservation.dropped


def test_an_arm_without_scores_has_an_empty_cell() -> None:
    rows = [ScoreRow("a", "genai_bench", f"p{n}", "vqascore", 0.5, ("scene",)) for n in range(5)]
    settings = {"baseline": "a", "num_resamples": 100, "confidence": 0.95, "seed": 0}
    found = table(rows, TABLE_2, ("a", "b"), **settings)
    assert found[0]["scene"]["value"] == 50.0
    assert found[1]["scene"] is None
    assert table(rows, GENEVAL_TASKS, ("a", "b"), **settings)[0]["counting"] is None


def test_fusion_weights_equal_those_of_the_checkpoint(checkpoints: dict[Strategy, StageOutput], tmp_path: Path) -> None:
    import torch

    from training.models.saved_model import load_model

    for strategy in Strategy:
        output = FUSION_ANALYSIS.run(
            FusionAnalysisConfig(num_times=5), {"checkpoint": [checkpoints[strategy]]}, tmp_path, strategy.value
        )
        rows = pq.read_table(output.path("weights.parquet"))
        weights = np.array(rows["weight"]).reshape(3, 5, 4)
        assert weights.sum(-1) == pytest.approx(1.0, abs=1e-5)
        summary = output.manifest.summary
        if strategy is Strategy.FUSE_DIT:
            assert weights.argmax(-1)[:, 0].tolist() == [1, 2, 3]
            assert summary["kind"] == "shared_layers"
            continue
        fusion = load_model(checkpoints[strategy]).model.fusion  # type: ignore[union-attr]
        expected = fusion.all_weights(torch.linspace(0, 1, 5)).expand(3, -1, -1).detach().numpy()
        np.testing.assert_allclose(weights, expected, atol=1e-6)
        assert summary["varies_with_time"] == strategy.has_time_gate
        assert summary["varies_with_block"] == (strategy in (Strategy.DEPTH_WISE, Strategy.JOINT))


def test_weights_svg_is_reproducible_and_supports_dark_mode(
    checkpoints: dict[Strategy, StageOutput], tmp_path: Path
) -> None:
    given = {"checkpoint": [checkpoints[Strategy.JOINT]]}
    once, again = (FUSION_ANALYSIS.run(FusionAnalysisConfig(), given, tmp_path / name, "joint") for name in "ab")
    assert once.data_version == again.data_version
    svg = once.path("weights.svg").read_text()
    assert "prefers-color-scheme:dark" in svg
    assert "nan" not in svg
