"""Looks into finished `latents` and `text_features` outputs without torch: their rows for a trace, NaN for a check."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.runner.checks import CheckResult
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import FoundRow, RowReader, RowSearch
from pipelines.shards.shard_rows import find_shard_rows

_MAX_FILES = 64
_MAX_LISTED = 5


def find_feature_rows(features: StageOutput, search: RowSearch) -> Iterator[FoundRow]:
    """Yield the wanted rows. A feature file has the keys of its shard, whose index is far smaller."""
    for shards in search.holding_inputs(features):
        for key, file, _ in find_shard_rows(shards, search):
            name = f"{features.manifest.stage}-{Path(file).stem.removeprefix('shard-')}.safetensors"
            yield FoundRow(key, name, {})


FEATURE_ROWS = RowReader(find_feature_rows, reads_inputs=True)


def check_finite(features: StageOutput) -> CheckResult:
    """Check that the first files of an output hold no NaN and no infinity."""
    from pipelines.core.safetensors_file import count_not_finite

    files = features.files(".safetensors")[:_MAX_FILES]
    bad = {path.name: count for path in files if (count := count_not_finite(path))}
    listed = [f"{name}: {count} values are NaN or infinite" for name, count in list(bad.items())[:_MAX_LISTED]]
    message = "; ".join(listed) or "every value is finite"
    return CheckResult(not bad, message, {"num_files": len(files), "num_bad_files": len(bad)})
