"""`throughline estimate` from its arguments to its output, and the measurements it reads."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestration.cli.main import main
from orchestration.cost import calibration as estimate_calibration
from orchestration.cost.assumptions import Assumptions
from orchestration.cost.calibration import calibrate, load_calibration, save_calibration
from orchestration.cost.measurements import facts_of, measured_for
from orchestration.profiles.loading import load_profile
from orchestration.profiles.profile import Profile
from pipelines.core.config import identity_of
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import Conservation, Environment, FileEntry, Manifest
from pipelines.laion import index as laion_index
from pipelines.laion import subset as laion_subset
from pipelines.laion.sources import scan_index

ROOT = Path(__file__).resolve().parents[3]
NO_TRAINING = "laion_subset,images,captions,shards,latents,text_features,samples,scores"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THROUGHLINE_HOME", str(tmp_path / "home"))


def estimate(*words: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(["estimate", "--profile", "paper", *words])
    return caught.value.code


def test_rows_and_assumptions_reach_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("--stages", NO_TRAINING, "--rows", "1e6", "--assume", "pass_rules=0.5", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"]["value"] == 1_000_000
    assert result["stages"][0]["rows_out"] == {
        "value": 500_000, "basis": "assumed", "inputs": ["assumed: pass_rules", "assumed: rows"],
    }  # fmt: skip
    assert [stage["name"] for stage in result["stages"]] == NO_TRAINING.split(",")


def test_table_shows_units_and_sources_and_suggests_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("--stages", NO_TRAINING) == 0
    output = capsys.readouterr().out
    assert "413 M a rows of metadata" in output
    assert "throughline estimate --calibrate" in output
    assert "\nnotes\n" in output and "PB" in output


def test_invalid_arguments_are_rejected_in_one_sentence() -> None:
    assert str(estimate("--assume", "gpu_count=4")).startswith("error: no assumption 'gpu_count'; there are rows, ")
    assert str(estimate("--rows", "-3")).startswith(
        "error: --assume rows=-3: input should be greater than or equal to 1"
    )
    assert str(estimate("--stages", "")).startswith("error: no stage '' in an estimate; there are laion_subset,")
    assert str(estimate("--stages", "laion")).startswith(
        "error: no stage 'laion' in an estimate; there are laion_subset,"
    )


def test_reasons_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("--reasons") == 0
    output = capsys.readouterr().out
    assert "rows = 413,000,000\n    Rows of metadata. LAION-400M has 413 M according to its page" in output


def test_the_old_name_still_works_and_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--profile", "paper", "--stages", NO_TRAINING])
    old = capsys.readouterr()
    assert caught.value.code == 0
    assert old.err == (
        "`throughline plan` is now `throughline estimate`; the old name will be removed in the next release\n"
    )
    assert estimate("--stages", NO_TRAINING) == 0
    new = capsys.readouterr()
    assert (new.out, new.err) == (old.out, "")


@pytest.mark.slow
def test_without_training_no_heavy_library_is_loaded() -> None:
    code = (
        "import sys\nfrom orchestration.cli.main import main\n"
        "try:\n"
        f"    main(['estimate', '--profile', 'paper', '--stages', '{NO_TRAINING}'])\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'dagster', 'transformers', 'vllm', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_training_counts_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("--stages", "checkpoint", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    weights = {stage["partition"]: stage["bytes_out"]["value"] for stage in result["stages"]}
    assert weights["penultimate"] == 4 * 2_246_693_952 and weights["fuse_dit"] == 4 * 1_711_646_784
    assert len(weights) == 7


# Measurements


def _profile(home: Path, *changes: str, name: str = "demo") -> Profile:
    return load_profile(name, home, changes)


def test_rows_and_selectivity_come_from_the_profiles_own_outputs(tmp_path: Path) -> None:
    source = tmp_path / "laion"
    source.mkdir()
    for number in range(2):
        table = {
            "URL": [f"http://a.example/{number}-{row}.jpg" for row in range(50)],
            "TEXT": ["a red cat"] * 50,
            "WIDTH": [100] * 30 + [10] * 20,
            "HEIGHT": [100] * 50,
            "NSFW": ["UNLIKELY"] * 50,
            "similarity": pa.array([0.5] * 50),
        }
        pq.write_table(pa.table(table), source / f"{number}.parquet")
    profile = _profile(tmp_path / "home", f'source=["{source}"]')
    config = scan_index(source)
    index = laion_index.STAGE.run(config, {}, profile.output_root)
    entry = laion_index.entry_of(index, "0")
    laion_subset.STAGE.run(profile.laion_subset, {"index": [entry]}, profile.output_root, "0")
    measured = measured_for(profile)
    assert measured["rows"].value == 100 and measured["part_rows"].value == 50
    assert measured["pass_rules"].value == pytest.approx(0.6)
    assert measured["pass_rules"].what == "1 finished outputs of laion_subset (50 rows)"
    assert "filter_rows_per_second" not in measured  # a run this short is mostly start-up
    other = _profile(tmp_path / "home", f'source=["{source}"]', "laion_subset.min_side_px=65")
    assert "pass_rules" not in measured_for(other)


def _finished(profile: Profile, stage: str, config: Any, host: str | None = None, **more: Any) -> None:
    """Write a manifest where the stage would."""
    environment = Environment(
        git_commit=None, python="3.11", packages={}, host=host or platform.node(), accelerator="cpu",
        started_at="2026-01-01", ended_at="2026-01-01", seconds=10.0,
    )  # fmt: skip
    manifest = Manifest(
        stage=stage, partition="00000", code_version="1", fingerprint="f" * 64, config=identity_of(config),
        execution=config.model_dump(mode="json"), environment=environment, **more,
    ).sealed()  # fmt: skip
    folder = profile.output_root / stage / manifest.data_version
    folder.mkdir(parents=True)
    manifest.write(folder)


def _captions(profile: Profile, host: str | None = None) -> None:
    _finished(
        profile, "captions", profile.captions, host,
        conservation=Conservation(rows_in=50, rows_out=40, dropped={"no_caption": 10}),
        summary={"mean_caption_tokens": 20.0, "num_captions": 40},
        measurements={"seconds": 2.0, "captions_per_second": 25.0},
    )  # fmt: skip


def test_rates_apply_only_on_the_machine_that_measured_them(tmp_path: Path) -> None:
    profile = _profile(tmp_path)
    _captions(profile, host="another-machine")
    measured = measured_for(profile)
    assert measured["caption_tokens"].value == 20 and measured["captioned_share"].value == 0.8
    assert "captions_per_second" not in measured


def test_rates_apply_only_with_the_same_workers(tmp_path: Path) -> None:
    profile = _profile(tmp_path)
    _captions(profile)
    assert measured_for(profile)["captions_per_second"].value == 25
    more_actors = _profile(tmp_path, "captions.pool.max_actors=2")
    assert measured_for(more_actors)["caption_tokens"].value == 20
    assert "captions_per_second" not in measured_for(more_actors)


def test_image_bytes_exclude_the_rows_that_failed(tmp_path: Path) -> None:
    profile = _profile(tmp_path)
    files = (
        FileEntry(path="images-00000.parquet", sha256="0" * 64, num_bytes=6000, num_rows=3),
        FileEntry(path="status-00000.parquet", sha256="0" * 64, num_bytes=900, num_rows=5),
    )
    _finished(
        profile, "images", profile.images, files=files,
        conservation=Conservation(rows_in=5, rows_out=3, dropped={"html": 2}),
        measurements={"seconds": 4.0, "rows_per_second": 1.25},
    )  # fmt: skip
    measured = measured_for(profile)
    assert measured["image_row_bytes"].value == 2000
    assert measured["fetched_share"].value == pytest.approx(0.6)
    assert measured["fetch_rows_per_second"].value == pytest.approx(1.25)


def test_facts_come_from_files_and_pinned_counts(tmp_path: Path) -> None:
    facts = facts_of(_profile(tmp_path), count_parameters=False)
    assert facts.prompts["geneval"] > 10 and not facts.parameters
    assert 4e6 < facts.local_parameters["throughline/demo-vlm"] < 7e6
    assert facts_of(_profile(tmp_path, name="paper"), count_parameters=False).prompts == {
        "geneval": 553, "genai_bench": 1600, "drawbench": 200,
    }  # fmt: skip


# Calibration


@pytest.mark.slow
def test_calibration_runs_the_real_stages_and_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_calibration, "_FILTERED_ROWS", (2_000, 40_000))
    monkeypatch.setattr(estimate_calibration, "_DECODE_SECONDS", 0.2)
    monkeypatch.setattr(estimate_calibration, "_SHARD_SAMPLES", 50)
    profile = _profile(tmp_path, name="paper")
    measured = calibrate(profile, Assumptions())
    assert set(measured) == {
        "filter_rows_per_second", "filter_bytes_per_row", "filter_base_bytes", "selection_rows_per_second",
        "decode_images_per_second", "shard_samples_per_second",
    }  # fmt: skip
    assert set(measured) <= set(Assumptions.model_fields)
    assert all(item.value > 0 for item in measured.values())
    path = save_calibration(measured, profile)
    assert load_calibration(profile) == measured
    assert load_calibration(_profile(tmp_path, "laion_subset.min_side_px=300", name="paper")) == {}
    path.write_text("{}")
    with pytest.raises(ThroughlineError, match=r"not a readable calibration .*; delete it"):
        load_calibration(profile)


def test_calibration_fails_clearly_where_its_image_is_rejected(tmp_path: Path) -> None:
    profile = _profile(tmp_path, name="paper")
    with pytest.raises(ThroughlineError, match="decodes images of 100x100 px"):
        estimate_calibration._decoding(profile, Assumptions(source_width_px=100, source_height_px=100))
