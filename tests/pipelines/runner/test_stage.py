import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.core.config import FrozenConfig, ModelRef, execution_field
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import DROPPED_NAME, MANIFEST_NAME, damaged_files
from pipelines.laion.index import entry_of
from pipelines.runner.outputs import StageOutput, find_input
from pipelines.runner.request import StageRequest, write_request
from pipelines.runner.units import StageResult, StageRun
from tests.pipelines.laion.laion_world import laion_row, run_index, write_laion
from tests.pipelines.runner import toy_stage
from tests.pipelines.runner.toy_stage import STAGE, ToyConfig
from tests.plain_stage import plain_stage

REPOSITORY = Path(__file__).parents[3]


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_run_killed_at_any_line_resumes_to_the_same_data_version(tmp_path: Path) -> None:
    expected = STAGE.run(ToyConfig(), {}, tmp_path / "here").data_version
    driver = start("-m", toy_stage.__name__, "kill", str(tmp_path / "there"), "17")
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    records = [json.loads(line) for line in output.splitlines()]
    assert len(records) > 30
    assert all(record["killed"] for record in records)
    assert sum(record["again"] for record in records) > 10
    assert {record["version"] for record in records} == {expected}
    assert [record for record in records if record["problems"] or record["left"]] == []


@pytest.mark.slow
def test_two_processes_that_request_one_output_compute_it_once(tmp_path: Path) -> None:
    racers = [start("-m", toy_stage.__name__, "run", str(tmp_path)) for _ in range(2)]
    versions = {racer.communicate(timeout=60)[0] for racer in racers}
    assert all(racer.returncode == 0 for racer in racers)
    assert len(versions) == 1
    assert (tmp_path / "count").read_text() == "x" * len(toy_stage.UNITS)


def test_a_finished_output_is_reused_and_its_files_are_immutable_by_name(tmp_path: Path) -> None:
    config = ToyConfig(count_file=str(tmp_path / "count"))
    first = STAGE.run(config, {}, tmp_path)
    second = STAGE.run(config, {}, tmp_path)
    assert first.folder == second.folder == tmp_path / "toy" / first.data_version
    assert (tmp_path / "count").read_text() == "xxx"
    other = STAGE.run(ToyConfig(value=2), {}, tmp_path)
    assert other.folder != first.folder
    assert not damaged_files(first.folder, first.manifest, read_bytes=True)


@pytest.mark.parametrize("harm", ["flip", "shorten", "remove", "remove the folder", "alter the manifest"])
def test_damage_is_reported_and_repaired_by_running_again(tmp_path: Path, harm: str) -> None:
    output = STAGE.run(ToyConfig(), {}, tmp_path)
    path = output.path("a-00001.bin")
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[7] ^= 1
        path.write_bytes(data)
        assert not damaged_files(output.folder, output.manifest, read_bytes=False)
    elif harm == "shorten":
        path.write_bytes(data[:-1])
    elif harm == "remove":
        path.unlink()
    elif harm == "remove the folder":
        for entry in output.manifest.files:
            output.path(entry.path).unlink()
        output.manifest_path.unlink()
    else:
        text = output.manifest_path.read_text()
        output.manifest_path.write_text(text.replace('"rows_out": 9', '"rows_out": 8'))
        with pytest.raises(ThroughlineError, match=r"manifest.json: .*was altered, re-run stage toy"):
            StageOutput.load(output.manifest_path)
    if harm in ("flip", "shorten", "remove"):
        (problem,) = damaged_files(output.folder, output.manifest, read_bytes=True)
        assert "a-00001.bin" in problem
        assert "re-run toy" in problem
    repaired = STAGE.run(ToyConfig(), {}, tmp_path, verify="digest")
    assert repaired.data_version == output.data_version
    assert not damaged_files(repaired.folder, repaired.manifest, read_bytes=True)


