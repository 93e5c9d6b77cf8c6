"""The published tables, with their columns' names, case and types."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.laion.index import read_parts
from tests.pipelines.laion.laion_world import kept_rows, run_index, run_subset

URL = "http://example.com/cat.jpg"
TABLES: dict[str, dict[str, Any]] = {
    "laion2B-multi-joined": {
        "URL": pa.array([URL]),
        "TEXT": pa.array(["eine rote Katze"]),
        "WIDTH": pa.array([640], pa.int32()),
        "HEIGHT": pa.array([480], pa.int32()),
        "similarity": pa.array([0.31]),
        "LANGUAGE": pa.array(["de"]),
        "hash": pa.array([-(2**62)]),
        "pwatermark": pa.array([0.25], pa.float32()),
        "punsafe": pa.array([0.125], pa.float32()),
    },
    "improved_aesthetics_6plus": {
        "URL": pa.array([URL]),
        "TEXT": pa.array(["a red cat"]),
        "WIDTH": pa.array([640.0]),
        "HEIGHT": pa.array([480.0]),
        "similarity": pa.array([0.31]),
        "punsafe": pa.array([0.125], pa.float32()),
        "pwatermark": pa.array([0.25], pa.float32()),
        "AESTHETIC_SCORE": pa.array([6.5], pa.float32()),
        "hash": pa.array([7]),
        "__index_level_0__": pa.array([0]),
    },
    "laion2B-en-aesthetic": {
        "URL": pa.array([URL]),
        "TEXT": pa.array(["a red cat"]),
        "WIDTH": pa.array([640], pa.int32()),
        "HEIGHT": pa.array([480], pa.int32()),
        "similarity": pa.array([0.31]),
        "hash": pa.array([7]),
        "punsafe": pa.array([0.125], pa.float32()),
        "pwatermark": pa.array([0.25], pa.float32()),
        "aesthetic": pa.array([6.5], pa.float32()),
    },
    "relaion2B-en-research-safe": {
        "url": pa.array([URL]),
        "caption": pa.array(["a red cat"]),
        "similarity": pa.array([0.31]),
        "hash": pa.array([7]),
        "punsafe": pa.array([0.125], pa.float32()),
        "pwatermark": pa.array([0.25], pa.float32()),
    },
    "datacomp_small": {
        "uid": pa.array(["335db346a49045476677662a0067ce68"]),
        "url": pa.array([URL]),
        "text": pa.array(["a red cat"]),
        "original_width": pa.array([640]),
        "original_height": pa.array([480]),
        "clip_b32_similarity_score": pa.array([0.25], pa.float32()),
        "clip_l14_similarity_score": pa.array([0.125], pa.float32()),
        "face_bboxes": pa.array([[[0.5, 0.25, 0.75, 1.0]]]),
        "sha256": pa.array(["0b" * 32]),
    },
}


def write(tmp_path: Path, columns: dict[str, Any]) -> Path:
    folder = tmp_path / "laion"
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "p.parquet")
    return folder


@pytest.mark.parametrize("name", TABLES)
def test_published_tables_fill_the_roles_they_have(tmp_path: Path, name: str) -> None:
    columns = TABLES[name]
    source = write(tmp_path, columns)
    (part,) = read_parts(run_index(source, tmp_path / "out"))
    (row,) = kept_rows(run_subset(source, tmp_path / "out"))
    assert row["url"] == URL
    for role, column in part.columns.items():
        if role in row:
            assert row[role] == columns[column][0].as_py(), role
    unread = {column for column in columns if column not in part.columns.values()}
    assert unread <= {"hash", "uid", "face_bboxes", "__index_level_0__"}
    assert row["expected_sha256"] == ("0b" * 32 if name == "datacomp_small" else None)


@pytest.mark.parametrize("name", TABLES)
def test_column_names_are_case_insensitive(tmp_path: Path, name: str) -> None:
    swapped = {column.swapcase(): array for column, array in TABLES[name].items()}
    digests = set()
    for number, columns in enumerate((TABLES[name], swapped)):
        folder = tmp_path / str(number)
        folder.mkdir()
        output = run_subset(write(folder, columns), folder / "out", where="hash <> 1" if "hash" in columns else None)
        digests.add(output.manifest.file("rows.parquet").sha256)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("column", "array", "message"),
    [
        ("punsafe", pa.array(["low"]), "column punsafe is string, expected floating or integer"),
        ("aesthetic", pa.array([[5.0]]), "column aesthetic is list<"),
        ("language", pa.array([1]), "column language is int64, expected string"),
        ("AESTHETIC", pa.array([5.0]), "columns aesthetic, AESTHETIC all fill the role aesthetic"),
    ],
)
def test_a_type_error_names_file_and_column(tmp_path: Path, column: str, array: pa.Array, message: str) -> None:
    table = {"url": pa.array([URL]), "text": pa.array(["a"]), "aesthetic": pa.array([5.0]), column: array}
    with pytest.raises(ThroughlineError, match=rf"p.parquet: .*{message}"):
        run_index(write(tmp_path, table), tmp_path / "out")
