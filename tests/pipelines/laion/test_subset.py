import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.core.sample_key import sample_key
from pipelines.laion import index as laion_index
from pipelines.laion import subset as laion_subset
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.index import entry_of, part_key, part_names, read_part, read_parts
from pipelines.laion.rules import REASONS
from pipelines.laion.sources import digest_sources, find_sources, scan_index
from pipelines.laion.subset import ROWS_FILE
from pipelines.runner.outputs import StageOutput, find_input
from tests.pipelines.laion.laion_world import LAION_400M, laion_row, run_index, run_subset, subset_of, write_laion
from tests.pipelines.laion.laion_world import drop_reasons as reasons
from tests.pipelines.laion.laion_world import kept_rows as kept

URL = "http://example.com/cat.jpg"


def test_each_rule_drops_its_rows_and_the_first_rule_is_the_reason(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str | None]] = [
        (laion_row(URL), None),
        (laion_row(None), "url_missing"),
        (laion_row(""), "url_missing"),
        (laion_row("ftp://example.com/cat.jpg"), "url_not_http"),
        (laion_row("data:image/png;base64,AAAA"), "url_not_http"),
        (laion_row("https:///cat.jpg"), "url_not_http"),
        (laion_row("HTTPS://example.com/upper.jpg"), None),
        (laion_row("http://a.example/1", None), "text_empty"),
        (laion_row("http://a.example/2", " \u3000\n"), "text_empty"),
        (laion_row("http://a.example/3", "č☕"), "text_too_short"),
        (laion_row("http://a.example/4", "č☕x"), None),
        (laion_row("http://a.example/5", "x" * 41), "text_too_long"),
        (laion_row("http://a.example/6", similarity=None), "similarity_missing"),
        (laion_row("http://a.example/7", similarity=math.nan), "similarity_missing"),
        (laion_row("http://a.example/8", similarity=0.2999), "similarity_low"),
        (laion_row("http://a.example/9", similarity=0.3), None),
        (laion_row("http://a.example/10", NSFW=None), "nsfw_missing"),
        (laion_row("http://a.example/11", NSFW="NSFW"), "nsfw"),
        (laion_row("http://a.example/12", NSFW="unlikely"), None),
        (laion_row("http://a.example/13", WIDTH=None), "size_missing"),
        (laion_row("http://a.example/14", HEIGHT=99), "too_small"),
        (laion_row("http://a.example/15", HEIGHT=100, WIDTH=301), "aspect_extreme"),
        (laion_row("http://a.example/16", HEIGHT=100, WIDTH=300), None),
        (laion_row(URL), "duplicate_pair"),
        (laion_row(URL, "another text"), "duplicate_url"),
        (laion_row("ftp://x", None, similarity=None), "url_not_http"),
        (laion_row("http://a.example/17", "x", similarity=0.1, NSFW="NSFW"), "text_too_short"),
    ]
    source = write_laion(tmp_path / "laion" / "p.parquet", [row for row, _ in cases]).parent
    output = run_subset(
        source,
        tmp_path / "out",
        min_similarity=0.3,
        nsfw_allowed=("UNLIKELY",),
        min_side_px=100,
        max_aspect=3,
        min_text_chars=3,
        max_text_chars=40,
    )
    assert reasons(output) == {index: reason for index, (_, reason) in enumerate(cases) if reason}
    assert [reason for reason in REASONS if reason in reasons(output).values()] == [
        "url_missing", "url_not_http", "text_empty", "text_too_short", "text_too_long", "similarity_missing",
        "similarity_low", "nsfw_missing", "nsfw", "size_missing", "too_small", "aspect_extreme", "duplicate_pair",
        "duplicate_url",
    ]  # fmt: skip
    assert [row["source_row"] for row in kept(output)] == [
        index for index, (_, reason) in enumerate(cases) if not reason
    ]
    for row in kept(output):
        source_row = cases[row["source_row"]][0]
        assert row["sample_key"] == sample_key(source_row["URL"], source_row["TEXT"])
        assert (row["width"], row["height"]) == (source_row["WIDTH"], source_row["HEIGHT"])
        assert (row["nsfw"], row["license"]) == (source_row["NSFW"], "?")


