from pathlib import Path

import pytest

from orchestration.graph.nodes import GRAPH
from orchestration.launch.launcher import AccelerateLaunch
from orchestration.profiles.library import PROFILES
from orchestration.profiles.loading import load_profile
from orchestration.profiles.model_pins import LOCAL
from pipelines.core.errors import ThroughlineError


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_builds_and_configures_every_stage(name: str, tmp_path: Path) -> None:
    profile = load_profile(name, tmp_path)
    for node in GRAPH.enabled(profile).nodes.values():
        if node.name != "laion_index":  # needs the metadata files themselves
            config = node.configure(profile, {"checkpoint": "joint"}.get(node.name))
            assert type(config) is node.stage.config_type, node.name


def test_estimated_gates_add_their_analysis_to_graph_and_report(tmp_path: Path) -> None:
    names = '["time_wise", "joint"]'
    changes = [f"strategies={names}", f"arms={names}", "results.baseline=time_wise"]
    plain = GRAPH.enabled(load_profile("demo", tmp_path, changes))
    assert "trajectory_analysis" not in plain.nodes
    profile = load_profile("demo", tmp_path, [*changes, "model.gate_signal=estimated"])
    graph = GRAPH.enabled(profile)
    node = graph["trajectory_analysis"]
    assert type(node.configure(profile, "joint")) is node.stage.config_type
    assert "trajectory_analysis" in graph.upstream({"report"})
    guided = load_profile(
        "demo", tmp_path, [*changes, "model.gate_signal=estimated", "samples.sampler.guidance_scale=5"]
    )
    assert node.configure(guided, "joint") == node.configure(profile, "joint")


def test_paper_is_the_published_scale(tmp_path: Path) -> None:
    profile = load_profile("paper", tmp_path)
    training, model = profile.training, profile.model
    assert (training.batch_size, training.steps, training.learning_rate) == (512, 500_000, 1e-4)
    assert (model.hidden_size, model.num_blocks, model.num_text_layers) == (2048, 24, 36)
    assert (profile.samples.sampler.num_steps, profile.samples.sampler.guidance_scale) == (50, 6.0)
    launch = profile.launch("checkpoint")
    assert isinstance(launch, AccelerateLaunch) and launch.num_processes == training.num_processes


def test_the_papers_urls_are_deduplicated_over_all_parts(tmp_path: Path) -> None:
    profile = load_profile("paper", tmp_path)
    assert profile.laion_selection is not None and profile.laion_selection.drop_duplicate_urls
    assert not profile.laion_subset.drop_duplicate_urls, "the order of a part's rows would decide which one stays"
    assert load_profile("single_gpu", tmp_path).laion_selection is None
    sampled = load_profile("single_gpu", tmp_path, ["laion_selection.limit=1000"]).laion_selection
    assert sampled is not None and sampled.limit == 1000


def test_unpinned_models_are_reported(tmp_path: Path) -> None:
    warnings = load_profile("paper", tmp_path, ["launches.checkpoint.main_process_ip=10.0.0.1"]).warnings()
    assert warnings and all("is not pinned to a commit" in warning for warning in warnings)
    assert load_profile("demo", tmp_path).warnings() == []
    assert load_profile("demo", tmp_path).text_encoder.revision == LOCAL


def test_a_process_count_that_differs_from_the_launch_is_reported(tmp_path: Path) -> None:
    changes = ["training.num_processes=2"]
    assert load_profile("demo", tmp_path, changes).warnings() == [
        "training.num_processes is 2, launches.checkpoint starts 1; set training.num_processes and "
        "launches.checkpoint.num_processes to the same number"
    ]
    assert load_profile("demo", tmp_path, [*changes, "launches.checkpoint.num_processes=2"]).warnings() == []


def test_an_unreachable_main_process_is_reported(tmp_path: Path) -> None:
    (warning,) = (text for text in load_profile("paper", tmp_path).warnings() if "pinned" not in text)
    assert warning == (
        "launches.checkpoint.main_process_ip is 127.0.0.1, which only machine 0 of num_machines=8 can reach; set it to "
        "that machine's address"
    )


def test_the_demos_web_server_must_be_an_allowed_host(tmp_path: Path) -> None:
    with pytest.raises(ThroughlineError, match=r"allowed_private_hosts is .*, expected .* the demo's web server, 127"):
        load_profile("demo", tmp_path, ["world.port=8766"])
    both = ["world.port=8766", 'images.fetch.allowed_private_hosts=["127.0.0.1:8766"]']
    profile = load_profile("demo", tmp_path, both)
    assert profile.world is not None and profile.world.port == 8766


