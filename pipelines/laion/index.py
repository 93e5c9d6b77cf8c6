"""Stage ``laion_index``: registers the LAION metadata files as parts and checks their schemas.

Each part has its own file in the output, its entry, so that a stage that reads one entry depends on no other part. Rows
are read by `pipelines.laion.subset`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from pipelines.core.config import FrozenConfig
from pipelines.core.digest import canonical_json
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import SourceFile
from pipelines.laion.config import LaionIndexConfig, SourceContent
from pipelines.laion.sources import SUFFIX, SourcePlace, find_sources, size_of
from pipelines.runner.outputs import StageOutput
from pipelines.runner.rows import NO_ROWS
from pipelines.runner.stage import Stage
from pipelines.runner.units import StageResult, StageRun
from pipelines.storage.remote_files import RangeReader, RemoteFile

_ENTRY_SUFFIX = ".part.json"
ENTRY_FILE = "{partition}" + _ENTRY_SUFFIX
"""File name of a part's entry in the output."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_MAX_KEY_CHARS = 40
_DIGEST_CHARS = 12


class Part(FrozenConfig):
    """One metadata file: its part, its content, and the columns that fill its roles."""

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


def part_key(name: str) -> str:
    """Return the part key of a metadata file.

    It depends only on the file's name, so that adding or removing files leaves other parts unchanged: the name without
    ``.parquet`` if it is short and plain, else its beginning and a digest of the whole name.
    """
    stem = name.removesuffix(SUFFIX)
    if stem != name and len(stem) <= _MAX_KEY_CHARS and _PLAIN_NAME.fullmatch(stem):
        return stem
    digest = hashlib.blake2b(name.encode()).hexdigest()[:_DIGEST_CHARS]
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[: _MAX_KEY_CHARS - _DIGEST_CHARS - 1].strip("-")
    return f"{plain or 'part'}-{digest}"


def part_names(index: StageOutput) -> tuple[str, ...]:
    """Return the parts that an index registers, sorted."""
    paths = [entry.path for entry in index.manifest.files]
    return tuple(sorted(path.removesuffix(_ENTRY_SUFFIX) for path in paths if path.endswith(_ENTRY_SUFFIX)))


def entry_of(index: StageOutput, part: str) -> StageOutput:
    """Return the entry of one part as an input; raises ThroughlineError where the index has none."""
    names = part_names(index)
    if part not in names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ThroughlineError(f"part {part}: the index registers {len(names)} parts: {shown}")
    return index.only_file(ENTRY_FILE.format(partition=part))


def known_entries(config: LaionIndexConfig, earlier: Iterable[StageOutput]) -> dict[str, StageOutput | None]:
    """Return part -> its entry in an earlier index that registered the same file, or None.

    It tells which parts of a changed folder are unchanged before the index is recomputed.
    """
    holders = {(item.name, item.sha256): index for index in earlier for item in index.manifest.sources}
    found: dict[str, StageOutput | None] = {}
    for content in config.content:
        index, part = holders.get((content.name, content.sha256)), part_key(content.name)
        found[part] = entry_of(index, part) if index is not None else None
    return found


def read_part(entry: StageOutput) -> Part:
    """Return the part that an entry describes; raises ThroughlineError where it is not a readable entry."""
    if entry.only is None:
        raise ThroughlineError(f"{entry.folder}: expected the entry of one part, got the whole index")
    path = entry.path(entry.only)
    try:
        return Part.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ThroughlineError(f"{path}: not an entry of the index; re-run laion_index") from error


def read_parts(index: StageOutput) -> list[Part]:
    """Return the parts that an index registers, sorted; raises ThroughlineError where an entry is not readable."""
    return [read_part(index.only_file(ENTRY_FILE.format(partition=part))) for part in part_names(index)]


def produce(run: StageRun[LaionIndexConfig]) -> StageResult:
    config = run.config
    found = find_sources(config.source)
    parts: list[Part] = []
    servers: dict[str, dict[str, str]] = {}
    for content in sorted(config.content, key=lambda item: item.name):
        place = found.get(content.name)
        if place is None or size_of(place) != content.num_bytes:
            raise ThroughlineError(
                f"{content.name}: missing or changed under {', '.join(config.source)}; scan it again"
            )
        parts.append(_describe(content, place))
        if isinstance(place, RemoteFile):
            servers[content.name] = {"url": place.url, "etag": place.etag}
    for key, count in Counter(part.part for part in parts).items():
        if count > 1:
            names = ", ".join(part.name for part in parts if part.part == key)
            raise ThroughlineError(f"{names}: these metadata files all map to part {key}; rename one of them")
    num_rows = sum(part.num_rows for part in parts)
    if not run.is_finished("parts"):
        with run.unit("parts") as unit:
            for part in parts:
                unit.write(ENTRY_FILE.format(partition=part.part), canonical_json(part.model_dump()) + b"\n")
            unit.account(rows_in=num_rows, rows_out=num_rows)
    return StageResult(
        summary={"num_parts": len(parts), "num_rows": num_rows},
        sources=[SourceFile(name=part.name, sha256=part.sha256, num_bytes=part.num_bytes) for part in parts],
        measurements={"servers": servers} if servers else {},
    )


def _describe(content: SourceContent, place: SourcePlace) -> Part:
    from pipelines.laion.schema import open_metadata, resolve_columns

    # Of a remote file only the footer is fetched.
    with open_metadata(place if isinstance(place, Path) else RangeReader(place)) as metadata:
        columns = resolve_columns(metadata.schema_arrow, place)
        num_rows = metadata.metadata.num_rows
    return Part(part=part_key(content.name), **content.model_dump(), num_rows=num_rows, columns=columns)


STAGE = Stage(
    name="laion_index",
    code_version="3",
    config_type=LaionIndexConfig,
    produce=produce,
    description="The LAION metadata files by content digest; each becomes a part.",
    rows=NO_ROWS,
    checks=(),
    preview=None,
    funnel_label=None,
    cost=None,
)