def test_keep_missing_lets_missing_values_pass(tmp_path: Path) -> None:
    rows = [
        laion_row("http://a.example/1", None, similarity=None, NSFW=None, WIDTH=None),
        laion_row("http://a.example/2", "", similarity=math.nan),
        laion_row("http://a.example/3", similarity=0.1),
    ]
    source = write_laion(tmp_path / "laion" / "p.parquet", rows).parent
    rules: dict[str, Any] = {"min_similarity": 0.3, "nsfw_allowed": ("UNLIKELY",), "min_side_px": 1, "max_aspect": 2}
    output = run_subset(source, tmp_path / "out", keep_missing=True, keep_empty_text=True, **rules)
    assert reasons(output) == {2: "similarity_low"}
    assert [row["alt_text"] for row in kept(output)] == ["", ""]


def test_without_rules_only_urls_texts_and_duplicates_are_checked(tmp_path: Path) -> None:
    rows = [laion_row(URL, "a", WIDTH=-5, HEIGHT=2**40), laion_row(URL, "b"), laion_row(URL, "a"), laion_row("x", "a")]
    source = write_laion(tmp_path / "laion" / "p.parquet", rows).parent
    assert reasons(run_subset(source, tmp_path / "out", drop_duplicate_urls=False)) == {
        2: "duplicate_pair",
        3: "url_not_http",
    }
    assert [(row["width"], row["height"]) for row in kept(run_subset(source, tmp_path / "out"))] == [(None, None)]


