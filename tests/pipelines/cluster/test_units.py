"""Units on a real Ray: the same bytes as in one process, even if workers die."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.config import WorkersConfig
from pipelines.cluster.nodes import NodeRequirements
from pipelines.cluster.units import ray_tasks
from pipelines.core.config import FrozenConfig
from pipelines.core.errors import ThroughlineError
from pipelines.download import images
from pipelines.download.config import ImagesConfig
from pipelines.laion import selection as laion_selection
from pipelines.laion.config import LaionSelectionConfig
from pipelines.runner.units import StageRun
from pipelines.shards import shards
from pipelines.shards.config import ShardsConfig
from tests.pipelines.cluster import ray_toy
from tests.pipelines.cluster.ray_toy import RayToyConfig
from tests.pipelines.cluster.ray_world import (
    GatedServer,
    is_intact,
    run_chain,
    selected,
    versions,
    wait_until,
    write_source,
)
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import images_config, laion_row, run_subset, start_images, write_laion
from tests.plain_stage import plain_stage

ON_RAY = WorkersConfig(ray_address="local", cpus_per_unit=1)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A local Ray with two cores, started once for all tests of this module."""
    import ray

    from pipelines.cluster.session import join_ray
    from recaption.ray_pool import close_pools

    close_pools()
    ray.shutdown()
    join_ray("local", ("pipelines",), num_cpus=2, object_store_memory_bytes=80 << 20)
    yield
    ray.shutdown()


def toy(folder: Path, **changes: Any) -> RayToyConfig:
    folder.mkdir(parents=True, exist_ok=True)
    return RayToyConfig(notes=str(folder), **changes)


