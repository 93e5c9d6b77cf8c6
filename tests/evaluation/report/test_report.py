"""The report: one file that opens offline, the same bytes from the same lineage, all texts escaped."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluation.analysis.fusion_analysis import STAGE as FUSION_ANALYSIS
from evaluation.analysis.results import STAGE as RESULTS
from evaluation.config import (
    BENCHMARKS,
    FusionAnalysisConfig,
    JudgeCalibrationConfig,
    ReportConfig,
    ResultsConfig,
    ScoresConfig,
)
from evaluation.judging.calibration import STAGE as JUDGE_CALIBRATION
from evaluation.judging.scores import STAGE as SCORES
from evaluation.report.data import funnel, sample_captions
from evaluation.report.lineage import collect, stages_of
from evaluation.report.report import STAGE, grouped, show
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, Conservation, InputRef, Manifest
from pipelines.runner.outputs import StageOutput
from pipelines.runner.units import StageResult, StageRun
from tests.evaluation.worlds import (
    JUDGE,
    ScriptedPool,
    StandInConfig,
    plausible_answer,
    run_stand_in,
    use_judge,
    write_checkpoint,
    write_data,
    write_prompt_sets,
    write_samples,
)
from training.config import Strategy

pytestmark = pytest.mark.slow

CONFIG = ReportConfig(profile="test", note="It shows <much>.\n\nIt can't show all.", num_captions=5)
ARMS = ("penultimate", "time_wise", "time_wise+shift", "fuse_dit")


class Page(HTMLParser):
    """Collects a page's references and text; asserts that its tags are balanced."""

    _VOID = ("meta", "img", "br", "col", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self._VOID:
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def build(root: Path) -> StageOutput:
    """Make a small lineage up to the results."""
    _, dataset = write_data(root)
    prompts = write_prompt_sets(root)
    strategies = (Strategy.PENULTIMATE, Strategy.TIME_WISE, Strategy.FUSE_DIT)
    checkpoints = {s: write_checkpoint(root, s, {"dataset": [dataset]}) for s in strategies}
    scores = []
    for arm in ARMS:
        for benchmark in BENCHMARKS:
            samples = write_samples(root, arm, benchmark, prompts, checkpoints[Strategy(arm.removesuffix("+shift"))])
            inputs = {"samples": [samples], "prompt_sets": [prompts]}
            scores.append(SCORES.run(ScoresConfig(judge=JUDGE), inputs, root, f"{arm}|{benchmark}"))
    analyses = [
        FUSION_ANALYSIS.run(FusionAnalysisConfig(), {"checkpoint": [item]}, root, strategy.value)
        for strategy, item in checkpoints.items()
    ]
    inputs = {"scores": scores, "checkpoint": list(checkpoints.values()), "fusion_analysis": analyses}
    return RESULTS.run(ResultsConfig(num_resamples=200), inputs, root)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StageOutput]:
    with use_judge(ScriptedPool(plausible_answer)):
        yield build(tmp_path_factory.mktemp("lineage"))


