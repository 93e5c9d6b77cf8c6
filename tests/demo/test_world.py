"""The demo world: reproducible bytes, LAION's schema, and rows that the filters drop for the stated reasons."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from demo import world as demo_world
from demo.laion_rows import draw_text
from demo.scenes import caption, parse_caption, sample_scene
from demo.world import CODE_VERSION, LAION_SCHEMA, WORLD_NAME, World, build_world, ensure_world
from demo.world_rows import FLAWS
from pipelines.core.digest import digest_json, file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.laion import index as laion_index
from pipelines.laion import subset as laion_subset
from pipelines.laion.config import LaionSubsetConfig
from pipelines.laion.index import entry_of
from pipelines.laion.sources import scan_index

PROJECT = Path(__file__).resolve().parents[2]


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_parameters_give_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    first = build_world(tmp_path / "a", seed=1, num_parts=2, rows_per_part=12)
    second = build_world(tmp_path / "b", seed=1, num_parts=2, rows_per_part=12)
    other = build_world(tmp_path / "c", seed=2, num_parts=2, rows_per_part=12)
    assert digests(first.folder) == digests(second.folder)
    assert first.id == second.id != other.id


def test_another_code_version_comes_with_other_bytes(tmp_path: Path) -> None:
    """If this fails after a change of the code, raise CODE_VERSION, and pin the new digest in either case."""
    built = build_world(tmp_path / "w", seed=1, num_parts=1, rows_per_part=100)
    files = json.loads((built.folder / WORLD_NAME).read_text())["files"]
    assert (CODE_VERSION, digest_json(files)) == ("1", "fe17cc44b7715a302f0ae09aa321a0bb")


@pytest.mark.parametrize("code", ["a6d05484e5a0f3a5", "4b57873ccce0ffa6"])
def test_a_world_that_records_a_source_digest_is_kept(tmp_path: Path, code: str) -> None:
    folder = tmp_path / "w"
    _record_code(ensure_world(folder, num_images=12, num_parts=1), code)
    before = digests(folder)
    assert ensure_world(folder, num_images=12, num_parts=1).parameters["code"] == code
    assert digests(folder) == before
    assert ensure_world(folder, num_images=12, num_parts=1, seed=1).parameters["code"] == CODE_VERSION


def test_a_world_of_another_code_version_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "w"
    _record_code(ensure_world(folder, num_images=12, num_parts=1), "0123456789abcdef")
    assert ensure_world(folder, num_images=12, num_parts=1).parameters["code"] == CODE_VERSION
    _record_code(World.open(folder), "a6d05484e5a0f3a5")
    monkeypatch.setattr(demo_world, "CODE_VERSION", "2")
    assert ensure_world(folder, num_images=12, num_parts=1).parameters["code"] == "2"


def _record_code(world: World, code: str) -> None:
    path = world.folder / WORLD_NAME
    record = json.loads(path.read_text())
    record["parameters"]["code"] = code
    path.write_text(json.dumps(record))


def test_an_intact_world_is_kept_and_a_damaged_one_is_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    first = ensure_world(folder, num_images=12, num_parts=1)
    stamp = (folder / WORLD_NAME).stat().st_mtime_ns
    assert ensure_world(folder, num_images=12, num_parts=1) == first
    assert (folder / WORLD_NAME).stat().st_mtime_ns == stamp
    part = first.parts[0]
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert ensure_world(folder, num_images=12, num_parts=1) == first
    assert part.read_bytes() == content


def test_a_folder_without_a_world_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(ThroughlineError, match="contains no demo world"):
        build_world(tmp_path, rows_per_part=12)
    assert (tmp_path / "holiday.jpg").read_bytes() == b"precious"


def test_a_full_disk_is_one_sentence_and_keeps_the_old_world(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    first = build_world(folder, seed=1, num_parts=1, rows_per_part=10)
    # A limit on file size acts like a full disk: both make a write fail half-way.
    script = f"""
import resource
from pathlib import Path
from demo.world import build_world
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
build_world(Path({str(folder)!r}), seed=2, num_parts=1, rows_per_part=10)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "ThroughlineError" in result.stderr
    assert "the demo world can't be written (File too large)" in result.stderr
    assert World.open(folder) == first
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_metadata_has_exactly_laions_columns(world: World) -> None:
    for path in world.parts:
        table = pq.read_table(path)
        assert table.schema.equals(LAION_SCHEMA)
        assert table.column_names == ["SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"]
        assert set(table["NSFW"].to_pylist()) <= {"UNLIKELY", "UNSURE", "NSFW", None}


def test_alt_text_is_messy_and_never_a_caption() -> None:
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng) for _ in range(300)]
    drawn = [draw_text(scene, rng) for scene in scenes]
    texts = [text for text, _ in drawn]
    assert any("&amp;" in text or "&quot;" in text for text in texts)
    assert any(not text.isascii() for text in texts)
    assert any(text.upper().startswith(("IMG_", "DSC")) for text in texts)
    assert not {caption(scene) for scene in scenes} & set(texts)
    assert all(3 <= len(text) <= 1000 for text in texts)
    similarities = [similarity for _, similarity in drawn]
    assert 0.3 <= min(similarities) < 0.31 < 0.36 < max(similarities) <= 0.45


def test_truth_lists_every_row_in_order_with_a_parsable_caption(world: World) -> None:
    rows = [row for path in world.parts for row in pq.read_table(path).to_pylist()]
    truth = world.truth()
    assert [row["URL"] for row in rows] == [row["url"] for row in truth]
    for row in truth:
        facts = parse_caption(row["caption"])
        assert facts.background == json.loads(row["scene"])["background"]
        assert sum(facts.groups.values()) == len(json.loads(row["scene"])["objects"])


def test_filters_drop_exactly_the_flawed_rows_each_for_its_flaw(world: World, tmp_path: Path) -> None:
    index = laion_index.STAGE.run(scan_index(world.laion_dir), {}, tmp_path)
    rules = LaionSubsetConfig(
        min_similarity=0.28,
        nsfw_allowed=("UNLIKELY",),
        min_side_px=64,
        max_aspect=3.0,
        min_text_chars=3,
        max_text_chars=1000,
    )
    subset = laion_subset.STAGE.run(rules, {"index": [entry_of(index, "part-00000")]}, tmp_path, "part-00000")
    flaws = Counter(row["flaw"] for row in world.truth() if row["flaw"])
    assert subset.manifest.summary["dropped"] == dict(sorted(flaws.items()))
    assert set(flaws) == set(FLAWS)
    kept = {row["source_row"] for row in pq.read_table(subset.path("rows.parquet")).to_pylist()}
    assert kept == {row["row"] for row in world.truth() if row["flaw"] is None}


def test_opening_a_folder_without_a_world_names_the_command_that_builds_one(tmp_path: Path) -> None:
    with pytest.raises(ThroughlineError, match=r"python -m demo\.world"):
        World.open(tmp_path)
