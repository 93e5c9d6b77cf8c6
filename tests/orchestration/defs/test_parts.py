"""The data assets of the real graph when LAION files are added, changed and removed: states, and Dagster's record."""

from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from orchestration.cli.run import Run
from orchestration.console import Console
from orchestration.definitions import build_definitions, build_execution
from orchestration.defs.instance import open_instance
from orchestration.graph.nodes import GRAPH
from orchestration.graph.resolution import Plan, State
from orchestration.lineage.status import status_lines
from orchestration.profiles.loading import load_profile
from pipelines.core.sample_key import sample_key
from tests.pipelines.laion.laion_world import laion_row, write_laion

URL = "http://a.example/1"


class Folder:
    """LAION files in a folder, and plans over them."""

    def __init__(self, root: Path, *changes: str) -> None:
        self.source = root / "laion"
        source = f'source=["{self.source}"]'
        self.profile = load_profile("single_gpu", root / "home", [source, *changes])

    def write(self, part: str, *texts: str) -> None:
        write_laion(self.source / f"{part}.parquet", [laion_row(URL, text) for text in texts])

    def plan(self) -> Plan:
        return Plan(GRAPH, self.profile, self.profile.output_root)

    def execute(self, *assets: str) -> None:
        """Run the stages of assets in this process."""
        plan = self.plan()
        for asset in assets:
            for task in plan.tasks(asset):
                if task.output is None:
                    assert task.config is not None and task.inputs is not None, task.blocked_by
                    task.node.stage.run(task.config, task.inputs, plan.output_root, task.partition)
            plan.invalidate(asset, None)

    def states(self, asset: str) -> dict[str, State]:
        plan = self.plan()
        return {task.partition or "": plan.state(task) for task in plan.tasks(asset)}

    def images_fingerprints(self) -> dict[str, str]:
        tasks = self.plan().tasks("images")
        return {
            task.partition or "": task.node.stage.fingerprint(task.config, task.inputs, task.partition)
            for task in tasks
            if task.inputs is not None
        }


def test_states_of_parts_of_a_changed_folder_are_known_before_and_after_the_index_is_computed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for part in ("one", "two", "three"):
        folder.write(part, part)
    assert folder.states("laion_subset") == dict.fromkeys(("one", "three", "two"), State.MISSING)
    folder.execute("laion_index", "laion_subset")
    assert set(folder.states("laion_subset").values()) == {State.FINISHED}
    folder.write("a-new-one", "new")
    folder.write("two", "changed")
    (folder.source / "three.parquet").unlink()
    expected = {"a-new-one": State.MISSING, "one": State.FINISHED, "two": State.STALE}
    assert folder.states("laion_index") == {"": State.STALE}
    assert folder.states("laion_subset") == expected
    assert folder.plan().task("laion_subset", "two").blocked_by == ("laion_index is not finished",)
    folder.execute("laion_index")
    assert folder.states("laion_subset") == expected
    folder.execute("laion_subset")
    assert folder.states("laion_subset") == dict.fromkeys(expected, State.FINISHED)


@pytest.mark.slow
def test_a_selection_makes_stale_the_images_of_exactly_the_parts_whose_rows_changed(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "laion_selection.drop_duplicate_urls=true", "laion_subset.drop_duplicate_urls=false")
    winner, loser = sorted(("a text", "another text"), key=lambda text: sample_key(URL, text))
    folder.write("a", loser)
    write_laion(folder.source / "b.parquet", [laion_row("http://b.example/1")])
    steps = ("laion_index", "laion_subset", "laion_selection")
    folder.execute(*steps)
    before = folder.images_fingerprints()
    folder.write("c", winner)
    assert folder.images_fingerprints() == {}, "the effect of the new file on other parts is not known yet"
    folder.execute(*steps)
    after = folder.images_fingerprints()
    assert set(after) == {"a", "b", "c"}
    assert {part for part in before if after[part] != before[part]} == {"a"}
    selection = folder.plan().task("laion_selection").output
    assert selection is not None and selection.manifest.conservation is not None
    assert selection.manifest.conservation.dropped == {"duplicate_url": 1}
    lines = "\n".join(status_lines(folder.plan(), each_partition=False)).splitlines()
    (row,) = [line.split() for line in lines if "laion_selection" in line]
    assert row[1:4] == ["laion_selection", "finished", "2"]


@pytest.mark.slow
def test_a_run_records_every_part_in_dagster_and_a_second_run_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path, "laion_selection.limit=3")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))
    for part in ("one", "two"):
        folder.write(part, part)
    with open_instance(tmp_path / "home") as instance:
        for num_runs in (1, 1, 2):
            if num_runs == 2:
                folder.write("three", "three")
            execution = build_execution(folder.profile)
            nodes = execution.plan.graph.select("+laion_selection")
            Run(execution, instance, Console()).execute("selected", nodes)
            assert instance.get_runs_count() == num_runs
        graph = build_definitions(execution).resolve_asset_graph()
        resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
        for name in ("laion_index_parts", "laion_subset", "laion_selection_parts"):
            statuses = {part: resolver.get_status(dg.AssetKey(name), part) for part in ("one", "three", "two")}
            assert set(statuses.values()) == {StaleStatus.FRESH}, name
        assert resolver.get_status(dg.AssetKey("laion_selection")) is StaleStatus.FRESH
        records = instance.fetch_materializations(dg.AssetKey("laion_subset"), limit=100).records
        assert len(records) == 3, "the parts of the first run were not recorded again"