def test_fields_are_set_by_path(tmp_path: Path) -> None:
    changes = ["training.steps=7", "training.warmup_steps=1", 'source=["/data/laion"]', "name=mine"]
    profile = load_profile("single_gpu", tmp_path, changes)
    assert (profile.training.steps, profile.source, profile.name) == (7, ("/data/laion",), "mine")


def test_a_cluster_is_named_on_the_command_line_and_changes_no_result(tmp_path: Path) -> None:
    changes = ["images.workers.ray_address=auto", "images.workers.cpus_per_unit=4", "shards.workers.ray_address=auto"]
    here, on_ray = load_profile("single_gpu", tmp_path), load_profile("single_gpu", tmp_path, changes)
    assert (on_ray.images.workers.ray_address, on_ray.images.workers.cpus_per_unit) == ("auto", 4)
    for name in ("images", "shards"):
        stage = GRAPH[name].stage
        assert stage.fingerprint(getattr(on_ray, name), {}) == stage.fingerprint(getattr(here, name), {})
    assert {load_profile("demo", tmp_path).images.workers.ray_address, here.images.workers.ray_address} == {None}


def test_the_subsets_deny_lists_apply_to_the_download(tmp_path: Path) -> None:
    opt_outs, denied = (f'{{"path": "{name}.txt", "sha256": "{name[0] * 64}"}}' for name in ("all", "before"))
    changes = [f"laion_subset.opt_outs={opt_outs}", f"laion_subset.domains_denied={opt_outs}"]
    profile = load_profile("single_gpu", tmp_path, [*changes, f"images.fetch.domains_denied={denied}"])
    fetch = GRAPH["images"].configure(profile, None).fetch
    assert fetch.opt_outs == profile.laion_subset.opt_outs
    assert fetch.domains_denied == profile.images.fetch.domains_denied != profile.laion_subset.domains_denied
    assert fetch.urls_denied is None
    plain = load_profile("single_gpu", tmp_path)
    assert GRAPH["images"].configure(plain, None) == plain.images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("images.workers.cpus_per_unit=0", r"images\.workers\.cpus_per_unit: .*greater than 0"),
        ("training.stepz=3", r"training\.stepz: Extra inputs are not permitted"),
        ("training.steps=no", r"training\.steps: .*integer.*, found \"no\"$"),
        ("training.steps=0", r"training\.steps: Input should be greater than 0, found 0$"),
        ("laion_subset.where=width >", r"laion_subset\.where: position 7: incomplete at >"),
        ("training.steps", "expected field.field=value"),
        ('arms=["uniform","jointt"]', "unknown strategy"),
        ('strategies=["uniform"]', "arm penultimate needs strategy penultimate, which is not trained"),
        ('arms=["joint"]', "^profile single_gpu: results.baseline penultimate is not among the arms"),
        ("latents.autoencoder.revision=main", r"latents\.autoencoder is .*, the profile's is"),
        (
            "model.gate_signal=estimated",
            "needs time gates, which penultimate, uniform, static, fuse_dit, depth_wise la",
        ),
        ("model.latent_size=64", "requires 512 px, images are 256 px"),
        (f'judge_calibration.withdrawn={{"path": "a", "sha256": "{"0" * 64}"}}', "set only dataset.withdrawn"),
    ],
)
def test_an_invalid_change_is_one_sentence(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ThroughlineError, match=message) as caught:
        load_profile("single_gpu", tmp_path, [change])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["single_gpu", "paper"])
def test_gpu_profiles_put_every_model_on_the_gpu(name: str, tmp_path: Path) -> None:
    profile = load_profile(name, tmp_path)
    assert (profile.latents.device, profile.training.device, profile.samples.device) == ("cuda", "cuda", "cuda")


def test_a_toml_file_overrides_a_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "single_gpu"\nname = "mine"\n[training]\nsteps = 9\nwarmup_steps = 1\n')
    profile = load_profile(str(path), tmp_path)
    assert (profile.name, profile.training.steps) == ("mine", 9)
    path.write_text("[training]\nsteps = 9\n")
    with pytest.raises(ThroughlineError, match="start the file with base = "):
        load_profile(str(path), tmp_path)
    with pytest.raises(
        ThroughlineError, match=r"none.toml: can't be read as a profile: no such file or folder; name another"
    ):
        load_profile(str(tmp_path / "none.toml"), tmp_path)
    with pytest.raises(ThroughlineError, match="choose one of demo, single_gpu, paper"):
        load_profile("no_such_profile", tmp_path)


def test_a_profile_survives_serialization(tmp_path: Path) -> None:
    for name in PROFILES:
        profile = load_profile(name, tmp_path)
        assert type(profile).model_validate(profile.model_dump(mode="json")) == profile