def test_an_unfinished_output_has_no_manifest(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    with pytest.raises(ThroughlineError, match="the stage did not finish"):
        StageOutput.load(tmp_path / "deep" / MANIFEST_NAME)
    (tmp_path / "deep" / MANIFEST_NAME).write_text('{"format": 1')
    with pytest.raises(ThroughlineError, match="not a readable manifest"):
        StageOutput.load(tmp_path / "deep" / MANIFEST_NAME)


def test_a_unit_whose_files_vanished_is_computed_again(tmp_path: Path) -> None:
    def fails(run: StageRun[ToyConfig]) -> StageResult:
        toy_stage.produce(run)
        raise ThroughlineError("stopped before the end")

    with pytest.raises(ThroughlineError, match="stopped before the end"):
        plain_stage(name="toy", code_version="1", config_type=ToyConfig, produce=fails).run(ToyConfig(), {}, tmp_path)
    (lost,) = tmp_path.glob("toy/unfinished/*/out/deep/b-00001.bin")
    lost.unlink()
    config = ToyConfig(count_file=str(tmp_path / "count"))
    output = STAGE.run(config, {}, tmp_path)
    assert (tmp_path / "count").read_text() == "x"
    assert not damaged_files(output.folder, output.manifest, read_bytes=True)


def test_conservation_is_summed_and_each_drop_is_listed(tmp_path: Path) -> None:
    output = STAGE.run(ToyConfig(), {}, tmp_path)
    conservation = output.manifest.conservation
    assert conservation is not None
    assert conservation.holds
    assert (conservation.rows_in, conservation.rows_out, conservation.dropped) == (12, 9, {"odd": 3})
    rows = pq.read_table(output.path(DROPPED_NAME)).to_pylist()
    assert [(row["unit"], row["sample_key"], row["reason"], row["detail"]) for row in rows] == [
        (f"{number:05d}", f"{number:032x}", "odd", "because") for number in range(3)
    ]


def test_a_unit_can_drop_more_rows_than_are_buffered(tmp_path: Path) -> None:
    num_rows = 150_000

    def drop_all(run: StageRun[ToyConfig]) -> None:
        for name in ("a", "b"):
            with run.unit(name) as unit:
                for first in range(0, num_rows, 7_000):
                    keys = [f"{name}{number}" for number in range(first, min(first + 7_000, num_rows))]
                    unit.drop_many(keys, ["even" if int(key[1:]) % 2 == 0 else "odd" for key in keys], keys)
                unit.account(rows_in=num_rows, rows_out=0)

    stage = plain_stage(name="toy", code_version="1", config_type=ToyConfig, produce=drop_all)
    output = stage.run(ToyConfig(), {}, tmp_path)
    assert output.manifest.conservation is not None
    assert output.manifest.conservation.dropped == {"even": num_rows, "odd": num_rows}
    table = pq.read_table(output.path(DROPPED_NAME))
    assert table["sample_key"].to_pylist() == [f"{name}{number}" for name in "ab" for number in range(num_rows)]
    assert table["unit"].to_pylist() == ["a"] * num_rows + ["b"] * num_rows
    assert output.manifest.file(DROPPED_NAME).num_rows == 2 * num_rows


def test_a_row_lost_without_a_reason_stops_the_stage(tmp_path: Path) -> None:
    def lose_a_row(run: StageRun[ToyConfig]) -> None:
        with run.unit("00000") as unit:
            unit.account(rows_in=10, rows_out=9)

    stage = plain_stage(name="toy", code_version="1", config_type=ToyConfig, produce=lose_a_row)
    with pytest.raises(ThroughlineError, match="every lost row needs a reason"):
        stage.run(ToyConfig(), {}, tmp_path)
    assert not list(tmp_path.glob("toy/*/manifest.json"))


class Nested(FrozenConfig):
    model: ModelRef = ModelRef(id="a/b", revision="c")
    workers: int = execution_field(1)


class Outer(FrozenConfig):
    rate: float = 0.5
    nested: Nested = Nested()
    several: tuple[Nested, ...] = (Nested(),)
    port: int = execution_field(1)


def test_fingerprint_depends_on_exactly_what_changes_the_result(tmp_path: Path) -> None:
    stage = plain_stage(name="s", code_version="1", config_type=Outer, produce=lambda run: None)
    same = [
        Outer(port=2),
        Outer(nested=Nested(workers=8), several=(Nested(workers=2),)),
        Outer(nested=Nested(model=ModelRef(id="a/b", revision="c", path="/somewhere"))),
    ]
    other = [Outer(rate=0.6), Outer(nested=Nested(model=ModelRef(id="a/b", revision="d"))), Outer(several=())]
    fingerprint = stage.fingerprint(Outer(), {})
    assert {stage.fingerprint(config, {}) for config in same} == {fingerprint}
    others = {stage.fingerprint(config, {}) for config in other}
    others |= {stage.fingerprint(Outer(), {}, "00000")}
    others |= {stage.fingerprint(Outer(), {"x": [STAGE.run(ToyConfig(), {}, tmp_path)]})}
    others |= {
        plain_stage(name="s", code_version="2", config_type=Outer, produce=lambda run: None).fingerprint(Outer(), {})
    }
    assert len(others | {fingerprint}) == 7


def test_manifest_records_models_inputs_and_environment(tmp_path: Path) -> None:
    stage = plain_stage(name="s", code_version="1", config_type=Outer, produce=lambda run: None)
    toy = STAGE.run(ToyConfig(), {}, tmp_path)
    manifest = stage.run(Outer(port=7), {"toys": [toy]}, tmp_path, "00003").manifest
    assert [(model.role, model.id, model.revision) for model in manifest.models] == [("model", "a/b", "c")]
    assert manifest.inputs == {"toys": (toy.ref,)}
    assert manifest.execution["port"] == 7
    assert "port" not in manifest.config
    assert manifest.environment is not None
    assert manifest.environment.packages["pyarrow"]
    elsewhere = stage.run(Outer(port=8), {"toys": [toy]}, tmp_path / "elsewhere", "00003").manifest
    assert elsewhere.data_version == manifest.data_version


def two_files(root: Path, first: str, second: str) -> StageOutput:
    """Run a small stage whose output holds these two files."""

    class TwoConfig(FrozenConfig):
        texts: tuple[str, str]

    def produce(run: StageRun[TwoConfig]) -> None:
        with run.unit("all") as unit:
            for name, text in zip(("a.txt", "b.txt"), run.config.texts, strict=True):
                unit.write(name, text.encode())

    stage = plain_stage(name="two", code_version="1", config_type=TwoConfig, produce=produce)
    return stage.run(TwoConfig(texts=(first, second)), {}, root)


def test_a_stage_that_reads_one_file_depends_on_that_file_alone(tmp_path: Path) -> None:
    before, after = two_files(tmp_path, "one", "two"), two_files(tmp_path, "one", "three")
    whole = [STAGE.fingerprint(ToyConfig(), {"x": [output]}) for output in (before, after)]
    file_a = [STAGE.fingerprint(ToyConfig(), {"x": [output.only_file("a.txt")]}) for output in (before, after)]
    file_b = [STAGE.fingerprint(ToyConfig(), {"x": [output.only_file("b.txt")]}) for output in (before, after)]
    assert whole[0] != whole[1] and file_a[0] == file_a[1] and file_b[0] != file_b[1]
    one = before.only_file("a.txt")
    assert one.ref.model_dump() == {
        "stage": "two",
        "partition": None,
        "data_version": one.data_version,
        "file": "a.txt",
    }
    assert "file" not in before.ref.model_dump(), "references to whole outputs must keep their digest"
    assert StageOutput.load(one.address) == one and StageOutput.load(before.address) == before
    assert one.files(".txt") == [one.path("a.txt")]
    with pytest.raises(ThroughlineError, match=r"the input is its file a.txt alone, not b.txt"):
        one.path("b.txt")
    with pytest.raises(ThroughlineError, match=r"no file c.txt in its manifest"):
        StageOutput.load(before.folder / "c.txt")


def test_an_output_is_found_by_one_of_its_files(tmp_path: Path) -> None:
    before, after = two_files(tmp_path, "one", "two"), two_files(tmp_path, "one", "three")
    both, first = before.only_file("a.txt").ref, before.only_file("b.txt").ref
    assert find_input(tmp_path, first).folder == before.folder
    assert find_input(tmp_path, both, [after, before]).folder == after.folder
    assert find_input(tmp_path, both, [before, after]).folder == before.folder
    assert find_input(tmp_path, both).folder == after.folder, "the newest, if no output is known"
    assert find_input(tmp_path, after.ref).folder == after.folder
    before.manifest_path.write_text(before.manifest_path.read_text().replace('"b.txt"', '"c.txt"'))
    assert find_input(tmp_path, both).folder == after.folder, "an altered manifest is skipped"
    with pytest.raises(ThroughlineError, match=r"no sound output of two under .* holds b.txt with SHA-256"):
        find_input(tmp_path, first)


def request_for_subset(tmp_path: Path, root: Path, num_rows: int, **config: Any) -> Path:
    rows = [laion_row(f"http://example.com/{index}.jpg", f"text {index} " * 20) for index in range(num_rows)]
    index = run_index(write_laion(tmp_path / "laion" / "p.parquet", rows).parent, tmp_path / "index")
    request = StageRequest(
        stage="laion_subset",
        partition="p",
        config=config,
        inputs={"index": [str(entry_of(index, "p").address)]},
        output_root=str(root),
    )
    write_request(tmp_path / "request.json", request)
    return tmp_path / "request.json"


def run_module(request: Path) -> tuple[int, str, str]:
    process = start("-m", "pipelines.runner", "laion_subset", "--config", str(request))
    output, errors = process.communicate(timeout=120)
    return process.returncode, output.strip(), errors.strip().splitlines()[-1]


def test_a_missing_package_fails_with_one_sentence_that_names_the_fix(tmp_path: Path) -> None:
    def produce(run: Any) -> None:
        importlib.import_module("not_installed_here")

    stage = plain_stage(name="s", code_version="1", config_type=ToyConfig, produce=produce)
    write_request(tmp_path / "r.json", StageRequest(stage="s", config={}, output_root=str(tmp_path / "out")))
    with pytest.raises(SystemExit) as caught:
        stage.run_requests([tmp_path / "r.json"])
    assert str(caught.value).startswith("error: s: the package not_installed_here is not installed; run `make setup`")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs to mount a small tmpfs, which is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_fails_with_one_sentence_and_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    request = request_for_subset(tmp_path, small_disk / "out", 5000)
    status, output, sentence = run_module(request)
    assert (status, output) == (1, "")
    assert sentence.startswith("error: laion_subset: the disk is full")
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    status, output, _ = run_module(request)
    assert status == 0
    assert not damaged_files(Path(output).parent, StageOutput.load(Path(output)).manifest, read_bytes=True)


@pytest.mark.slow
def test_as_a_program_a_stage_prints_its_manifest_or_one_error_line(tmp_path: Path) -> None:
    request = request_for_subset(tmp_path, tmp_path / "out", 10)
    status, output, _ = run_module(request)
    assert status == 0
    assert StageOutput.load(Path(output)).manifest.stage == "laion_subset"
    status, output, sentence = run_module(tmp_path / "absent.json")
    assert (status, output) == (1, "")
    assert sentence == f"error: {tmp_path / 'absent.json'}: no such request file"
    request.write_text(request.read_text().replace('"config": {}', '"config": {"min_similarity": 3, "colour": 1}'))
    _, _, sentence = run_module(request)
    assert sentence.startswith("error: configuration of laion_subset: min_similarity: ")
    assert "colour: Extra inputs are not permitted" in sentence
