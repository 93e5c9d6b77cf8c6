"""What `throughline doctor` finds out about memory, folders and Ray clusters."""

import socket
from pathlib import Path

import pytest

from orchestration.cli import doctor
from orchestration.cli.doctor import Verdict
from orchestration.cli.ray_probe import named_clusters
from orchestration.profiles.loading import load_profile
from orchestration.profiles.profile import Profile
from recaption.config import OpenAIEngineConfig


@pytest.fixture(autouse=True)
def _no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def _on(address: str, home: Path) -> Profile:
    return load_profile("single_gpu", home, [f"images.workers.ray_address={address}"])


def test_doctor_sees_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    history, root = doctor._folders(load_profile("single_gpu", tmp_path / "home", [f"outputs={file}"]))
    assert history.verdict is Verdict.GOOD
    assert (root.verdict, root.what) == (Verdict.BAD, f"output root {file}: expected a folder, found a file")
    (home,) = doctor._folders(load_profile("single_gpu", file))
    assert (home.verdict, home.mend) == (Verdict.BAD, "export THROUGHLINE_HOME=/a/folder")
    assert {symptom.verdict for symptom in doctor._folders(load_profile("demo", tmp_path))} == {Verdict.GOOD}


def test_too_little_memory_comes_with_advice(tmp_path: Path) -> None:
    symptoms = doctor._hardware(load_profile("demo", tmp_path, ["needs.memory_gib=1e6"]))
    (memory,) = (symptom for symptom in symptoms if "of memory" in symptom.what)
    assert memory.verdict is Verdict.BAD
    assert memory.mend.startswith("a machine of 1000000 GiB; or lower images.decode_workers=")
    assert "training.text_memory_bytes=" in memory.mend and "--set needs.memory_gib=" in memory.mend


def test_clusters_are_those_that_some_stage_runs_on(tmp_path: Path) -> None:
    assert named_clusters(load_profile("demo", tmp_path)) == {}
    assert list(named_clusters(load_profile("paper", tmp_path))) == ["auto"]
    assert "captions.pool.ray_address" in named_clusters(load_profile("paper", tmp_path))["auto"]
    profile = load_profile("single_gpu", tmp_path, ["captions.pool.ray_address=10.0.0.1:6379"])
    assert named_clusters(profile) == {"10.0.0.1:6379": ["captions.pool.ray_address"]}
    by_http = OpenAIEngineConfig(model=profile.text_encoder)
    captions = profile.captions.model_copy(update={"captioner": by_http})
    assert named_clusters(profile.model_copy(update={"captions": captions})) == {}


def test_a_cluster_that_listens_is_found_by_name_by_file_and_by_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        where = f"127.0.0.1:{head.getsockname()[1]}"
        for address in (where, f"ray://{where}"):
            (symptom,) = doctor._ray(_on(address, tmp_path))
            assert symptom.verdict is Verdict.GOOD
            assert symptom.what == f"a Ray cluster listens at {where}, for images"
        monkeypatch.setenv("RAY_ADDRESS", where)
        (symptom,) = doctor._ray(_on("auto", tmp_path))
        assert symptom.what == f"a Ray cluster listens at {where}, for images"
    (symptom,) = doctor._ray(_on("auto", tmp_path))
    assert symptom.verdict is Verdict.BAD
    assert symptom.what.startswith(f"ray_address auto, where images are to run: nothing answers at {where} within 3 s")
    assert symptom.mend.startswith("ray start --head")


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:99999x", ":6379"])
def test_what_is_no_address_is_said(address: str, tmp_path: Path) -> None:
    (symptom,) = doctor._ray(_on(address, tmp_path))
    assert (symptom.verdict, "expected host:port" in symptom.what) == (Verdict.BAD, True)
