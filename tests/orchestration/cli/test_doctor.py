"""Diagnostics of `throughline doctor` about memory, folders and Ray clusters."""

import socket
from pathlib import Path

import pytest

from orchestration.cli import doctor
from orchestration.cli.doctor import Level
from orchestration.cli.ray_probe import named_clusters
from orchestration.profiles.loading import load_profile
from orchestration.profiles.profile import Profile
from recaption.config import OpenAIEngineConfig


@pytest.fixture(autouse=True)
def _no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def _profile(address: str, home: Path) -> Profile:
    return load_profile("single_gpu", home, [f"images.workers.ray_address={address}"])


def test_a_file_in_place_of_a_folder_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    history, root = doctor._folders(load_profile("single_gpu", tmp_path / "home", [f"outputs={file}"]))
    assert history.level is Level.GOOD
    assert (root.level, root.message) == (Level.BAD, f"output root {file}: expected a folder, found a file")
    (home,) = doctor._folders(load_profile("single_gpu", file))
    assert (home.level, home.fix) == (Level.BAD, "export THROUGHLINE_HOME=/a/folder")
    assert {diagnostic.level for diagnostic in doctor._folders(load_profile("demo", tmp_path))} == {Level.GOOD}


def test_too_little_memory_comes_with_advice(tmp_path: Path) -> None:
    diagnostics = doctor._hardware(load_profile("demo", tmp_path, ["needs.memory_gib=1e6"]))
    (memory,) = (diagnostic for diagnostic in diagnostics if "of memory" in diagnostic.message)
    assert memory.level is Level.BAD
    assert memory.fix.startswith("use a machine with 1000000 GiB; or lower images.decode_workers=")
    assert "training.text_memory_bytes=" in memory.fix and "--set needs.memory_gib=" in memory.fix


def test_clusters_are_those_that_a_stage_uses(tmp_path: Path) -> None:
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
        endpoint = f"127.0.0.1:{head.getsockname()[1]}"
        for address in (endpoint, f"ray://{endpoint}"):
            (diagnostic,) = doctor._ray(_profile(address, tmp_path))
            assert diagnostic.level is Level.GOOD
            assert diagnostic.message == f"a Ray cluster listens at {endpoint}, for images"
        monkeypatch.setenv("RAY_ADDRESS", endpoint)
        (diagnostic,) = doctor._ray(_profile("auto", tmp_path))
        assert diagnostic.message == f"a Ray cluster listens at {endpoint}, for images"
    (diagnostic,) = doctor._ray(_profile("auto", tmp_path))
    assert diagnostic.level is Level.BAD
    assert diagnostic.message.startswith(
        f"ray_address auto, on which images run: nothing answers at {endpoint} within 3 s"
    )
    assert diagnostic.fix.startswith("ray start --head")


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:99999x", ":6379"])
def test_an_invalid_address_is_reported(address: str, tmp_path: Path) -> None:
    (diagnostic,) = doctor._ray(_profile(address, tmp_path))
    assert (diagnostic.level, "expected host:port" in diagnostic.message) == (Level.BAD, True)
