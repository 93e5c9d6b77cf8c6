"""Finds the outputs that a Dagster run recorded."""

from pathlib import Path

from dagster import AssetMaterialization, DagsterEventType

from orchestration.defs.file_events import FILE_TAG, STAGE_TAG
from orchestration.defs.instance import open_instance
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import InputRef


def refs_of_run(home: Path, run_id: str) -> list[InputRef]:
    """Return the outputs that a run materialized; `run_id` may be the first digits of its id.

    Raises ThroughlineError unless exactly one run matches and it materialized something.
    """
    with open_instance(home) as instance:
        runs = [run for run in instance.get_runs() if run.run_id.startswith(run_id)]
        if len(runs) != 1:
            raise ThroughlineError(
                f"{run_id}: neither a data version nor the start of one run's id ({len(runs)} match)"
            )
        entries = instance.all_logs(runs[0].run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION)
        events = [entry.asset_materialization for entry in entries]
        refs = [_ref_of(event) for event in events if event is not None]
    if not refs:
        raise ThroughlineError(f"run {runs[0].run_id} materialized nothing")
    return refs


def _ref_of(event: AssetMaterialization) -> InputRef:
    tags = event.tags or {}
    version, file = tags.get("dagster/data_version", ""), tags.get(FILE_TAG)
    if file is not None:
        return InputRef(stage=tags[STAGE_TAG], partition=None, data_version=version, file=file)
    return InputRef(stage=event.asset_key.to_user_string(), partition=event.partition, data_version=version)
