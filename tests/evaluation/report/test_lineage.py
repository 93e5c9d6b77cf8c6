"""Following manifests if one input is a single file of an output that other stages read as a whole."""

from pathlib import Path

from evaluation.report.data import funnel
from evaluation.report.lineage import collect, stages_of
from pipelines.core.config import FrozenConfig
from pipelines.laion import selection as laion_selection
from pipelines.laion.config import LaionSelectionConfig
from pipelines.runner.outputs import StageOutput
from tests.pipelines.laion.laion_world import laion_row, run_index, subset_of, write_laion
from tests.plain_stage import plain_stage


def _roll_up(root: Path, index: StageOutput, subsets: list[StageOutput]) -> StageOutput:
    stage = plain_stage(name="dataset", code_version="1", config_type=FrozenConfig, produce=lambda run: None)
    return stage.run(FrozenConfig(), {"index": [index], "subset": subsets}, root)


def test_an_entry_leads_to_the_index_that_the_roll_up_read_though_a_newer_one_has_it_too(tmp_path: Path) -> None:
    write_laion(tmp_path / "laion" / "a.parquet", [laion_row("http://a.example/1")])
    old = run_index(tmp_path / "laion", tmp_path)
    subset = subset_of(old, tmp_path, "a")
    write_laion(tmp_path / "laion" / "b.parquet", [laion_row("http://a.example/2")])
    new = run_index(tmp_path / "laion", tmp_path)
    for index in (old, new):
        lineage = collect([subset, _roll_up(tmp_path, index, [subset])])
        assert [item.data_version for item in lineage["laion_index"]] == [index.data_version]
        assert list(lineage) == ["laion_index", "laion_subset", "dataset"]
    assert [item.data_version for item in collect([subset])["laion_index"]] == [new.data_version]


def test_the_funnel_counts_what_the_selection_took(tmp_path: Path) -> None:
    for part in ("a", "b"):
        write_laion(tmp_path / "laion" / f"{part}.parquet", [laion_row("http://a.example/1", f"in {part}")])
    index = run_index(tmp_path / "laion", tmp_path)
    subsets = [subset_of(index, tmp_path, part) for part in ("a", "b")]
    selection = laion_selection.STAGE.run(LaionSelectionConfig(), {"index": [index], "subset": subsets}, tmp_path)
    lineage = collect([selection])
    steps = [(s.stage, s.rows_in, s.rows_out, list(s.dropped)) for s in funnel(lineage, stages_of(lineage))]
    assert steps == [("laion_subset", 2, 2, []), ("laion_selection", 2, 1, [("duplicate_url", 1)])]
