"""Columns of LAION metadata: their names in the published tables, their types, and the schema of a subset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.core.errors import ThroughlineError
from pipelines.storage.remote_files import RangeReader


@dataclass(frozen=True)
class Column:
    """A role, the column names that fill it (case-insensitive), and the kinds of type it accepts."""

    role: str
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    required: bool = False


# LAION-400M and LAION-5B have URL, TEXT, WIDTH, LANGUAGE; Re-LAION url and caption; DataComp original_width and
# clip_l14_similarity_score; the aesthetic tables aesthetic (v1), AESTHETIC_SCORE (v2) or prediction (tags).
COLUMNS = (
    Column("url", ("url",), ("string",), required=True),
    Column("text", ("text", "caption", "alt_text"), ("string",), required=True),
    Column("width", ("width", "original_width"), ("integer", "floating")),
    Column("height", ("height", "original_height"), ("integer", "floating")),
    Column("similarity", ("similarity", "clip_b32_similarity_score", "clip_similarity_vitb32"), ("floating",)),
    Column("similarity_l14", ("clip_l14_similarity_score", "clip_similarity_vitl14"), ("floating",)),
    Column(
        "aesthetic", ("aesthetic", "aesthetic_score", "prediction", "aesthetic_score_laion_v2"), ("floating", "integer")
    ),
    Column("pwatermark", ("pwatermark",), ("floating", "integer")),
    Column("punsafe", ("punsafe",), ("floating", "integer")),
    Column("nsfw", ("nsfw",), ("string",)),
    Column("language", ("language", "lang", "detected_language"), ("string",)),
    Column("license", ("license",), ("string",)),
    Column("sha256", ("sha256",), ("string",)),
)
ROLE_TYPES: Mapping[str, pa.DataType] = {
    column.role: pa.string() if "string" in column.kinds else pa.float64() for column in COLUMNS
}
"""Role -> type that the rules read it as."""
LABELS = ("nsfw", "language", "license")
"""Roles with few distinct values: read as dictionaries, so that rules test each value once."""

SUBSET_SCHEMA = pa.schema(
    [
        pa.field("sample_key", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("alt_text", pa.string(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("similarity", pa.float64()),
        pa.field("aesthetic", pa.float64()),
        pa.field("pwatermark", pa.float64()),
        pa.field("punsafe", pa.float64()),
        pa.field("nsfw", pa.string()),
        pa.field("language", pa.string()),
        pa.field("license", pa.string()),
        # SHA-256 of the image as the source table states it (DataComp), or null.
        pa.field("expected_sha256", pa.string()),
        pa.field("source_row", pa.int64(), nullable=False),
    ]
)


_READABLE = ("string", "integer", "floating", "bool", "null")


def _kind(data_type: pa.DataType) -> str:
    if pa.types.is_dictionary(data_type):
        data_type = data_type.value_type
    if pa.types.is_string(data_type) or pa.types.is_large_string(data_type) or pa.types.is_string_view(data_type):
        return "string"
    if pa.types.is_integer(data_type):
        return "integer"
    if pa.types.is_floating(data_type):
        return "floating"
    if pa.types.is_null(data_type):
        return "null"
    return str(data_type)


def find_column(name: str, schema: pa.Schema, roles: Mapping[str, str]) -> str:
    """Return the column of a file that a condition means by a name; `roles` are role -> column.

    A name in double quotes is first compared exactly, with the columns. Then case does not count: a name is that of a
    role, of a role's column or of another column, in this order. Raises ThroughlineError where there is no such column,
    more than one, or one of a type that no condition reads.
    """
    is_quoted = name.startswith('"')
    exact = name[1:-1] if is_quoted else name
    lower = exact.lower()
    if is_quoted and exact in schema.names:
        found = [exact]
    elif lower in roles:
        found = [roles[lower]]
    else:
        found = [column for column in schema.names if column.lower() == lower]
        found = [column for column in found if column in roles.values()] or found
    if not found:
        known = sorted({*roles, *(field.name.lower() for field in schema if _kind(field.type) in _READABLE)})
        raise ThroughlineError(f"no column {name}; known: {', '.join(known)}")
    if len(found) > 1:
        raise ThroughlineError(
            f"columns {', '.join(found)} are all meant by {name}; write one of them in double quotes"
        )
    if (kind := _kind(schema.field(found[0]).type)) not in _READABLE:
        raise ThroughlineError(
            f"column {found[0]} is {shorten(kind, 60)}, but a condition reads only numbers, strings and booleans; "
            "convert it in the file"
        )
    return found[0]


def open_metadata(path: Path | RangeReader, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a metadata file; columns in `dictionaries` are read as dictionaries.

    Raises ThroughlineError where it can't be read or is not a complete parquet file.
    """
    try:
        return pq.ParquetFile(path, read_dictionary=list(dictionaries), pre_buffer=True)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ThroughlineError(f"{path}: cannot be read ({error.strerror})") from error
        reason = str(error).splitlines()[0]
        raise ThroughlineError(f"{path}: not a complete parquet file ({reason}); fetch it again") from error


def resolve_columns(schema: pa.Schema, path: object) -> dict[str, str]:
    """Return role -> column name for the roles that a metadata file fills; `path` names it in errors.

    Raises ThroughlineError, naming the file, where a required column is missing, two columns fill one role, or a column
    has the wrong type. A column of type null holds only missing values.
    """
    roles: dict[str, str] = {}
    for column in COLUMNS:
        candidates = [name for name in schema.names if name.lower() in column.names]
        if len(candidates) > 1:
            exact = [name for name in candidates if name.lower() == column.names[0]]
            if len(exact) != 1:
                raise ThroughlineError(
                    f"{path}: columns {', '.join(candidates)} all fill the role {column.role}; keep one"
                )
            candidates = exact
        if not candidates:
            if column.required:
                raise ThroughlineError(
                    f"{path}: no column {' or '.join(column.names)} (in any case) among {', '.join(schema.names)}; "
                    "this is not LAION metadata"
                )
            continue
        found = _kind(schema.field(candidates[0]).type)
        if found not in (*column.kinds, *(() if column.required else ("null",))):
            raise ThroughlineError(
                f"{path}: column {candidates[0]} is {schema.field(candidates[0]).type}, expected "
                f"{' or '.join(column.kinds)}; convert it or leave the file out"
            )
        roles[column.role] = candidates[0]
    return roles
