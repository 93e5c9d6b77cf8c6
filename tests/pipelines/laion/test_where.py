"""Conditions: semantics, names of columns, errors, and the SQL that they refuse."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines.core.errors import ThroughlineError
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.where import Condition
from tests.pipelines.laion.laion_world import REPOSITORY, kept_rows, run_subset, write_laion
from tests.pipelines.laion.test_rules import JOINED, assert_outcome, row


def test_a_condition_applies_after_the_rules_and_reads_any_column(tmp_path: Path) -> None:
    assert_outcome(
        tmp_path,
        [
            ({"hash": -(2**62)}, None),
            ({"text": "sunset", "hash": -(2**62) + 1}, "where"),
            ({"aesthetic": 1.0}, "aesthetic_low"),
            ({"width": None}, "where_unknown"),
            ({"width": 640, "height": 481, "hash": 5}, "where"),
        ],
        min_aesthetic=5.0,
        where=f"AESTHETIC > 5 AND (hash = {-(2**62)} OR hash = 3) and width/height between 1.3 and 1.4",
    )


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("aesthetic >", r"where\n.*position 11: incomplete at >; a column, a value or a bracket is missing"),
        ("aesthetic > 5 AN width < 3", r"where\n.*position 15: expected AND, OR or the end, found AN"),
        ("text = 'a\nb' AN x", r"position 14: expected AND, OR or the end, found AN"),
        ("text LIKE 5", r"where\n.*position 11: LIKE needs a pattern in quotes"),
        ("'text' > 5", r"where\n.*position 10: a string is compared with a number"),
        ("width IN (height)", r"where\n.*position 11: expected a number or a string"),
        ("text = 'cat", r"position 12: expected the closing quote"),
        ("width > 1e", r"position 9: 1e is not a number"),
        ("length(text, 3) = 5", r"position 1: length takes 1 values, found 2"),
        ("width = height IS NULL", r"position 16: IS follows another comparison; put brackets around one of them"),
        ("width > 3 --5", r"position 9: a condition has no comments; write - -1 with a space"),
        ("(" * 21 + "width" + ")" * 21 + " = 1", r"position 21: more than 20 levels of brackets"),
        ("(" * 500 + "width" + ")" * 500 + " = 1", r"nested too deeply"),
        ("+".join("1" * 200) + " = width", r"nested too deeply"),
        ("x = '" + "y" * 10_000 + "'", r"at most 10000 characters; use a list file"),
        (" ", r"position 1: the condition is empty"),
    ],
)
def test_a_condition_that_cannot_be_parsed_names_the_position(where: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LaionSubsetConfig(where=where)


@pytest.mark.parametrize(
    "where",
    [
        "import('os')", "read_csv('/etc/passwd') = 'x'", "width > 5; DROP TABLE x", "width IN (SELECT 1)",
        "EXISTS (SELECT 1)", "width > 5 UNION SELECT 1", "CASE WHEN width > 5 THEN TRUE END", "CAST(width AS int) = 1",
        "width::int = 5", "face.x = 1", "face[0] = 1", "width = ?", "width = @x", "width = $1", "width IS TRUE",
        "text LIKE 'a' ESCAPE 'b'", "text LIKE ANY ('a')", "width IN ()", "width IN text", "width = NULL",
        "width IS DISTINCT FROM 5", "width BETWEEN SYMMETRIC 5 AND 1", "text COLLATE x = 'a'", "'a' 'b' = text",
        "x'ff' = text", "DATE '2020-01-01' = text", "width -> 5 = 1", "width % 5 = 1", "text || 'a' = 'b'", "*",
        "(width, height) = (1, 2)", "lower(DISTINCT text) = 'a'", "lower(text) OVER () = 'a'", "width > 5 AS x",
        "/* x */ width > 5", "width > 5 LIMIT 3", "text ~ 'a'", '"lower"(text) = \'a\'', "width .5 = 1",
    ],
)  # fmt: skip
def test_everything_but_the_documented_operators_is_refused(where: str) -> None:
    with pytest.raises(ValidationError, match=r"where\n.*position [0-9]+: ") as caught:
        LaionSubsetConfig(where=where)
    assert "sqlglot" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "beauty > 5",
            r"p.parquet: where, position 1: no column beauty; known: aesthetic, clip_l14_similarity_score, ",
        ),
        ("text > 5", r"position 8: a string is compared with a number"),
        ("length(width) > 5", r"position 8: expected a string, found a number"),
        ("width AND height", r"position 1: expected a condition, found a number"),
        ("width", r"position 1: this is a number, not a condition"),
    ],
)
def test_a_condition_that_does_not_fit_the_file_names_the_file(tmp_path: Path, where: str, message: str) -> None:
    source = write_laion(tmp_path / "laion" / "p.parquet", [row(0)], JOINED).parent
    with pytest.raises(ThroughlineError, match=message) as caught:
        run_subset(source, tmp_path / "out", where=where)
    assert "\n" not in str(caught.value)


SCORES: dict[str, Any] = {
    "url": [f"http://a.example/{number}" for number in range(4)],
    "text": ["a", "b", "c", "d"],
    "Score": [0.9, 0.1, 0.9, None],
    "score": [0.1, 0.9, None, 0.9],
    "hash": pa.array([2**62, 2**62 + 1, -1, None]),
    "empty": pa.nulls(4),
    "order": [1, 2, 3, 4],
    'a "b"': [True, False, True, False],
    "size": pa.array([{"width": 1}] * 4),
    "price": pa.array(["1.00"] * 4).cast(pa.decimal128(5, 2)),
    "taken": pa.array([0] * 4, pa.timestamp("us")),
}


def _kept_scores(tmp_path: Path, where: str, **rules: Any) -> list[int]:
    path = tmp_path / "laion" / "p.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(SCORES), path)
    return [item["source_row"] for item in kept_rows(run_subset(path.parent, tmp_path / "out", where=where, **rules))]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ('"Score" > 0.5', [0, 2]),
        ('"score" > 0.5', [1, 3]),
        ('"Score" > "score"', [0]),
        ('"HASH" > 0.5 AND "Text" <> \'b\'', [0]),
        ("hash = 4611686018427387904", [0]),
        ("hash < 4611686018427387905", [0, 2]),
        ("hash > 0.5", [0, 1]),
        ('hash > 0 AND "hash" < 4611686018427387905', [0]),
        ("empty IS NULL AND order >= 3", [2, 3]),
        ("empty = 'x' OR order = 1", [0]),
        ('NOT "a ""b"""', [1, 3]),
    ],
)
def test_quoted_names_are_exact_and_sql_keywords_can_be_names(tmp_path: Path, where: str, expected: list[int]) -> None:
    assert _kept_scores(tmp_path, where) == expected


