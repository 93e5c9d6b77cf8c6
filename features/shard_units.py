"""The shards of a part as units of work for latents and text features."""

from pathlib import Path

from pipelines.core.errors import ThroughlineError
from pipelines.runner.outputs import StageOutput
from pipelines.shards.reader import Shard


def shard_units(shards: StageOutput) -> dict[str, Path]:
    """Return unit name ("00000") -> tar file, in order."""
    return {path.stem.rpartition("-")[2]: path for path in shards.files(".tar")}


def open_shard(shards: StageOutput, path: Path) -> Shard:
    """Open a shard; raises ThroughlineError where its number of samples is not the manifest's."""
    shard = Shard(path)
    expected = shards.manifest.file(path.name).num_rows
    if expected is not None and len(shard) != expected:
        shard.close()
        raise ThroughlineError(
            f"{path}: {len(shard)} samples, manifest says {expected}; re-run shards for part "
            f"{shards.manifest.partition}"
        )
    return shard