def num_attempts(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


def test_workers_are_not_part_of_the_fingerprint() -> None:
    for stage, config_type in ((images, ImagesConfig), (shards, ShardsConfig), (laion_selection, LaionSelectionConfig)):
        assert stage.STAGE.fingerprint(config_type(workers=ON_RAY), {}) == stage.STAGE.fingerprint(config_type(), {})


def test_without_a_cluster_units_run_in_process_one_by_one(tmp_path: Path) -> None:
    output = ray_toy.STAGE.run(toy(tmp_path / "notes", max_pending=1), {}, tmp_path)
    assert len(output.files(".bin")) == 2 * ray_toy.NUM_UNITS


class _Empty(FrozenConfig):
    pass


def test_of_two_attempts_at_a_unit_only_the_adopted_one_counts(tmp_path: Path) -> None:
    def attempt(value: int) -> Path:
        folder = tmp_path / f"attempt-{value}"
        with StageRun("toy", _Empty(), None, {}, folder).unit("00000") as unit:
            unit.write("deep/a.bin", bytes([value]) * 9, num_rows=1)
            unit.drop("0" * 32, "odd", f"{value}")
            unit.account(rows_in=2, rows_out=1)
            unit.notes["value"] = value
        return folder

    def produce(run: StageRun[_Empty]) -> None:
        first, second = attempt(1), attempt(2)
        adopted = run.adopt("00000", second)
        assert adopted.notes == {"value": 2} and run.finished_units() == [adopted]
        assert first.exists() and not second.exists()

    output = plain_stage(name="toy", code_version="1", config_type=_Empty, produce=produce).run(_Empty(), {}, tmp_path)
    assert output.path("deep/a.bin").read_bytes() == bytes([2]) * 9
    assert is_intact(output)


def test_an_error_names_a_node_that_lacks_the_folder_or_has_other_versions(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("ours")
    with pytest.raises(ThroughlineError, match=r"node .* does not see .*; mount the output folder on every node"):
        NodeRequirements(tmp_path, "another's", {}).check()
    with pytest.raises(ThroughlineError, match="does not see"):
        NodeRequirements(tmp_path / "elsewhere", "ours", {}).check()
    with pytest.raises(ThroughlineError, match=r"node .* has numpy [\d.]+, this process 1\.0; install the same"):
        NodeRequirements(tmp_path, "ours", {"numpy": "1.0"}).check()


@pytest.mark.slow
def test_killing_a_worker_mid_unit_loses_and_duplicates_nothing(local_ray: None, tmp_path: Path) -> None:
    expected = ray_toy.STAGE.run(toy(tmp_path / "notes"), {}, tmp_path / "here")
    notes = tmp_path / "ray-notes"
    config = toy(notes, workers=ON_RAY, deadly="00002", deaths=2)
    output = ray_toy.STAGE.run(config, {}, tmp_path / "ray")
    assert output.data_version == expected.data_version
    assert is_intact(output)
    assert [num_attempts(notes, name) for name in ray_toy.NAMES] == [1, 1, 3, 1, 1, 1]


@pytest.mark.slow
def test_an_error_names_a_unit_that_always_kills_its_worker_and_others_are_kept(
    local_ray: None, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    # One at a time: units in flight when the stage fails are cancelled, and retried by the next run.
    workers = ON_RAY.model_copy(update={"max_deaths_per_unit": 1, "max_units_in_flight": 1})
    with pytest.raises(ThroughlineError, match="ray_toy: the worker of unit 00005 died 2 times"):
        ray_toy.STAGE.run(toy(notes, workers=workers, deadly="00005", deaths=9), {}, tmp_path)
    assert num_attempts(notes, "00005") == 2
    ray_toy.STAGE.run(toy(notes, workers=workers), {}, tmp_path)
    assert [num_attempts(notes, name) for name in ray_toy.NAMES] == [1, 1, 1, 1, 1, 3]


@pytest.mark.slow
def test_an_exception_of_a_unit_is_raised_unchanged_and_not_retried(local_ray: None, tmp_path: Path) -> None:
    workers = ON_RAY.model_copy(update={"max_units_in_flight": 1})
    with pytest.raises(ThroughlineError) as caught:
        ray_toy.STAGE.run(toy(tmp_path / "notes", workers=workers, wrong="00003", max_pending=1), {}, tmp_path)
    assert type(caught.value) is ThroughlineError
    assert str(caught.value) == "ray_toy: unit 00003 is wrong; fix it"
    assert [num_attempts(tmp_path / "notes", name) for name in ray_toy.NAMES] == [1, 1, 1, 1, 0, 0]


@pytest.mark.slow
def test_a_node_that_loses_its_mount_gives_a_clear_error(local_ray: None, tmp_path: Path) -> None:
    run = StageRun("toy", _Empty(), None, {}, tmp_path / "work")
    with ray_tasks(run, ON_RAY) as tasks:
        assert tasks is not None and tasks.num_places == 2
        (tasks.folder / "token").unlink()
        with pytest.raises(ThroughlineError, match=r"node .* of the Ray cluster does not see"):
            list(tasks.map(max, 1, [("one", 1)]))


@pytest.mark.slow
def test_units_that_fit_on_no_node_give_a_clear_error(local_ray: None, tmp_path: Path) -> None:
    workers = WorkersConfig(ray_address="local", cpus_per_unit=64, room_timeout_seconds=0.1)
    with pytest.raises(ThroughlineError, match="no node of the Ray cluster has had 64 CPUs for a unit"):
        ray_toy.STAGE.run(toy(tmp_path / "notes", workers=workers), {}, tmp_path)


@pytest.mark.slow
def test_download_shards_and_dedup_on_ray_match_one_process_byte_for_byte(
    local_ray: None, gated: GatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated.gate.set()
    source = write_source(gated, tmp_path / "laion")
    expected = run_chain(gated, source, tmp_path / "here", WorkersConfig())
    assert expected["dataset"].manifest.conservation.dropped["duplicate_image"] > 0
    monkeypatch.chdir(tmp_path)
    assert versions(run_chain(gated, source, Path("ray"), ON_RAY)) == versions(expected)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 30])
def test_selection_on_ray_matches_one_process(local_ray: None, tmp_path: Path, limit: int | None) -> None:
    for part in range(3):
        pairs = [((7 * number + part) % 50, number % 3) for number in range(40)]
        rows = [laion_row(f"http://a.example/{url}", f"text {text}") for url, text in pairs]
        write_laion(tmp_path / "laion" / f"{part}.parquet", rows)
    here = selected(tmp_path / "here", tmp_path / "laion", 3, limit=limit, bucket_rows=1000)
    on_ray = selected(tmp_path / "ray", tmp_path / "laion", 3, limit=limit, bucket_rows=7, workers=ON_RAY)
    assert here.manifest.summary["dropped"]["duplicate_url"] > 0
    assert versions({"": on_ray}) == versions({"": here})


@pytest.mark.slow
def test_an_unreachable_host_gives_the_same_error_as_without_ray(
    local_ray: None, server: HostileServer, tmp_path: Path
) -> None:
    urls = [server.url(f"/404?{number}") for number in range(40)]
    source = write_laion(tmp_path / "laion" / "p.parquet", [laion_row(url, url) for url in urls]).parent
    subset = run_subset(source, tmp_path)
    messages = set()
    for workers in (WorkersConfig(), ON_RAY.model_copy(update={"max_units_in_flight": 1})):
        config = images_config(server, rows_per_shard=20, max_failure_share=0.5, shards_in_flight=1, workers=workers)
        with pytest.raises(ThroughlineError) as caught:
            images.STAGE.run(config, {"subset": [subset]}, tmp_path / str(workers.ray_address), "00000")
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith("images 00000 shard 00000: 20 of 20 consecutive rows failed")


@pytest.mark.slow
def test_a_killed_driver_resumes_after_its_finished_units(local_ray: None, gated: GatedServer, tmp_path: Path) -> None:
    paths = [f"/scene/{number}" for number in range(16)] + [f"/held/{number}" for number in range(16, 32)]
    rows = [laion_row(gated.url(path), path) for path in paths]
    subset = run_subset(write_laion(tmp_path / "laion" / "p.parquet", rows).parent, tmp_path)
    config = images_config(gated, workers=ON_RAY)
    process = start_images(config, subset, tmp_path)
    unfinished = tmp_path / "killed" / "images" / "unfinished"
    try:
        wait_until(lambda: len(list(unfinished.glob("*/units/*.json"))) == 2 and gated.requests["/held/16"], process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    gated.requests.clear()
    gated.gate.set()
    resumed = images.STAGE.run(config, {"subset": [subset]}, tmp_path / "killed", "00000")
    assert not [path for path in gated.requests if path.startswith("/scene/") and int(path[7:]) < 16]
    expected = images.STAGE.run(images_config(gated), {"subset": [subset]}, tmp_path / "here", "00000")
    assert versions({"": resumed}) == versions({"": expected})
