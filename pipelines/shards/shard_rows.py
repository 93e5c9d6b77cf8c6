"""Finds sample keys in finished shards by their indexes, without reading a tar."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import FoundRow, RowSearch
from pipelines.shards.format import index_path, read_index


def find_shard_rows(shards: StageOutput, search: RowSearch) -> Iterator[FoundRow]:
    """Yield the wanted rows; from an object store it fetches indexes alone, and only where rows may be."""
    if not search.may_hold(shards):
        return
    for entry in shards.manifest.files:
        if entry.path.endswith(".tar"):
            index = read_index(shards.path(index_path(Path(entry.path)).name, alone=True))
            yield from (FoundRow(key, entry.path, {}) for key in index.keys if key in search.keys)
