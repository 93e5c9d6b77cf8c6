"""The command line over an output root in an object store, against a real S3 server."""

import json
from pathlib import Path

import pytest

from orchestration.cli.main import main
from orchestration.graph.execution import Execution
from orchestration.graph.resolution import Plan, State
from orchestration.profiles.loading import load_profile
from pipelines.core.errors import ThroughlineError
from pipelines.storage.config import StoreConfig
from pipelines.storage.mirror import bind
from tests.orchestration.conftest import NUMBERS, Recorder
from tests.orchestration.small.stages import SMALL_GRAPH, IndexConfig, KeepConfig, SmallProfile
from tests.pipelines.laion.laion_world import laion_row, write_laion
from tests.s3_server import TRANSFER, Fault, FaultyProxy, S3Server


def throughline(*arguments: str) -> object:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


@pytest.mark.slow
def test_run_status_and_audit_on_an_s3_url(
    s3: FaultyProxy,
    s3_server: S3Server,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = write_laion(tmp_path / "laion" / "p.parquet", [laion_row(f"http://a.com/{n}.jpg") for n in range(9)])
    options = ["--profile", "single_gpu", "--output-root", f"s3://{bucket}/runs", "--set", f'source=["{source}"]']

    def on_machine(name: str) -> None:
        monkeypatch.setenv("THROUGHLINE_HOME", str(tmp_path / name))
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / name / "dagster"))

    on_machine("one")
    assert throughline("run", *options, "--select", "+laion_subset") == 0
    message = capfd.readouterr().err
    assert f"outputs in s3://{bucket}/runs (working folder {tmp_path}/one/stores/" in message
    assert "2 computed, 0 reused" in message
    assert sum("fingerprints" in line for line in s3.seen) < 60, "an unfinished output is not looked up repeatedly"

    capfd.readouterr()
    on_machine("two")
    assert throughline("status", *options, "--json") == 0
    states = {record["asset"]: record for record in json.loads(capfd.readouterr().out)}
    assert [states[name]["state"] for name in ("laion_index", "laion_subset", "images")] == [
        "finished", "finished", "missing",
    ]  # fmt: skip
    assert throughline("run", *options, "--select", "+laion_subset") == 0
    assert "0 computed, 2 reused" in capfd.readouterr().err
    version = states["laion_subset"]["data_version"]
    assert throughline("audit", *options, version[:10]) == 0
    assert "All 2 outputs" in capfd.readouterr().out

    rows = s3_server.folder / bucket / "runs" / "laion_subset" / version / "rows.parquet"
    data = bytearray(rows.read_bytes())
    data[100] ^= 1
    rows.write_bytes(data)
    s3_server.wait_for_changes()
    capfd.readouterr()
    on_machine("three")
    assert throughline("audit", *options, version[:10]) == 1
    message = capfd.readouterr().out
    assert f"s3://{bucket}/runs/laion_subset/{version}/rows.parquet: SHA-256" in message
    on_machine("one")
    assert throughline("run", *options, "--select", "laion_subset", "--set", "verify=digest") == 0
    assert throughline("audit", *options, version[:10]) == 0


@pytest.mark.slow
def test_a_wrong_url_or_setting_is_one_sentence(
    s3: FaultyProxy, s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THROUGHLINE_HOME", str(tmp_path))

    def message(url: str, command: str = "status") -> str:
        return str(throughline(command, "--profile", "single_gpu", "--output-root", url))

    assert message("s3://absent/x") == "error: s3://absent: no such bucket; create it, or correct the URL"
    assert "hdfs://bucket: expected s3://bucket, gs://bucket or az://container" in message("hdfs://bucket", "run")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert f"error: s3://{bucket}: the credentials were refused" in message(f"s3://{bucket}", "audit")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    other = s3_server.new_bucket()
    assert message(f"s3://{other}").startswith(f"error: s3://{other}: no credentials; set AWS_ACCESS_KEY_ID")


@pytest.mark.slow
def test_a_second_machine_takes_over_the_whole_graph(s3: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    def machine(name: str) -> Execution:
        profile = SmallProfile(
            home=tmp_path / name, index=IndexConfig(numbers=NUMBERS), keep=KeepConfig(starts=str(tmp_path / "starts"))
        )
        bind(profile.output_root, StoreConfig(url=f"s3://{bucket}/small", transfer=TRANSFER))
        return Execution(Plan(SMALL_GRAPH, profile, profile.output_root), profile.log_folder)

    one = machine("one")
    for name in ("laion_index", "kept"):
        one.materialize(name, one.plan.partitions(name), Recorder())
    s3.faults = [Fault("PUT .*total.json", "busy", 1_000_000)]
    with pytest.raises(ThroughlineError, match=r"total.json: the server answered 503 SlowDown .* run the same command"):
        one.materialize("total", [None], Recorder())
    s3.faults = []

    two = machine("two")
    for name in two.plan.graph.nodes:
        outcomes = two.materialize(name, two.plan.partitions(name), Recorder())
        assert all(outcome.reused == (name in ("laion_index", "kept")) for outcome in outcomes)
    assert len((tmp_path / "starts").read_text().splitlines()) == len(NUMBERS)
    assert {one.plan.state(task) for task in one.plan.all_tasks()} == {State.FINISHED}

    three = machine("three")
    three.plan.profile.keep = KeepConfig(drop_below=7)  # type: ignore[misc]
    assert three.plan.state(three.plan.task("kept", "00000")) is State.STALE


def test_an_output_root_is_a_folder_or_an_s3_url(tmp_path: Path) -> None:
    def profile(*changes: str) -> object:
        return load_profile("single_gpu", tmp_path, changes)

    assert load_profile("single_gpu", tmp_path).output_root == tmp_path / "outputs"
    assert load_profile("single_gpu", tmp_path, ["outputs=/elsewhere"]).output_root == Path("/elsewhere")
    one, other = (load_profile("single_gpu", tmp_path, [f"outputs=s3://{name}/x"]) for name in ("a", "b"))
    assert one.store == StoreConfig(url="s3://a/x")
    assert one.output_root != other.output_root
    assert one.output_root.parent == tmp_path / "stores"
    with pytest.raises(ThroughlineError, match="expected s3://bucket"):
        profile("outputs=s3://")


@pytest.mark.slow
def test_a_subset_is_read_from_and_written_to_object_stores(
    s3: FaultyProxy,
    s3_server: S3Server,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for part in range(2):
        rows = [laion_row(f"http://a.com/{part}/{n}.jpg", f"text {n}") for n in range(9)]
        write_laion(s3_server.folder / bucket / "laion" / f"{part}.parquet", rows)
    words = ["subset", "--input", f"s3://{bucket}/laion/*.parquet", "--out", f"s3://{bucket}/subset"]
    outcomes = []
    for machine in ("one", "two"):
        monkeypatch.setenv("THROUGHLINE_HOME", str(tmp_path / machine))
        s3.seen.clear()
        assert throughline(*words, "--workers", "1", "--json") == 0
        outcomes.append(json.loads(capfd.readouterr().out))
        assert outcomes[-1]["rows_out"] == 18
        assert all(Path(name).is_file() for name in outcomes[-1]["files"])
        assert any(line.startswith("PUT") for line in s3.seen) == (machine == "one")
    versions = [[Path(name).parent.name for name in outcome["subsets"]] for outcome in outcomes]
    assert versions[0] == versions[1]
