from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.core.manifest import DROPPED_NAME
from pipelines.core.sample_key import sample_key
from pipelines.laion import selection as laion_selection
from pipelines.laion.config import LaionSelectionConfig
from pipelines.laion.selection import rows_name
from pipelines.runner.outputs import StageOutput
from tests.pipelines.laion.laion_world import laion_row, run_index, subset_of, write_laion

Pair = tuple[int, int]


def select(folder: Path, parts: list[list[Pair]], **config: Any) -> StageOutput:
    for number, pairs in enumerate(parts):
        rows = [laion_row(f"http://a.example/{url}", f"text {text}") for url, text in pairs]
        write_laion(folder / "laion" / f"{number:05d}.parquet", rows)
    index = run_index(folder / "laion", folder / "out")
    subsets = [
        subset_of(index, folder / "out", f"{number:05d}", drop_duplicate_urls=False) for number in range(len(parts))
    ]
    return laion_selection.STAGE.run(LaionSelectionConfig(**config), {"subset": subsets}, folder / "out")


def kept(output: StageOutput) -> list[str]:
    return [key for path in output.files(".parquet") if path.name != DROPPED_NAME for key in _keys(path)]


def _keys(path: Path) -> list[str]:
    return pq.read_table(path, columns=["sample_key"])["sample_key"].to_pylist()


def key_of(pair: Pair) -> str:
    return sample_key(f"http://a.example/{pair[0]}", f"text {pair[1]}")


_pairs = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=40)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(_pairs, st.integers(1, 3), st.integers(1, 3), st.booleans(), st.sampled_from([None, 1, 3, 1000]), st.randoms())
def test_the_kept_rows_do_not_depend_on_order_or_parts(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[Pair],
    one: int,
    other: int,
    by_url: bool,
    limit: int | None,
    random: Any,
) -> None:
    shuffled = random.sample(pairs, len(pairs))
    config = {"drop_duplicate_urls": by_url, "limit": limit}
    first, second = (
        select(tmp_path_factory.mktemp("parts"), [items[n::count] for n in range(count)], bucket_rows=rows, **config)
        for items, count, rows in ((pairs, one, 7), (shuffled, other, 1000))
    )
    assert sorted(kept(first)) == sorted(kept(second))
    expected = {key_of(pair) for pair in pairs}
    if by_url:
        expected = {min(key_of(pair) for pair in pairs if pair[0] == url) for url, _ in pairs}
    assert set(kept(first)) <= expected
    assert len(kept(first)) == min(len(expected), limit or len(expected))
    table = first.manifest.conservation
    assert table is not None and table.holds


def test_every_dropped_row_is_listed_with_its_reason(tmp_path: Path) -> None:
    output = select(tmp_path, [[(1, 0), (2, 0), (3, 0)], [(2, 0), (1, 1), (4, 0)], [(5, 0)]])
    (first,) = [pair for pair in ((1, 0), (1, 1)) if key_of(pair) != min(key_of((1, 0)), key_of((1, 1)))]
    rows = pq.read_table(output.path(DROPPED_NAME)).to_pylist()
    assert Counter((row["sample_key"], row["reason"], row["unit"]) for row in rows) == {
        (key_of((2, 0)), "duplicate_pair", "00001"): 1,
        (key_of(first), "duplicate_url", f"0000{first[1]}"): 1,
    }
    assert output.manifest.summary["num_kept"] == 5
    # A part that loses no row is the same file, byte for byte.
    (untouched,) = output.manifest.inputs["subset"][2:]
    subset = StageOutput.load(output.folder.parents[1] / "laion_subset" / untouched.data_version / "manifest.json")
    assert output.manifest.file("rows-00002.parquet").sha256 == subset.manifest.file("rows.parquet").sha256


def test_samples_are_nested_and_depend_on_the_salt(tmp_path: Path) -> None:
    parts = [[(url, 0) for url in range(start, 60, 2)] for start in range(2)]
    samples = [set(kept(select(tmp_path, parts, limit=limit))) for limit in (5, 20, 60, 61)]
    assert [len(sample) for sample in samples] == [5, 20, 60, 60]
    assert samples[0] < samples[1] < samples[2] == samples[3]
    assert set(kept(select(tmp_path, parts, limit=20, sample_salt="sample-2"))) != samples[1]


def part_files(output: StageOutput) -> dict[str, str]:
    """Return part -> data version of the file that `images` reads."""
    return {name: output.only_file(rows_name(name)).data_version for name in sorted(_parts(output))}


def _parts(output: StageOutput) -> list[str]:
    return [ref.partition or "" for ref in output.manifest.inputs["subset"]]


def test_a_new_part_changes_only_parts_that_lose_other_rows(tmp_path: Path) -> None:
    loses = max((1, 0), (1, 1), key=key_of)  # of two texts with one URL, the one with the larger key
    parts = [[loses, (2, 0)], [(3, 0), (3, 0), (4, 0)], [(5, 0)]]
    before = part_files(select(tmp_path, parts))
    winner = (1, 1 - loses[1])
    after = select(tmp_path, [*parts, [winner]])
    changed = {name for name, digest in part_files(after).items() if before.get(name) not in (None, digest)}
    assert changed == {"00000"}
    # A limit above the number of rows drops nothing and changes no file.
    for limit in (100, 5):
        assert part_files(select(tmp_path, parts, limit=limit)) == before
    assert part_files(select(tmp_path, parts, limit=4)) != before


def test_a_sample_leaves_a_part_without_drops_unchanged(tmp_path: Path) -> None:
    """A part from which the sample drops no row is the same file, whatever it drops elsewhere."""
    ranked = [key for limit in range(1, 7) for key in kept(select(tmp_path, [[(n, 0) for n in range(6)]], limit=limit))]
    last = next(n for n in range(6) if ranked.count(key_of((n, 0))) == 1)
    parts = [[(n, 0) for n in range(6) if n != last], [(last, 0)]]
    whole, cut = (part_files(select(tmp_path / "two", parts, limit=limit)) for limit in (6, 5))
    assert whole["00000"] == cut["00000"] and whole["00001"] != cut["00001"]
