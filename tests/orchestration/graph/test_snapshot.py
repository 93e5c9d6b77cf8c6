"""A snapshot of the real graph, so that a change of its shape is visible in review."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from orchestration.definitions import build_definitions, build_execution
from orchestration.profiles.loading import load_profile

ROOT = Path(__file__).resolve().parents[3]

DEMO_GRAPH = """\
data | captions | part | images (identity) | caption_quality, conservation, digest
data | dataset | - | laion_index, latents (all), shards (all), text_features (all) | conservation, digest, duplicate_keys
data | images | part | laion_subset (identity) | conservation, digest
data | laion_index | - | - | conservation, digest
data | laion_index_parts | part | laion_index | -
data | laion_subset | part | laion_index_parts (identity) | conservation, digest
data | latents | part | shards (identity) | conservation, digest, finite
data | shards | part | captions (identity), images (identity) | conservation, digest
data | text_features | part | shards (identity) | conservation, digest, finite
evaluation | fusion_analysis | 7 keys | checkpoint (identity) | conservation, digest
evaluation | judge_calibration | - | captions (all), images (all), laion_index | conservation, digest, judge_tells_apart
evaluation | prompt_sets | - | - | conservation, digest
evaluation | report | - | judge_calibration, results | conservation, digest
evaluation | results | - | checkpoint (all), fusion_analysis (all), scores (all) | conservation, digest
evaluation | samples | 24 keys | checkpoint (static), prompt_sets | conservation, digest
evaluation | scores | 24 keys | prompt_sets, samples (identity) | conservation, digest, judge_answers, judge_format
training | checkpoint | 7 keys | dataset | conservation, digest, loss, same_order
training | pipeline_export | 7 keys | checkpoint (identity) | conservation, digest
"""  # noqa: E501 - one asset per line


def _describe(definitions: dg.Definitions) -> str:
    graph = definitions.resolve_asset_graph()
    lines = []
    for key in graph.toposorted_asset_keys:
        node = graph.get(key)
        parts = node.partitions_def
        kind = (
            "-"
            if parts is None
            else parts.name
            if isinstance(parts, dg.DynamicPartitionsDefinition)
            else (f"{len(parts.get_partition_keys())} keys")
        )
        deps = ", ".join(f"{parent.to_user_string()}{_mapping(node, parent)}" for parent in sorted(node.parent_keys))
        checks = ", ".join(sorted(check.name for check in graph.get_check_keys_for_assets({key})))
        lines.append(f"{node.group_name} | {key.to_user_string()} | {kind} | {deps or '-'} | {checks or '-'}")
    return "\n".join(sorted(lines)) + "\n"


def _mapping(node: object, parent: dg.AssetKey) -> str:
    mapping = node.partition_mappings.get(parent)  # type: ignore[attr-defined]
    return "" if mapping is None else f" ({type(mapping).__name__.removesuffix('PartitionMapping').lower()})"


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    return build_definitions(build_execution(load_profile("demo", tmp_path_factory.mktemp("home"))))


def test_the_graph_matches_the_snapshot(definitions: dg.Definitions) -> None:
    assert _describe(definitions) == DEMO_GRAPH


def test_a_selection_over_all_parts_comes_before_the_downloads(tmp_path: Path) -> None:
    changed = [
        line.replace("laion_index, latents (all), shards", "laion_index, laion_selection, latents (all), shards")
        .replace("images | part | laion_subset (identity)", "images | part | laion_selection_parts (identity)")
        for line in DEMO_GRAPH.splitlines()
    ]  # fmt: skip
    selection = [
        "data | laion_selection | - | laion_index, laion_subset (all) | conservation, digest",
        "data | laion_selection_parts | part | laion_selection | -",
    ]
    profile = load_profile("demo", tmp_path, ["laion_selection.limit=100"])
    described = _describe(build_definitions(build_execution(profile)))
    assert described.splitlines() == sorted([*changed, *selection])


def test_there_is_a_job_for_the_evaluation_and_one_for_everything(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)
    assert {"evaluation_only", "everything"} <= {job.name for job in definitions.resolve_all_job_defs()}


def test_definitions_load_in_a_fresh_process_without_torch_vllm_ray_or_transformers() -> None:
    code = (
        "import sys\nfrom orchestration.definitions import definitions\n"
        "definitions().get_repository_def()\n"
        "heavy = ('torch', 'vllm', 'ray', 'transformers', 'diffusers', 'accelerate', 'pyarrow', 'PIL')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_asset_has_a_description_and_a_code_version(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        assert graph.get(key).description and graph.get(key).code_version, key
