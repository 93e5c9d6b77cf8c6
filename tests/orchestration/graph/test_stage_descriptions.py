"""Every stage describes itself, and every tool reads that description."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from evaluation.report.data import funnel
from evaluation.report.lineage import collect, stages_of
from orchestration.cost.estimate import estimate
from orchestration.definitions import build_definitions
from orchestration.graph.execution import Execution
from orchestration.graph.graph import Graph, Group, Input, Node
from orchestration.graph.nodes import GRAPH
from orchestration.graph.resolution import Plan
from orchestration.lineage.trace import Outputs, trace
from orchestration.profiles.loading import load_profile
from pipelines.runner.checks import Check, SiblingsCheck
from pipelines.runner.rows import Rowless, RowReader, RowTable, SourceTable
from tests.orchestration.cost.test_estimate import ROUND, inputs_of
from tests.orchestration.small.stages import SMALL_GRAPH, SmallProfile
from tests.orchestration.small.toy import ToyConfig, toy_key

FUNNEL = [
    ("laion_subset", "Rows that pass the filters"),
    ("laion_selection", "Rows kept of all parts together"),
    ("images", "Pictures downloaded and decoded"),
    ("captions", "Pictures captioned"),
    ("shards", "Pairs written to shards"),
    ("dataset", "Samples to train on"),
]
"""The labels enter the bytes of finished reports."""
REPORT_ORDER = [
    "laion_index", "laion_subset", "laion_selection", "images", "captions", "shards", "latents", "text_features",
    "dataset", "checkpoint", "prompt_sets", "samples", "scores", "judge_calibration", "fusion_analysis",
    "trajectory_analysis", "results",
]  # fmt: skip
"""Like the labels, the order of stages enters the bytes of finished reports."""


@pytest.mark.parametrize("node", GRAPH.nodes.values(), ids=lambda node: node.name)
def test_every_stage_describes_itself(node: Node) -> None:
    stage = node.stage
    assert stage.description.endswith(".") and len(stage.description) > 10
    assert isinstance(stage.rows, RowTable | SourceTable | RowReader | Rowless)
    assert all(isinstance(check, Check | SiblingsCheck) and check.description for check in stage.checks)
    names = ["conservation", "digest", *(check.name for check in stage.checks)]
    assert len(set(names)) == len(names)
    assert stage.preview is None or callable(stage.preview)
    assert stage.funnel_label is None or stage.funnel_label
    assert stage.cost is None or callable(stage.cost)


def test_the_report_lists_stages_and_funnel_steps_in_the_order_of_its_finished_reports(tmp_path: Path) -> None:
    profile = load_profile("demo", tmp_path)
    config = GRAPH["report"].configure(profile, None)
    stages = list(stages_of({}, config.stages).values())  # type: ignore[attr-defined]
    assert [stage.name for stage in stages if stage.name not in ("pipeline_export", "report")] == REPORT_ORDER
    assert [(stage.name, stage.funnel_label) for stage in stages if stage.funnel_label] == FUNNEL
    stage = GRAPH["report"].stage
    assert stage.fingerprint(config, {}) == stage.fingerprint(profile.report, {}), "finished reports are still found"


TOY = Node(
    name="toy",
    module="tests.orchestration.small.toy",
    group=Group.DATA,
    configure=lambda profile, _: ToyConfig(),
    inputs=(Input(name="index", asset="laion_index"),),
)


@pytest.fixture
def toy(profile: SmallProfile, materialize_all: Callable[[], Execution]) -> Execution:
    """The small graph with one more stage, which is finished."""
    materialize_all()
    plan = Plan(Graph((*SMALL_GRAPH.nodes.values(), TOY)), profile, profile.output_root)
    task = plan.task("toy")
    assert task.config is not None and task.inputs is not None
    TOY.stage.run(task.config, task.inputs, plan.output_root)
    return Execution(plan, profile.log_folder)


def test_trace_finds_the_rows_and_drops_of_a_new_stage(toy: Execution) -> None:
    outputs = Outputs.load(toy.plan.output_root, toy.plan.graph)
    found = trace(outputs, [toy_key(0), toy_key(2)])
    (holder,) = (item for item in found.holders if item.stage == "toy")
    assert holder.keys == {toy_key(2)}
    assert dict(holder.files) == {"keys.json": 1} and holder.notes == {toy_key(2): {"line": 1}}
    assert [(drop.holder.stage, drop.sample_key, drop.reason) for drop in found.drops] == [("toy", toy_key(0), "first")]


def test_the_report_shows_a_new_stage_as_a_step_of_its_funnel(toy: Execution) -> None:
    output = toy.plan.task("toy").output
    assert output is not None
    lineage = collect([output], ["toy"])
    assert list(lineage) == ["toy", "laion_index"]
    steps = funnel(lineage, stages_of(lineage, [TOY.module]))
    assert ("Toys kept", 3, 2, [("first", 1)]) in [(s.label, s.rows_in, s.rows_out, s.dropped) for s in steps]


def test_the_estimate_includes_a_new_stage(tmp_path: Path) -> None:
    node = replace(TOY, inputs=(Input(name="shards", asset="shards"),))
    stages = estimate(inputs_of(tmp_path, *ROUND), graph=Graph((*GRAPH.nodes.values(), node))).stages
    assert (stages[-1].stage, stages[-1].rows_in.value, stages[-1].bytes_out.value) == ("toy", 100, 1000)


def test_dagster_runs_the_checks_of_a_new_stage_and_shows_its_preview(
    toy: Execution, instance: dg.DagsterInstance
) -> None:
    definitions = build_definitions(toy)
    job = definitions.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, asset_selection=[dg.AssetKey("toy")])
    evaluations = {item.check_name: item for item in result.get_asset_check_evaluations()}
    assert set(evaluations) == {"conservation", "digest", "not_empty", "alone"}
    assert all(item.passed for item in evaluations.values())
    assert evaluations["not_empty"].metadata["num_keys"].value == 2
    (materialization,) = result.asset_materializations_for_node("toy")
    assert materialization.metadata["preview"].value == "**toy** from ['index']"
    assert definitions.resolve_asset_graph().get(dg.AssetKey("toy")).description == "A few keys."
