"""Stage ``laion_index``: registers the LAION metadata files, checks their schema, and numbers them as parts.

Rows are left alone here; `pipelines.laion_subset` reads them.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config import FrozenConfig
from pipelines.digest import canonical_json
from pipelines.errors import ThroughlineError
from pipelines.manifest import SourceFile
from pipelines.remote_files import RangeReader, RemoteFile
from pipelines.source_files import SourcePlace, find_sources, size_of
from pipelines.stage import Stage, StageOutput, StageResult, StageRun
from pipelines.stage_configs import LaionIndexConfig, SourceContent

PARTS_FILE = "parts.json"


class Part(FrozenConfig):
    """One metadata file: its number, its content, and which of its columns plays which role."""

    part: str
    name: str
    sha256: str
    num_bytes: int
    num_rows: int
    columns: dict[str, str]
    """Role (url, text, width, ...) -> column name in the file."""

    @property
    def content(self) -> SourceContent:
        return SourceContent(name=self.name, sha256=self.sha256, num_bytes=self.num_bytes)


def read_parts(index: StageOutput) -> list[Part]:
    """Return the parts that an index registers, in order; raises ThroughlineError where its file is not readable."""
    path = index.path(PARTS_FILE)
    try:
        return [Part.model_validate(item) for item in json.loads(path.read_bytes())]
    except (ValueError, ValidationError) as error:
        raise ThroughlineError(f"{path}: not a list of parts; run laion_index again") from error


def find_part(index: StageOutput, part: str | None) -> Part:
    """Return the part of that number; raises ThroughlineError where the index has none."""
    parts = read_parts(index)
    for item in parts:
        if item.part == part:
            return item
    raise ThroughlineError(f"part {part}: the index registers {len(parts)} parts, 00000 to {len(parts) - 1:05d}")


def produce(run: StageRun[LaionIndexConfig]) -> StageResult:
    config = run.config
    found = find_sources(config.source)
    parts: list[dict[str, Any]] = []
    servers: dict[str, dict[str, str]] = {}
    for number, content in enumerate(sorted(config.content, key=lambda item: item.name)):
        place = found.get(content.name)
        if place is None or size_of(place) != content.num_bytes:
            raise ThroughlineError(
                f"{content.name}: missing or changed under {', '.join(config.source)}; scan it again"
            )
        parts.append(_describe(f"{number:05d}", content, place).model_dump())
        if isinstance(place, RemoteFile):
            servers[content.name] = {"url": place.url, "etag": place.etag}
    num_rows = sum(part["num_rows"] for part in parts)
    if not run.is_finished("parts"):
        with run.unit("parts") as unit:
            unit.write(PARTS_FILE, canonical_json(parts) + b"\n", num_rows=len(parts))
            unit.account(rows_in=num_rows, rows_out=num_rows)
    return StageResult(
        summary={"num_parts": len(parts), "num_rows": num_rows},
        sources=[SourceFile(name=part["name"], sha256=part["sha256"], num_bytes=part["num_bytes"]) for part in parts],
        measurements={"servers": servers} if servers else {},
    )


def _describe(number: str, content: SourceContent, place: SourcePlace) -> Part:
    from pipelines.laion_schema import open_metadata, resolve_columns

    # Of a file on a server the footer alone is asked for.
    with open_metadata(place if isinstance(place, Path) else RangeReader(place)) as metadata:
        columns = resolve_columns(metadata.schema_arrow, place)
        num_rows = metadata.metadata.num_rows
    return Part(part=number, **content.model_dump(), num_rows=num_rows, columns=columns)


STAGE = Stage(name="laion_index", code_version="2", config_type=LaionIndexConfig, produce=produce)

if __name__ == "__main__":
    from pipelines.laion_index import STAGE as stage

    stage.main()
