"""The arithmetic of an estimate, against numbers computed by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from orchestration.cost.assumptions import Assumptions, parse_assumptions, reasons
from orchestration.cost.estimate import estimate, estimate_json, estimated_stages
from orchestration.cost.inputs import Measured, ProfileInputs
from orchestration.cost.table import bytes_text, count_text, estimate_lines, time_text
from orchestration.cost.types import RunEstimate
from orchestration.graph.graph import Graph
from orchestration.graph.nodes import GRAPH
from orchestration.profiles.loading import load_profile
from pipelines.core.errors import ThroughlineError
from pipelines.core.quantity import Basis, Source
from pipelines.runner.cost import Facts, StageEstimate
from tests.orchestration.cost import toy_stage
from training.config import Strategy
from training.cost.step_cost import training_flops

ROOT = Path(__file__).resolve().parents[3]
PARAMETERS = {"penultimate": 2_246_693_952, "fuse_dit": 1_711_646_784}
PROMPTS = {"geneval": 553, "genai_bench": 1600, "drawbench": 200}
ROUND = (
    "rows=1000", "part_rows=100", "metadata_row_bytes=100", "pass_rules=0.5", "subset_row_bytes=40",
    "filter_rows_per_second=50", "dead_link_share=0.4", "fetched_share=0.5", "retry_share=0.5", "request_seconds=2",
    "mean_image_bytes=1e6", "network_mbit=8", "decode_images_per_second=1", "image_row_bytes=1000", "row_bytes=10",
    "captioned_share=0.8", "shard_share=0.5", "shard_sample_bytes=3000", "shard_samples_per_second=20",
    "text_tokens=100", "vlm_tokens_per_second=50", "caption_tokens=200", "chars_per_token=5", "gpu_flops=1e15",
    "mfu=0.5", "vae_mfu=0.5", "vae_encode_flops_per_px=1e6", "png_bytes_per_px=2", "questions_per_image=2",
)  # fmt: skip


def inputs_of(
    home: Path, *words: str, profile: str = "paper", changes: tuple[str, ...] = (), measured: dict | None = None
) -> ProfileInputs:
    assumptions, chosen = parse_assumptions(words)
    facts = Facts(parameters=PARAMETERS, prompts=PROMPTS)
    return ProfileInputs(load_profile(profile, home, changes), assumptions, chosen, measured or {}, facts)


@pytest.fixture
def by_hand(tmp_path: Path) -> dict[str, StageEstimate]:
    """1,000 rows in 10 parts: 500 pass the filters, 250 are downloaded, 200 captioned, 100 written to shards."""
    return {stage.name: stage for stage in estimate(inputs_of(tmp_path, *ROUND)).stages}


def test_rows_flow_from_stage_to_stage(by_hand: dict[str, StageEstimate]) -> None:
    flow = [(stage.rows_in.value, stage.rows_out.value) for stage in list(by_hand.values())[:5]]
    assert flow == [(1000, 500), (500, 250), (250, 200), (200, 100), (100, 100)]


def test_data_stages_by_hand(by_hand: dict[str, StageEstimate]) -> None:
    subset, images, captions = by_hand["laion_subset"], by_hand["images"], by_hand["captions"]
    assert (subset.seconds.value, subset.bytes_in.value, subset.bytes_out.value) == (20, 100_000, 20_000)
    # 500 * 0.6 images of 1 MB at 1 MB/s take 300 s; 750 requests of 2 s over 1,024 connections take far less.
    assert images.requests.value == 750
    assert (images.seconds.value, images.limit) == (pytest.approx(300), "network")
    assert images.bytes_out.value == 250 * 1000 + 500 * 10
    # 250 captions of 200 tokens, 50 a second on each of 32 x 2 GPUs of eight to a machine.
    assert (captions.gpus.value, captions.nodes.value) == (64, 8)
    assert captions.seconds.value == pytest.approx(250 * 200 / 50 / 64)
    assert captions.bytes_out.value == 200 * (200 * 5 + 10)
    assert (by_hand["shards"].seconds.value, by_hand["shards"].bytes_out.value) == (10, 300_000)


def test_latents_by_hand(by_hand: dict[str, StageEstimate]) -> None:
    latents = by_hand["latents"]
    assert latents.bytes_out.value == 100 * (2 * 16 * 32 * 32 * 2 + 16)
    assert latents.seconds.value == pytest.approx(100 * 256 * 256 * 1e6 / (1e15 * 0.5))
    assert latents.gpus.value == 1  # all parts in one run, one run at a time


def test_local_autoencoder_cost_scales_with_its_parameters(tmp_path: Path) -> None:
    words = ("vae_encode_flops_per_px=1e6", "cpu_flops=1e9", "pass_rules=1", "fetched_share=1", "captioned_share=1")
    inputs = inputs_of(tmp_path, *words, "shard_share=1", profile="demo")
    local = replace(inputs, facts=Facts(local_parameters={"throughline/demo-vae": 838_000}))
    full, small = (
        next(stage.seconds.value for stage in estimate(each).stages if stage.stage == "latents")
        for each in (inputs, local)
    )
    assert (full, small) == (pytest.approx(840 * 256 * 256 * 1e6 / 1e9), pytest.approx(full / 100))


def test_text_features_by_hand(tmp_path: Path) -> None:
    result = estimate(inputs_of(tmp_path, *ROUND))
    one = 100 * (36 * 2560 * 2 + 4) + 16
    assert result.text.sample_bytes.value == one
    assert (result.text.is_stored, result.text.stored_bytes.value) == (False, 100 * one)
    stored = 'text_features={"text_encoder": {"id": "Qwen/Qwen3-VL-4B-Instruct", "revision": '
    stored += '"ebb281ec70b05090aa6165b016eac8ec08e71b17"}, "layers": [1, 36]}'
    result = estimate(inputs_of(tmp_path, *ROUND, changes=(stored,)))
    stage = next(stage for stage in result.stages if stage.stage == "text_features")
    assert stage.bytes_out.value == 100 * (100 * (2 * 2560 * 2 + 4) + 16)
    assert result.text.is_stored and result.text.encode_seconds.value == 0


def test_training_by_hand(by_hand: dict[str, StageEstimate], tmp_path: Path) -> None:
    stage = by_hand["checkpoint penultimate"]
    model = load_profile("paper", tmp_path).model
    flops = 500_000 * training_flops(model, Strategy.PENULTIMATE).total(512, 512 * 100)
    encoding = 500_000 * 512 * 100 * 2 * 36 * (2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728)
    assert stage.seconds.value == pytest.approx((flops / 0.5 + encoding / 0.4) / (64 * 1e15))
    held_out = load_profile("paper", tmp_path).dataset.validation_share
    assert stage.rows_in.value == pytest.approx(100 * (1 - held_out))  # stages without a cost model pass rows on
    assert stage.rows_out.value == 500_000 * 512
    assert stage.bytes_out.value == 4 * PARAMETERS["penultimate"]
    # Weights, average and two moments; two snapshots kept, and the one being written.
    assert stage.scratch_bytes.value == 3 * 4 * 4 * PARAMETERS["penultimate"]


def test_evaluation_by_hand(by_hand: dict[str, StageEstimate]) -> None:
    images = 8 * (553 * 4 + 1600 + 200)
    assert by_hand["samples"].rows_in.value == pytest.approx(8 * (553 + 1600 + 200))
    assert by_hand["samples"].rows_out.value == images
    assert by_hand["samples"].bytes_out.value == images * 256 * 256 * 2
    assert by_hand["scores"].requests.value == 8 * (2 * 553 * 4 + 1600 + 200)


def test_filtering_assigns_whole_parts_to_machines(tmp_path: Path) -> None:
    words = ("filter_base_bytes=1e9", "filter_bytes_per_row=1e6", "cores_per_node=4", "selection_rows_per_second=100")
    one, two, *_ = estimate(inputs_of(tmp_path, *ROUND, *words)).filtering
    # Ten parts of 100 rows at 50 rows a second: three waves of 2 s on four cores, two waves on eight. Dedup of 500 kept
    # rows: 5 s.
    assert (one.processes.value, one.seconds.value, one.memory_bytes.value) == (4, 11, 4 * 1.1e9)
    assert (two.processes.value, two.seconds.value) == (4, 9)
    small = inputs_of(tmp_path, *ROUND, *words, changes=("needs.memory_gib=3",))
    assert estimate(small).filtering[0].processes.value == 2  # of 1.1 GB each in 3.2 GB


def test_notes_name_the_machines_beyond_which_filtering_gets_no_faster(tmp_path: Path) -> None:
    notes = [note for note in estimate(inputs_of(tmp_path)).notes if note.startswith("Filtering takes as long")]
    assert notes == [
        "Filtering takes as long on 16 machines as on 1, where every file already has a process of its own; dedup "
        "across files is one process (4.35 min)."
    ]
    many = estimate(inputs_of(tmp_path, "part_rows=1e5")).notes
    assert not any(note.startswith("Filtering takes as long") for note in many)


def test_docs_explain_every_asset_without_a_cost_model() -> None:
    text = (ROOT / "docs" / "estimate.md").read_text()
    left_out = text[text.index("## What is left out") : text.index("## The published scale")]
    estimated = estimated_stages()
    for name in GRAPH.nodes:
        assert name in estimated or f"`{name}`" in left_out, name


def test_a_stage_brings_its_own_cost_model(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, *ROUND)
    graph = Graph((*GRAPH.nodes.values(), toy_stage.NODE))
    before, after = estimate(inputs), estimate(inputs, graph=graph)
    assert estimated_stages(graph) == [*estimated_stages(), "thumbnails"]
    assert after.stages[:-1] == before.stages
    toy = after.stages[-1]
    # 100 samples reach it; one run takes all ten parts at once.
    assert (toy.rows_in.value, toy.rows_out.value, toy.bytes_out.value, toy.seconds.value) == (100, 100, 1000, 25)
    assert toy.seconds.sources > toy.rows_in.sources
    assert after.totals()["seconds"].value == pytest.approx(before.totals()["seconds"].value + 25)
    assert any(line.startswith("  thumbnails") for line in estimate_lines(after, inputs))
    assert [stage.stage for stage in estimate(inputs, ["thumbnails"], graph).stages] == ["thumbnails"]


def test_concurrent_runs_follow_partitions_and_batches(tmp_path: Path) -> None:
    graph = Graph((*GRAPH.nodes.values(), toy_stage.NODE))
    for batch, num_runs in ((1, 8), (3, 4), (10, 1)):
        changes = (f"batches.thumbnails={batch}",)
        toy = estimate(inputs_of(tmp_path, *ROUND, "parallel_runs=8", changes=changes), graph=graph).stages[-1]
        assert (toy.nodes.value, toy.seconds.value) == (num_runs, 25 / num_runs)
        assert Source(Basis.PROFILE, "batches.thumbnails") in toy.seconds.sources


@pytest.fixture
def paper(tmp_path: Path) -> RunEstimate:
    return estimate(inputs_of(tmp_path))


def test_totals_are_the_sums(paper: RunEstimate) -> None:
    sums = paper.totals()
    for name in ("seconds", "requests", "bytes_out", "gpu_seconds"):
        assert sums[name].value == pytest.approx(sum(getattr(stage, name).value for stage in paper.stages))
    assert sums["gpu_seconds"].value == pytest.approx(
        sum(stage.seconds.value * stage.gpus.value for stage in paper.stages)
    )
    assert paper.unknown() == []


def test_twice_the_rows_cost_twice_the_data_and_the_same_training(paper: RunEstimate, tmp_path: Path) -> None:
    double = estimate(inputs_of(tmp_path, "rows=826_000_000"))
    for one, two in zip(paper.stages, double.stages, strict=True):
        grows = 1 if one.stage in ("checkpoint", "samples", "scores") else 2
        for name in ("rows_in", "rows_out", "bytes_in", "bytes_out", "requests", "seconds"):
            if (one.stage, name) == ("checkpoint", "rows_in"):
                continue  # distinct samples, at most those seen
            assert getattr(two, name).value == pytest.approx(grows * getattr(one, name).value), (one.name, name)
    assert double.epochs.value == pytest.approx(paper.epochs.value / 2)


def test_quantities_name_their_sources(paper: RunEstimate, tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in paper.stages}
    assert stages["checkpoint penultimate"].rows_out.basis is Basis.PROFILE
    assert Source(Basis.ASSUMED, "mfu") in stages["checkpoint penultimate"].seconds.sources
    assert Source(Basis.PROFILE, "training.steps") in stages["checkpoint penultimate"].seconds.sources
    rate = {"filter_rows_per_second": Measured(1000, "a run"), "rows": Measured(5000, "files")}
    subset, *_ = estimate(inputs_of(tmp_path, measured=rate)).stages
    assert (subset.rows_in.value, subset.seconds.value) == (5000, 5)
    assert subset.rows_in.basis is Basis.MEASURED
    chosen, *_ = estimate(inputs_of(tmp_path, "filter_rows_per_second=500", measured=rate)).stages
    assert chosen.seconds.value == 10  # the user's assumption overrides the measurement


def test_selectivity_covers_the_rules_of_the_profile(tmp_path: Path) -> None:
    off = tuple(f"laion_subset.{name}=null" for name in ("min_side_px", "nsfw_allowed", "max_aspect"))
    words = ("pass_text=0.5", "pass_unique=0.5", "pass_other=0.25")
    subset, *_ = estimate(inputs_of(tmp_path, *words, changes=off)).stages
    assert subset.rows_out.value == pytest.approx(413_000_000 / 4)
    where = inputs_of(tmp_path, *words, changes=(*off, "laion_subset.where=width > 5"))
    assert estimate(where).stages[0].rows_out.value == pytest.approx(413_000_000 / 16)
    unset = estimate(inputs_of(tmp_path, changes=("laion_subset.where=width > 5",)))
    assert any("The selectivity of the filters where is unknown" in note for note in unset.notes)


def test_notes_state_the_cost_of_encoding_text(paper: RunEstimate) -> None:
    assert paper.notes[0].startswith("Training encodes the captions of every batch, ")
    assert paper.text.stored_bytes.value > 1e15
    assert paper.text.stored_bytes.value > 100 * sum(
        stage.bytes_out.value for stage in paper.stages if stage.stage in ("images", "shards", "latents")
    )


def test_unknown_times_are_listed_and_excluded_from_totals(tmp_path: Path) -> None:
    changes = ("captions.captioner.model.id=someone/captioner",)
    result = estimate(inputs_of(tmp_path, changes=changes))
    assert result.unknown() == ["captions"]
    assert not math.isnan(result.totals()["seconds"].value)
    lines = estimate_lines(result, inputs_of(tmp_path, changes=changes))
    row = next(line for line in lines if line.startswith("  captions"))
    assert "?" in row and "nan" not in "\n".join(lines)
    known = estimate(inputs_of(tmp_path, "captioner_params=7e9", changes=changes))
    assert known.unknown() == []


def test_active_parameters_are_parsed_from_model_names(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path)
    sizes = {
        role: inputs.active_parameters(model).value
        for role, model in inputs.profile.models().items()
        if role in ("captions.captioner.model", "scores.judge.model", "drawbench_scores.judge.model")
    }
    assert sizes == {
        "captions.captioner.model": 32e9, "scores.judge.model": 22e9, "drawbench_scores.judge.model": 8e9,
    }  # fmt: skip


@pytest.mark.parametrize("profile", ["demo", "single_gpu", "paper"])
def test_json_is_complete(tmp_path: Path, profile: str) -> None:
    inputs = inputs_of(tmp_path, "mfu=0.4", profile=profile)
    result = estimate_json(estimate(inputs), inputs)
    assert [stage["stage"] for stage in result["stages"] if stage["stage"] != "checkpoint"] == [
        name for name in estimated_stages() if name != "checkpoint"
    ]
    assert [stage["partition"] for stage in result["stages"] if stage["stage"] == "checkpoint"] == [
        "penultimate", "fuse_dit",
    ]  # fmt: skip
    figures = {"rows_in", "rows_out", "bytes_in", "bytes_out", "requests", "seconds", "nodes", "gpus", "gpu_seconds"}
    for stage in result["stages"]:
        for name in figures:
            assert set(stage[name]) == {"value", "basis", "inputs"}, (stage["name"], name)
    assert set(result["assumptions"]) == set(Assumptions.model_fields)
    assert result["assumptions"]["mfu"] == {"value": 0.4, "set": True, "reason": reasons()["mfu"]}
    assert set(result["totals"]) == {"seconds", "gpu_seconds", "requests", "bytes_out", "scratch_bytes"}


def test_every_assumption_has_its_reason() -> None:
    assert [name for name, reason in reasons().items() if len(reason.split()) < 5] == []


def test_unknown_assumption_is_rejected_with_the_list() -> None:
    with pytest.raises(ThroughlineError, match=r"no assumption 'mufu'; there are rows, part_rows, .*mfu"):
        parse_assumptions(["mufu=0.4"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mfu=4", "--assume mfu=4: input should be less than or equal to 1"),
        ("mfu=fast", "--assume mfu=fast: input should be a valid number, unable to parse string as a number"),
        ("mfu", "--assume mfu: expected NAME=VALUE, such as mfu=0.4"),
        ("rows=0.5", "--assume rows=0.5: input should be a valid integer, got a number with a fractional part"),
        ("gpu=abacus", "no peak is known for gpu 'abacus'; there are B200, "),
        ("network_mbit=inf", "--assume network_mbit=inf: input should be a finite number"),
    ],
)
def test_invalid_assumptions_are_rejected_in_one_sentence(word: str, message: str) -> None:
    with pytest.raises(ThroughlineError) as caught:
        parse_assumptions([word])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_numbers_are_formatted_with_readable_units() -> None:
    assert [count_text(value) for value in (0, 553, 9600, 12_345, 413e6, 3.2e9)] == [
        "0", "553", "9,600", "12.3 k", "413 M", "3.2 G",
    ]  # fmt: skip
    assert [bytes_text(value) for value in (12, 65_552, 999_900, 13.7e12, 2.94e15)] == [
        "12 B", "65.6 kB", "1 MB", "13.7 TB", "2.94 PB",
    ]  # fmt: skip
    assert [time_text(value) for value in (0, 0.041, 41, 720, 18_720, 293_760, 6.7e7)] == [
        "0 s", "0.041 s", "41 s", "12 min", "5.2 h", "3.4 days", "2.12 years",
    ]  # fmt: skip


def test_the_table_is_aligned(paper: RunEstimate, tmp_path: Path) -> None:
    lines = estimate_lines(paper, inputs_of(tmp_path))
    start = next(number for number, line in enumerate(lines) if line.startswith("  stage"))
    end = next(number for number, line in enumerate(lines) if line.startswith("  total"))
    heads, rows = lines[start], [line.ljust(140) for line in lines[start + 1 : end + 1] if not line.startswith("  -")]
    for name in ("rows out", "writes", "time"):
        column = heads.index(name) + len(name) - 1
        for row in rows:
            assert row[column] in "pma ", row
            assert row[column + 1 : column + 3].strip() == ""
    assert max(map(len, lines[:start])) < 120