_values = st.fixed_dictionaries(
    {
        "URL": st.sampled_from([None, "", "x", URL, "http://b.example/1", "http://b.example/2"]),
        "TEXT": st.none() | st.text(max_size=8),
        "HEIGHT": st.none() | st.integers(-1, 700),
        "WIDTH": st.none() | st.integers(-1, 700),
        "NSFW": st.sampled_from([None, "UNLIKELY", "NSFW", "UNSURE", ""]),
        "similarity": st.none() | st.floats(0, 1) | st.just(math.nan),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(_values, max_size=30), st.integers(1, 40), st.booleans())
def test_rows_are_conserved_and_kept_rows_satisfy_the_rules(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], group_rows: int, keep_missing: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    full = [laion_row(None) | row for row in rows]
    source = write_laion(folder / "laion" / "p.parquet", full, row_group_size=group_rows).parent
    rules: dict[str, Any] = {"min_similarity": 0.3, "nsfw_allowed": ("UNLIKELY",), "min_side_px": 9, "max_aspect": 3}
    output = run_subset(source, folder / "out", keep_missing=keep_missing, **rules)
    assert sorted([*reasons(output), *(row["source_row"] for row in kept(output))]) == list(range(len(rows)))
    for row in kept(output):
        assert row["url"].startswith("http://")
        assert row["alt_text"].strip()
        assert keep_missing or row["similarity"] >= 0.3
        assert row["nsfw"] == "UNLIKELY" or (keep_missing and row["nsfw"] is None)
    assert len({row["url"] for row in kept(output)}) == len(kept(output))


def test_row_groups_and_case_of_columns_change_nothing(tmp_path: Path) -> None:
    rows = [laion_row(f"http://a.example/{index % 70}", f"text {index}") for index in range(100)]
    lower = pa.schema([field.with_name(field.name.lower()) for field in LAION_400M])
    lower_rows = [{name.lower(): value for name, value in row.items()} for row in rows]
    one = run_subset(write_laion(tmp_path / "a" / "p.parquet", rows).parent, tmp_path / "out-a")
    two = run_subset(
        write_laion(tmp_path / "b" / "p.parquet", lower_rows, lower, row_group_size=7).parent, tmp_path / "out-b"
    )
    assert one.manifest.file(ROWS_FILE).sha256 == two.manifest.file(ROWS_FILE).sha256
    assert len(kept(one)) == 70


def test_float_sizes_dictionaries_and_large_strings_are_read(tmp_path: Path) -> None:
    """As written by LAION-2B (float32 similarity), DataComp (original_width) and pandas."""
    table = pa.table(
        {
            "url": pa.array([URL, "http://b.example"], pa.large_string()),
            "caption": pa.array(["one", "two"]).dictionary_encode(),
            "original_width": pa.array([640.0, math.nan], pa.float64()),
            "original_height": pa.array([480.0, 480.0], pa.float64()),
            "similarity": pa.array([0.5, 0.25], pa.float32()),
            "nsfw": pa.nulls(2),
        }
    )
    (tmp_path / "laion").mkdir()
    pq.write_table(table, tmp_path / "laion" / "p.parquet")
    output = run_subset(tmp_path / "laion", tmp_path / "out", min_side_px=100, min_similarity=0.1)
    assert reasons(output) == {1: "size_missing"}
    assert kept(output)[0] | {"sample_key": ""} == {
        "sample_key": "",
        "url": URL,
        "alt_text": "one",
        "width": 640,
        "height": 480,
        "similarity": 0.5,
        "aesthetic": None,
        "pwatermark": None,
        "punsafe": None,
        "nsfw": None,
        "language": None,
        "license": None,
        "expected_sha256": None,
        "source_row": 0,
    }


def test_index_makes_a_part_of_every_file_and_digests_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.parquet", "a/1.parquet", "a/.hidden.parquet", "_temporary/0.parquet"):
        write_laion(tmp_path / "laion" / name, [laion_row(URL, name)])
    read: list[str] = []
    from pipelines.core.digest import file_sha256

    monkeypatch.setattr("pipelines.laion.sources.file_sha256", lambda path: read.append(path.name) or file_sha256(path))
    index = run_index(tmp_path / "laion", tmp_path / "out")
    parts = read_parts(index)
    assert [(part.part, part.name, part.num_rows) for part in parts] == [
        (part_key("a/1.parquet"), "a/1.parquet", 1),
        (part_key("b/2.parquet"), "b/2.parquet", 1),
    ]
    assert [(source.name, source.sha256) for source in index.manifest.sources] == [
        (part.name, part.sha256) for part in parts
    ]
    for part in parts:
        subset_of(index, tmp_path / "out", part.part)
    run_index(tmp_path / "laion", tmp_path / "out")
    assert sorted(read) == ["1.parquet", "2.parquet"]


def test_index_is_the_same_from_another_folder_and_another_when_a_file_changes(tmp_path: Path) -> None:
    def index(folder: str, text: str) -> StageOutput:
        return run_index(write_laion(tmp_path / folder / "p.parquet", [laion_row(URL, text)]).parent, tmp_path / "out")

    assert index("here", "one").data_version == index("there", "one").data_version
    assert index("here", "two").data_version != index("there", "one").data_version


def test_a_part_key_depends_only_on_the_file_name() -> None:
    names = ["part-00000.parquet", "00017.parquet", "a_b-c.d.parquet"]
    assert [part_key(name) for name in names] == ["part-00000", "00017", "a_b-c.d"]
    odd = ["a/1.parquet", "a-1.PARQUET", "a/../1.parquet", "b/1.parquet", "...parquet", "猫.parquet", "犬.parquet"]
    odd += [f"{'part-' * 20}{number}.parquet" for number in range(2)]
    keys = [part_key(name) for name in odd]
    assert len(set(keys)) == len(odd)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", key) for key in keys), keys
    assert part_key("a/1.parquet").startswith("a-1-")


def test_two_files_of_one_part_are_refused(tmp_path: Path) -> None:
    write_laion(tmp_path / "laion" / "a" / "1.parquet", [laion_row(URL)])
    twin = f"{part_key('a/1.parquet')}.parquet"
    write_laion(tmp_path / "laion" / twin, [laion_row(URL)])
    with pytest.raises(ThroughlineError, match=rf"{twin}, a/1.parquet: .* all map to part a-1-.*; rename one"):
        run_index(tmp_path / "laion", tmp_path / "out")


def _update(source: Path, root: Path) -> tuple[set[str], dict[str, StageOutput]]:
    """Run index and subsets; return the parts that were up to date, and all subsets."""
    index = run_index(source, root)
    config, parts = LaionSubsetConfig(), part_names(index)
    inputs = {part: {"index": [entry_of(index, part)]} for part in parts}
    fresh = {part for part in parts if laion_subset.STAGE.find_finished(config, inputs[part], root, part)}
    return fresh, {part: laion_subset.STAGE.run(config, inputs[part], root, part) for part in parts}


def test_adding_changing_or_removing_a_file_leaves_other_parts_fresh(tmp_path: Path) -> None:
    source, root = tmp_path / "laion", tmp_path / "out"
    for name in ("one", "two", "three"):
        write_laion(source / f"{name}.parquet", [laion_row(URL, name)])
    fresh, first = _update(source, root)
    assert not fresh and set(first) == {"one", "two", "three"}
    write_laion(source / "a-new-one.parquet", [laion_row(URL, "new")])
    fresh, _ = _update(source, root)
    assert fresh == {"one", "two", "three"}, "although the new file sorts first"
    write_laion(source / "two.parquet", [laion_row(URL, "changed")])
    fresh, changed = _update(source, root)
    assert fresh == {"a-new-one", "one", "three"}
    assert changed["two"].data_version != first["two"].data_version
    (source / "one.parquet").unlink()
    fresh, last = _update(source, root)
    assert fresh == set(last) == {"a-new-one", "two", "three"}
    # Outputs don't depend on history: an output root that only ever saw the last files agrees.
    _, elsewhere = _update(source, tmp_path / "elsewhere")
    assert {part: output.data_version for part, output in elsewhere.items()} == {
        part: output.data_version for part, output in last.items()
    }


def test_a_subset_records_its_index_and_the_digest_of_its_file(tmp_path: Path) -> None:
    path = write_laion(tmp_path / "laion" / "p.parquet", [laion_row(URL)])
    subset = run_subset(path.parent, tmp_path / "out")
    (source,), (ref,) = subset.manifest.sources, subset.manifest.inputs["index"]
    assert (source.name, source.sha256) == ("p.parquet", file_sha256(path))
    index = find_input(tmp_path / "out", ref)
    assert (index.ref.stage, index.ref.file) == ("laion_index", None)
    assert read_part(index.only_file(ref.file or "")).sha256 == source.sha256


def test_a_subset_accepts_only_its_own_entry(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_laion(tmp_path / "laion" / f"{name}.parquet", [laion_row(URL, name)])
    index = run_index(tmp_path / "laion", tmp_path / "out")
    for entry, message in ((entry_of(index, "two"), "got the index entry of part two"), (index, "got the whole index")):
        with pytest.raises(ThroughlineError, match=message):
            laion_subset.STAGE.run(LaionSubsetConfig(), {"index": [entry]}, tmp_path / "out", "one")


@pytest.mark.parametrize(("num_rows", "found"), [(2, "at least 3"), (4, "3")])
def test_a_file_whose_row_count_differs_from_its_entry_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int, found: str
) -> None:
    rows = [laion_row(f"{URL}?{number}") for number in range(3)]
    index = run_index(write_laion(tmp_path / "laion" / "p.parquet", rows).parent, tmp_path / "out")
    part = read_part(entry_of(index, "p")).model_copy(update={"num_rows": num_rows})
    monkeypatch.setattr(laion_subset, "read_part", lambda entry: part)
    with pytest.raises(ThroughlineError, match=rf"p.parquet: {found} rows, the index says {num_rows}; re-run"):
        subset_of(index, tmp_path / "out", "p")


def test_a_file_changed_after_the_index_is_refused(tmp_path: Path) -> None:
    path = write_laion(tmp_path / "laion" / "p.parquet", [laion_row(URL, "one")])
    index = run_index(path.parent, tmp_path / "out")
    write_laion(path, [laion_row(URL, "two")])
    with pytest.raises(ThroughlineError, match=r"p.parquet: SHA-256 .* the file has changed, re-run laion_index"):
        subset_of(index, tmp_path / "out", "p")
    path.unlink()
    write_laion(path.with_name("q.parquet"), [laion_row(URL)])
    with pytest.raises(ThroughlineError, match=r"p.parquet: registered in the index, but not found under"):
        subset_of(index, tmp_path / "out", "p")
    with pytest.raises(ThroughlineError, match="part q: the index registers 1 parts: p"):
        subset_of(index, tmp_path / "out", "q")


def test_sources_may_be_folders_globs_and_files(tmp_path: Path) -> None:
    one, two = (write_laion(tmp_path / "laion" / f"{name}.parquet", [laion_row(URL)]) for name in ("one", "two"))
    other = write_laion(tmp_path / "other" / "one.parquet", [laion_row(URL)])
    assert find_sources([str(tmp_path / "laion")]) == {"one.parquet": one, "two.parquet": two}
    assert find_sources([str(tmp_path / "laion" / "t*.parquet"), str(one)]) == {"one.parquet": one, "two.parquet": two}
    with pytest.raises(ThroughlineError, match=r"two metadata files share the name one.parquet"):
        find_sources([str(one), str(other)])


@pytest.mark.parametrize("case", ["absent", "empty", "no parquet", "no match", "text file"])
def test_a_source_without_files_is_one_sentence(tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    source, message = {
        "absent": ("absent", "no such file or folder"),
        "empty": ("empty", "the folder is empty"),
        "no parquet": ("texts", "the folder holds no .parquet file"),
        "no match": ("texts/*.parquet", "no file matches this pattern"),
        "text file": ("texts/a.txt", "expected a .parquet file"),
    }[case]
    with pytest.raises(ThroughlineError, match=message) as caught:
        scan_index(tmp_path / source)
    assert source in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"TEXT": ["a"]}, "no column url .* among TEXT; this is not LAION metadata"),
        ({"URL": ["a"]}, "no column text or caption"),
        ({"URL": [1], "TEXT": ["a"]}, "column URL is int64, expected string"),
        ({"URL": ["a"], "TEXT": [["a"]]}, "column TEXT is list<"),
        ({"URL": ["a"], "TEXT": ["a"], "WIDTH": ["12"]}, "column WIDTH is string, expected integer or floating"),
        ({"URL": ["a"], "url": ["a"], "TEXT": ["a"]}, "columns URL, url all fill the role url"),
        (None, "not a complete parquet file"),
    ],
)
def test_a_wrong_schema_names_the_file_and_the_column(
    tmp_path: Path, table: dict[str, Any] | None, message: str
) -> None:
    path = write_laion(tmp_path / "laion" / "wrong.parquet", [laion_row(URL)])
    if table is None:
        path.write_bytes(path.read_bytes()[:-20])
    else:
        pq.write_table(pa.table(table), path)
    with pytest.raises(ThroughlineError, match=rf"wrong.parquet: .*{message}") as caught:
        laion_index.STAGE.run(scan_index(tmp_path / "laion"), {}, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_rule_without_its_column_names_both(tmp_path: Path) -> None:
    path = tmp_path / "laion" / "p.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"URL": [URL], "TEXT": ["a"]}), path)
    with pytest.raises(ThroughlineError, match=r"p.parquet: no column similarity, which the rule min_similarity"):
        run_subset(path.parent, tmp_path / "out", min_similarity=0.3)
    assert kept(run_subset(path.parent, tmp_path / "out"))[0]["similarity"] is None


def test_damaged_data_pages_are_named(tmp_path: Path) -> None:
    rows = [laion_row(f"http://a.example/{index}", f"text {index}") for index in range(5000)]
    path = write_laion(tmp_path / "laion" / "p.parquet", rows, compression="zstd")
    data = bytearray(path.read_bytes())
    data[2000:4000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(ThroughlineError, match=r"p.parquet: damaged metadata \(.*\); fetch the file again"):
        run_subset(path.parent, tmp_path / "out")


def test_digest_cache_notices_a_change_of_the_same_size(tmp_path: Path) -> None:
    path, cache = tmp_path / "p.parquet", tmp_path / "cache.json"
    path.write_bytes(b"one")
    (first,) = digest_sources({"p": path}, cache)
    path.write_bytes(b"two")
    (second,) = digest_sources({"p": path}, cache)
    assert first.sha256 != second.sha256
    cache.write_text("{")
    with pytest.raises(ThroughlineError, match="not a digest cache"):
        digest_sources({"p": path}, cache)