def test_keep_missing_keeps_rows_with_an_unknown_condition(tmp_path: Path) -> None:
    assert _kept_scores(tmp_path, '"Score" > 0.5', keep_missing=True) == [0, 2, 3]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("score > 0.5", r"position 1: columns Score, score are all meant by score; write one of them in double quotes"),
        (
            "order = 1 AND size = 1",
            r"position 15: column size is struct<width: int64>, but a condition",
        ),
        (
            "price > 0.5",
            r"column price is decimal128\(5, 2\), .* strings and booleans; convert it in the file",
        ),
        ("taken > 5", r"column taken is timestamp\[us\], but a condition reads"),
        ("beauty > 5", r"position 1: no column beauty; known: a \"b\", empty, hash, order, score, text, url$"),
    ],
)
def test_a_column_that_cannot_be_read_is_one_sentence(tmp_path: Path, where: str, message: str) -> None:
    with pytest.raises(ThroughlineError, match=rf"p.parquet: where, .*{message}") as caught:
        _kept_scores(tmp_path, where)
    assert "\n" not in str(caught.value)


def test_a_condition_may_have_hundreds_of_alternatives() -> None:
    values = Condition(" OR ".join(f"a = {number}" for number in range(900))).evaluate(
        lambda name: pa.array([899, 900]), 2
    )
    assert values.to_pylist() == [True, False]


A = [None, -2.0, 0.0, 1.5, math.nan, 3.0]
B = [2, None, 0, 3, 1, -3]
S = ["sunset", "", None, "It's A_b%", "SUNRISE", "x"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("a > 0", [None, False, False, True, None, True]),
        ("NOT a > 0", [None, True, True, False, None, False]),
        ("a IS NULL", [True, False, False, False, True, False]),
        ("a is not null OR b = 2", [True, True, True, True, False, True]),
        ("a > 0 AND b > 0", [None, False, False, True, None, False]),
        ("a > 0 OR b > 0", [True, None, False, True, True, True]),
        ("a + 2 * b = 7.5", [None, None, False, True, None, False]),
        ("(a + 2) * b = 10.5", [None, None, False, True, None, False]),
        ("a / b >= .5", [None, None, None, True, None, False]),
        ("-b = 3", [False, None, False, False, False, True]),
        ("b IN (3, -3)", [False, None, False, True, False, True]),
        ("a NOT IN (1.5, 3)", [None, True, True, False, None, False]),
        ("b BETWEEN 1 AND 2 OR a = 3", [True, None, False, False, True, True]),
        ("s NOT BETWEEN 'a' AND 't'", [False, True, None, True, True, True]),
        ("s LIKE '%s%t'", [True, False, None, False, False, False]),
        ("s NOT LIKE '%s%t'", [False, True, None, True, True, True]),
        ("b > 0.5 AND b < 9007199254740993", [True, None, False, True, True, False]),
        ("s ILIKE 'sun%'", [True, False, None, False, True, False]),
        (r"s LIKE 'It''s A\_b\%'", [False, False, None, True, False, False]),
        ("lower(s) = 'sunrise'", [False, False, None, False, True, False]),
        ('length("S") <> 6', [False, True, None, True, True, True]),
        ("greatest(a, b) = 3", [None, None, False, True, None, True]),
        ("abs(b) = 3 and not false", [False, None, False, True, False, True]),
        ("1 = 1", [True] * 6),
    ],
)
def test_conditions_follow_sql_semantics(where: str, expected: list[bool | None]) -> None:
    batch = pa.record_batch({"a": pa.array(A, from_pandas=False), "b": pa.array(B), "s": pa.array(S)})
    values = Condition(where).evaluate(lambda name: batch[name.strip('"').lower()], batch.num_rows)
    assert values.to_pylist() == expected


def test_a_configuration_without_a_condition_loads_no_parser() -> None:
    code = (
        "import sys; from pipelines.laion.config import LaionSubsetConfig; LaionSubsetConfig(); "
        "print([name for name in ('sqlglot', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