def test_the_report_needs_no_other_file(results: StageOutput, tmp_path: Path) -> None:
    report = STAGE.run(CONFIG, {"results": [results]}, tmp_path)
    html = report.path("report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert all(reference.startswith(("data:image/webp;base64,", "#")) for reference in page.references)
    outside = re.findall(r"https?://[^\s\"'<)]+", html)
    assert set(outside) <= {"http://www.w3.org/2000/svg"}
    assert "<script" not in html and "@import" not in html and "url(" not in html
    targets = set(re.findall(r'id="([^"]+)"', html))
    assert {reference[1:] for reference in page.references if reference.startswith("#")} <= targets


def test_two_machines_write_the_same_bytes(results: StageOutput, tmp_path: Path) -> None:
    here = STAGE.run(CONFIG, {"results": [results]}, tmp_path)
    elsewhere = tmp_path / "another" / "root"
    there = STAGE.run(CONFIG, {"results": [build(elsewhere)]}, elsewhere)
    assert here.data_version == there.data_version
    assert str(tmp_path) not in here.path("report.html").read_text()


def test_texts_from_the_web_are_escaped(results: StageOutput, tmp_path: Path) -> None:
    html = STAGE.run(CONFIG, {"results": [results]}, tmp_path).path("report.html").read_text()
    assert "<b>& friends</b>" not in html
    assert "&lt;b&gt;&amp; friends&lt;/b&gt;" in html
    assert "It shows &lt;much&gt;." in html


def test_every_section_has_its_numbers(results: StageOutput, tmp_path: Path) -> None:
    page = Page(STAGE.run(CONFIG, {"results": [results]}, tmp_path).path("report.html").read_text())
    assert results.data_version in page.text
    expected = (
        "profile test", "low similarity", "opt out", "caption truncated", "duplicate key", "test/judge", "test/encoder",
        "paper, other judge: do not compare absolutes", "time-wise + shift", "Same prompt and same starting noise",
        "Which layers are listened to", "not a number", "evaluation_metadata.jsonl",
    )  # fmt: skip
    for text in expected:
        assert text in page.text, text
    assert page.text.count("a drawn scene number") == 5
    for stage in collect([results]):
        assert stage in page.text


def test_each_grid_shows_the_same_prompts_for_every_arm(results: StageOutput, tmp_path: Path) -> None:
    html = STAGE.run(CONFIG, {"results": [results]}, tmp_path).path("report.html").read_text()
    images = re.findall(r'<img src="data:[^"]+" alt="([^:"]+): ([^"]+)"', html)
    by_arm: dict[str, list[str]] = {}
    for arm, prompt in images:
        by_arm.setdefault(arm, []).append(prompt)
    assert len(by_arm) == len(ARMS)
    assert len({tuple(prompts) for prompts in by_arm.values()}) == 1


def test_withdrawn_images_are_not_shown(results: StageOutput, tmp_path: Path) -> None:
    lineage = collect([results])
    before = [item.sample_key for item in sample_captions(lineage, 6, 32)]

    def withdraw(run: StageRun[StandInConfig]) -> StageResult:
        with run.unit("00000") as unit:
            unit.drop(before[0], "withdrawn")
            unit.drop(before[1], "duplicate_key")
            unit.account(rows_in=2, rows_out=0)
        return StageResult()

    dataset = run_stand_in(tmp_path, "dataset", withdraw)
    after = [item.sample_key for item in sample_captions({**lineage, "dataset": [dataset]}, 6, 32)]
    assert len(before) == len(after) == 6
    assert before[0] not in after
    everything = {item.sample_key for item in sample_captions({**lineage, "dataset": [dataset]}, 100, 32)}
    assert before[0] not in everything and before[1] in everything


def test_judge_calibration_is_shown_if_it_is_an_input(results: StageOutput, tmp_path: Path) -> None:
    lineage = collect([results])
    inputs = {"images": lineage["images"], "captions": lineage["captions"]}
    root = results.folder.parent.parent
    calibration = JUDGE_CALIBRATION.run(JudgeCalibrationConfig(judge=JUDGE, num_images=9), inputs, root)
    report = STAGE.run(CONFIG, {"results": [results], "judge_calibration": [calibration]}, tmp_path)
    assert "area under the ROC curve" in report.path("report.html").read_text()


def _gate_times(results: StageOutput) -> StageOutput:
    """Write a stand-in for trajectory_analysis of the checkpoint with a time gate."""
    names = {"forward": 0.0412, "cfg_1": 0.05, "cfg_6": 0.1234}
    steps = [
        {
            "t": t,
            **{
                name: {"mean": t + gap, "mean_difference": gap, "mean_absolute_difference": gap, "std": 0.0}
                for name, gap in names.items()
            },
        }
        for t in (0.0, 0.3, 0.7)
    ]
    comparison = {"num_samples": 7, "num_steps": 3, "mean_absolute_difference": names, "steps": steps}

    def produce(run: StageRun[StandInConfig]) -> StageResult:
        with run.unit("times") as unit:
            unit.write("times.json", json.dumps(comparison).encode())
        return StageResult()

    (checkpoint,) = (item for item in collect([results])["checkpoint"] if item.manifest.partition == "time_wise")
    root = results.folder.parent.parent
    return run_stand_in(root, "trajectory_analysis", produce, {"checkpoint": [checkpoint]}, "time_wise")


def test_gate_times_are_shown_if_they_are_an_input(results: StageOutput, tmp_path: Path) -> None:
    without = STAGE.run(CONFIG, {"results": [results]}, tmp_path).path("report.html").read_text()
    assert "Which time the gates see" not in Page(without).text and "#times" not in without
    inputs = {"results": [results], "trajectory_analysis": [_gate_times(results)]}
    html = STAGE.run(CONFIG, inputs, tmp_path).path("report.html").read_text()
    page = Page(html)
    assert page.open == [] and "#times" in page.references and 'id="times"' in html
    for text in ("On 7 held-out samples", "held out, noised", "0.041", "guidance 6", "0.123", "over 3 sampling steps"):
        assert text in page.text, text
    assert "time_wise: mean time read off the latents" in page.text
    assert html.count("trajectory_analysis") == 1, "a row of the provenance"


def test_a_missing_upstream_output_is_named(results: StageOutput, tmp_path: Path) -> None:
    shutil.copytree(results.folder.parent.parent, tmp_path / "copy")
    copied = StageOutput.load(tmp_path / "copy" / "results" / results.data_version / MANIFEST_NAME)
    lost = collect([copied])["captions"][0]
    lost.manifest_path.unlink()
    with pytest.raises(ThroughlineError, match=f"captions {lost.data_version}, which is lost"):
        STAGE.run(CONFIG, {"results": [copied]}, tmp_path)


def test_a_report_above_its_maximum_size_is_rejected(results: StageOutput, tmp_path: Path) -> None:
    with pytest.raises(ThroughlineError, match="lower thumbnail_px"):
        STAGE.run(CONFIG.model_copy(update={"max_num_bytes": 100_000}), {"results": [results]}, tmp_path)


@pytest.mark.parametrize(
    ("value", "digits", "signed", "shown"),
    [
        (1.25, 1, False, "1.2"), (-0.04, 1, False, "0.0"), (-0.04, 1, True, "±0.0"), (0.04, 1, True, "±0.0"),
        (-3.456, 2, True, "−3.46"), (3.456, 2, True, "+3.46"), (None, 1, False, "–"),
    ],
)  # fmt: skip
def test_numbers_have_typographic_signs(value: float | None, digits: int, signed: bool, shown: str) -> None:
    assert show(value, digits, signed=signed) == shown


def test_counts_are_grouped_with_thin_spaces() -> None:
    assert grouped(1234567) == "1\u202f234\u202f567"
    assert grouped(None) == "–"


def test_an_output_that_another_took_the_place_of_counts_no_rows(tmp_path: Path) -> None:
    def output(rows_out: int, **inputs: tuple[InputRef, ...]) -> StageOutput:
        conservation = Conservation(rows_in=10, rows_out=rows_out, dropped={"http_server_error": 10 - rows_out})
        manifest = Manifest(
            stage="images", partition="00000", code_version="1", fingerprint="", config={}, inputs=inputs,
            conservation=conservation,
        )  # fmt: skip
        return StageOutput(tmp_path, manifest.sealed())

    first = output(6)
    second = output(9, earlier=(first.ref,))
    lineage = {"images": [first, second]}
    (step,) = funnel(lineage, stages_of(lineage))
    assert (step.rows_in, step.rows_out, list(step.dropped)) == (10, 9, [("http_server_error", 1)])
