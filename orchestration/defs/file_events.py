"""Dagster events for file-level inputs.

Dagster has no edge to a file. So an extra asset connects an output with the partitions that read single files of it: it
has one partition per file, with the file's SHA-256 as data version.
"""

from collections.abc import Iterator, Mapping
from hashlib import sha256

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    NULL_EVENT_POINTER,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)

from orchestration.graph.graph import Input
from orchestration.graph.resolution import Plan
from pipelines.core.errors import ThroughlineError

STAGE_TAG, FILE_TAG = "throughline/stage", "throughline/file"
"""Tags of a materialization of a single file: the stage and the file's name."""


def files_asset_name(asset: str) -> str:
    """Return the name of the asset whose partitions are the single files of an asset's output."""
    return f"{asset}_parts"


def dagster_name(item: Input) -> str:
    """Return the Dagster asset that an input comes from."""
    return item.asset if item.file is None else files_asset_name(item.asset)


def input_tags(instance: dg.DagsterInstance, asset: str, versions: Mapping[str | None, str]) -> dict[str, str]:
    """Return the provenance tags of an input, from the data versions that were read by partition.

    These are the tags that Dagster itself writes for a run of one partition: the digest of the versions in the order of
    the partitions, and the last event of any partition.
    """
    key = dg.AssetKey(asset)
    (record,) = instance.get_asset_records([key]) or (None,)
    last = record.asset_entry.last_materialization_record if record is not None else None
    in_order = [version for _, version in sorted(versions.items(), key=lambda item: item[0] or "")]
    is_partitioned = list(versions) != [None]
    return {
        get_input_data_version_tag(key): sha256("".join(in_order).encode()).hexdigest()
        if is_partitioned
        else in_order[0],
        get_input_event_pointer_tag(key): NULL_EVENT_POINTER if last is None else str(last.storage_id),
    }


def file_materialization(
    instance: dg.DagsterInstance, plan: Plan, asset: str, partition: str
) -> dg.AssetMaterialization:
    """Return the event for the file of an asset's output that one partition reads.

    Raises ThroughlineError if the asset is not finished, or has no such file.
    """
    output = plan.task(asset).output
    if output is None:
        raise ThroughlineError(f"{asset} is not finished; materialize it first")
    file = plan.graph.file_input(asset).resolve(output, partition)
    return dg.AssetMaterialization(
        asset_key=files_asset_name(asset),
        partition=partition,
        metadata={"file": dg.MetadataValue.path(str(file.address)), "data_version": file.data_version},
        tags={
            DATA_VERSION_TAG: file.data_version,
            DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
            CODE_VERSION_TAG: output.manifest.code_version,
            STAGE_TAG: asset,
            FILE_TAG: file.address.name,
            **input_tags(instance, asset, {None: output.data_version}),
        },
    )


def file_result(event: dg.AssetMaterialization) -> dg.MaterializeResult:
    """Return a `file_materialization` as the result of a run of one partition, for Dagster to record.

    Logging it as an event would need automatic events disabled, which affects all assets of the run.
    """
    tags = event.tags or {}
    return dg.MaterializeResult(
        asset_key=event.asset_key,
        metadata=event.metadata,
        data_version=dg.DataVersion(tags[DATA_VERSION_TAG]),
        tags={name: tags[name] for name in (STAGE_TAG, FILE_TAG)},
    )


def unrecorded_files(instance: dg.DagsterInstance, plan: Plan, asset: str) -> Iterator[dg.AssetMaterialization]:
    """Yield the missing file events of a finished asset whose files are read one by one.

    An unchanged file of a changed output needs a new event too: without it Dagster would call the file stale.
    """
    reader = plan.graph.file_reader(asset)
    if reader is None or plan.task(asset).output is None:
        return
    names = (DATA_VERSION_TAG, CODE_VERSION_TAG, get_input_data_version_tag(dg.AssetKey(asset)))
    for partition in filter(None, plan.partitions(reader.name)):
        event = file_materialization(instance, plan, asset, partition)
        record = instance.get_latest_data_version_record(event.asset_key, partition_key=partition)
        known = record.asset_materialization.tags if record and record.asset_materialization else None
        if known is None or any(known.get(name) != (event.tags or {})[name] for name in names):
            yield event
