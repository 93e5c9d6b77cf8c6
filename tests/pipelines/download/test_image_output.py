"""Output of the stage `images`: tables, statuses and dropped rows."""

import io
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from pipelines.core.sample_key import sample_key
from pipelines.download import images
from pipelines.download.tables import image_units
from pipelines.laion import selection as laion_selection
from pipelines.laion.config import LaionSelectionConfig
from tests.pipelines.data_world import World, dropped_reasons, image_keys, read_rows
from tests.pipelines.download.hostile_server import HostileServer
from tests.pipelines.laion.laion_world import (
    images_config,
    laion_row,
    run_subset,
    write_laion,
)


def test_every_row_becomes_an_image_or_is_dropped_with_a_reason(server: HostileServer, world: World) -> None:
    downloaded = world["images"][0]
    conservation = downloaded.manifest.conservation
    assert conservation is not None
    assert (conservation.rows_in, conservation.rows_out) == (19, 12)
    expected = {
        "/404": "http_not_found",
        "/html": "html",
        "/truncated.jpg": "image_truncated",
        "/noai": "opted_out",
        "/animated.gif": "animated",
        "/redirect-metadata": "blocked_address",
        "/500": "http_server_error",
    }
    keys = {sample_key(server.url(path), f"bad {path}"): reason for path, reason in expected.items()}
    assert dropped_reasons(downloaded) == keys
    statuses = [row for path in downloaded.files(".parquet") if "status-" in path.name for row in read_rows(path)]
    assert Counter(row["status"] for row in statuses) == Counter({"ok": 12, **Counter(expected.values())})
    assert {row["sample_key"] for row in statuses} == {*keys, *image_keys(downloaded)}


def test_images_are_square_rgb_and_record_their_source(server: HostileServer, world: World) -> None:
    rows = [row for unit in image_units(world["images"][0]) for row in unit.read().to_pylist()]
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]))
        assert (image.size, image.mode, image.format) == ((256, 256), "RGB", "JPEG")
        assert row["sample_key"] == sample_key(row["url"], row["alt_text"])
        seed = int(row["url"].rsplit("/", 1)[1])
        assert (row["width_px"], row["height_px"], row["format"]) == (280 + seed % 50, 300, "jpeg")
        assert row["content_type"] == "image/jpeg"
        assert row["final_url"] == row["url"]
    assert len({row["source_sha256"] for row in rows}) == 12


def test_images_downloads_the_selected_rows_of_its_part(server: HostileServer, tmp_path: Path) -> None:
    both = [server.url("/scene/1"), server.url("/scene/2")]
    for part, urls in {"a": both, "b": [*both, server.url("/scene/3")]}.items():
        write_laion(tmp_path / "laion" / f"{part}.parquet", [laion_row(url, f"in {part}") for url in urls])
    subsets = [run_subset(tmp_path / "laion", tmp_path, part) for part in ("a", "b")]
    selection = laion_selection.STAGE.run(LaionSelectionConfig(), {"subset": subsets}, tmp_path)
    ends: dict[str, set[str]] = {}
    for part in ("a", "b"):
        rows = selection.only_file(laion_selection.rows_name(part))
        downloaded = images.STAGE.run(images_config(server), {"selection": [rows]}, tmp_path, part)
        table, selected = downloaded.manifest.conservation, pq.read_table(rows.address)["sample_key"].to_pylist()
        assert table is not None and table.holds and table.rows_in == len(selected)
        (ref,) = downloaded.manifest.inputs["selection"]
        assert (ref.stage, ref.file) == ("laion_selection", f"rows-{part}.parquet")
        ends[part] = {row["url"] for row in read_rows(downloaded.path("status-00000.parquet"))} if selected else set()
    assert not ends["a"] & ends["b"]
    assert ends["a"] | ends["b"] == {*both, server.url("/scene/3")}
