import io
import platform
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from orchestration.cli.run import Run
from orchestration.console import Console
from orchestration.definitions import build_definitions
from orchestration.defs.instance import open_instance, process_tags
from orchestration.graph.execution import Execution
from pipelines.core.errors import ThroughlineError
from tests.orchestration.conftest import NUMBERS, execution_of
from tests.orchestration.small.stages import KeepConfig, SmallProfile

Materialized = Callable[[], Execution]


class _Screen(Console):
    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(self.text)


def _run(profile: SmallProfile, instance: dg.DagsterInstance) -> tuple[Run, str]:
    screen = _Screen()
    run = Run(execution_of(profile), instance, screen)
    run.execute("everything", list(run._plan.graph.nodes.values()))
    return run, screen.text.getvalue()


def _events(instance: dg.DagsterInstance, asset: str) -> int:
    return len(instance.fetch_materializations(dg.AssetKey(asset), limit=1000).records)


@pytest.mark.slow
def test_one_run_brings_every_partition_up_to_date_and_a_second_does_nothing(
    profile: SmallProfile, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    profile.keep = KeepConfig(starts=str(starts), drop_below=3)
    run, shown = _run(profile, instance)
    assert sum(tally.computed for tally in run.tallies.values()) == 14
    assert "kept 00000  3/3 numbers" in shown
    assert "6 rows in, 4 out" in shown
    logged = [entry.user_message for entry in instance.all_logs(instance.get_runs()[0].run_id)]
    assert any("kept 00000  3/3 numbers" in message for message in logged), "the web interface shows it"
    assert instance.get_runs_count() == 1
    again, _ = _run(profile, instance)
    assert {tally.computed for tally in again.tallies.values()} == {0}
    assert instance.get_runs_count() == 1, "no run is recorded if nothing is to be done"
    assert len(starts.read_text().splitlines()) == len(NUMBERS)


@pytest.mark.slow
def test_unrecorded_outputs_are_recorded_without_starting_a_process(
    profile: SmallProfile, materialize_all: Materialized, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    materialize_all()
    starts = tmp_path / "starts"
    profile.keep = KeepConfig(starts=str(starts), drop_below=3)
    run, _ = _run(profile, instance)
    assert _events(instance, "kept") == len(NUMBERS)
    assert {tally.computed for tally in run.tallies.values()} == {0}
    assert not starts.exists()


@pytest.mark.slow
def test_a_failure_stops_the_run_with_one_sentence_and_keeps_finished_outputs(
    profile: SmallProfile, instance: dg.DagsterInstance
) -> None:
    profile.keep = KeepConfig(fail_at="00002")
    with pytest.raises(ThroughlineError, match=r"^part 00002: expected even numbers"):
        _run(profile, instance)
    assert _events(instance, "kept") == 2
    assert _events(instance, "total") == 0
    profile.keep = KeepConfig()
    run, _ = _run(profile, instance)
    assert run.tallies["kept"].computed == 1


@pytest.mark.slow
def test_the_evaluation_job_leaves_data_and_training_alone(profile: SmallProfile, instance: dg.DagsterInstance) -> None:
    execution = execution_of(profile)
    definitions = build_definitions(execution)
    result = definitions.resolve_job_def("evaluation_only").execute_in_process(instance=instance, raise_on_error=False)
    assert not result.success, "fails without checkpoints"
    assert _events(instance, "laion_index") == 0
    _run(profile, instance)
    assert (
        build_definitions(execution_of(profile))
        .resolve_job_def("evaluation_only")
        .execute_in_process(instance=instance)
        .success
    )


def test_a_run_whose_process_was_killed_does_not_block_the_queue(
    profile: SmallProfile, instance: dg.DagsterInstance
) -> None:
    job = build_definitions(execution_of(profile)).resolve_job_def("everything")
    dead = instance.create_run_for_job(job, tags={"throughline/process": f"{platform.node()} 999999999"})
    alive = instance.create_run_for_job(job, tags=process_tags())
    for run in (dead, alive):
        instance.report_dagster_event(
            dg.DagsterEvent(event_type_value=dg.DagsterEventType.PIPELINE_START.value, job_name=job.name), run.run_id
        )
    with open_instance(profile.home) as again:
        assert again.get_run_by_id(dead.run_id).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]
        assert again.get_run_by_id(alive.run_id).status is dg.DagsterRunStatus.STARTED  # type: ignore[union-attr]
