"""The demo web: each page shows its behaviour to a real client, whatever the earlier requests."""

import asyncio
import http.client
import http.server
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from demo.web import serve
from demo.web_pages import BEHAVIOURS, BOMB_SIDE_PX, OVERSIZED_BYTES
from demo.world import World, build_world
from pipelines.core.errors import ThroughlineError
from pipelines.download.config import FetchConfig, ImageTransform
from pipelines.download.decode import decode
from pipelines.download.fetch import Fetcher
from pipelines.download.status import FetchStatus
from tests.demo.ports import free_port

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base_url(world: World) -> Iterator[str]:
    with serve(world.folder) as url:
        yield url


def row_of(world: World, behaviour: str) -> dict[str, Any]:
    return next(row for row in world.truth() if row["behaviour"] == behaviour and row["flaw"] is None)


def get(url: str) -> tuple[int, dict[str, str], bytes]:
    """Make one request without following redirects."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        connection.close()


def crawl(world: World) -> dict[str, FetchStatus]:
    """Return the outcome of the project's own crawler for every flawless row, by URL."""
    config = FetchConfig(
        allowed_private_hosts=(f"127.0.0.1:{world.port}",),
        connect_seconds=5.0,
        read_seconds=2.0,
        total_seconds=4.0,
        retries=2,
        retry_timeouts=False,
        max_body_bytes=4 << 20,
        backoff_seconds=0.05,
    )
    transform = ImageTransform(min_source_side_px=64, max_source_aspect=3.0)

    async def fetch_all() -> dict[str, FetchStatus]:
        urls = [row["url"] for row in world.truth() if row["flaw"] is None]
        async with Fetcher(config) as fetcher:
            answers = await asyncio.gather(*(fetcher.fetch(url) for url in urls))
        return {
            url: decode(answer.body, transform).status if answer.status is FetchStatus.OK else answer.status
            for url, answer in zip(urls, answers, strict=True)
        }

    return asyncio.run(fetch_all())


@pytest.mark.slow
def test_a_crawler_gets_every_stated_outcome_on_every_crawl(world: World, base_url: str) -> None:
    expected = {row["url"]: row["outcome"] for row in world.truth() if row["flaw"] is None}
    assert {row["behaviour"] for row in world.truth()} == set(BEHAVIOURS)
    flaky = row_of(world, "fails_twice")["url"]
    get(flaky)  # outcomes must not depend on earlier requests
    for _ in range(2):
        found = crawl(world)
        assert {url: (found[url], outcome) for url, outcome in expected.items() if found[url] != outcome} == {}


@pytest.mark.parametrize(
    ("behaviour", "status"), [("not_found", 404), ("gone", 410), ("forbidden", 403), ("server_error", 500)]
)
def test_errors_have_their_status(world: World, base_url: str, behaviour: str, status: int) -> None:
    assert get(row_of(world, behaviour)["url"])[0] == status


@pytest.mark.parametrize(("behaviour", "failures"), [("fails_once", 1), ("fails_twice", 2), ("throttled", 1)])
def test_a_flaky_page_succeeds_within_its_failures_from_any_start(
    world: World, base_url: str, behaviour: str, failures: int
) -> None:
    url = row_of(world, behaviour)["url"]
    statuses = [get(url)[0] for _ in range(12)]
    for start in range(12 - failures):
        assert 200 in statuses[start : start + failures + 1]


def test_a_throttled_page_sends_retry_after(world: World, base_url: str) -> None:
    url = row_of(world, "throttled")["url"]
    answers = [get(url) for _ in range(2)]
    (refusal,) = [headers for status, headers, _ in answers if status == 429]
    assert refusal["Retry-After"] == "1"


def test_copies_equal_their_originals(world: World, base_url: str) -> None:
    row = row_of(world, "copy")
    assert row["url"] != row["copy_of"]
    assert get(row["url"])[2] == get(row["copy_of"])[2]


def test_opt_outs_are_sent_in_the_header(world: World, base_url: str) -> None:
    found = {
        name: get(row_of(world, name)["url"])[1]["X-Robots-Tag"] for name in ("noai", "noimageai", "noai_noimageai")
    }
    assert found == {"noai": "noai", "noimageai": "noimageai", "noai_noimageai": "noai, noimageai"}
    assert ":" in get(row_of(world, "noai_for_others")["url"])[1]["X-Robots-Tag"]


@pytest.mark.parametrize(
    ("behaviour", "mode"), [("cmyk", "CMYK"), ("palette", "P"), ("alpha", "RGBA"), ("sixteen_bit", "RGB")]
)
def test_unusual_images_have_their_mode(world: World, base_url: str, behaviour: str, mode: str) -> None:
    body = get(row_of(world, behaviour)["url"])[2]
    with Image.open(io.BytesIO(body)) as image:
        image.load()
        assert image.mode == mode
    if behaviour == "sixteen_bit":
        assert body[24] == 16  # the bit depth in PNG's header


def test_a_rotated_image_is_marked_and_a_bomb_is_small_on_the_wire(world: World, base_url: str) -> None:
    with Image.open(io.BytesIO(get(row_of(world, "exif_rotated")["url"])[2])) as image:
        assert image.getexif()[0x0112] == 6
    bomb = get(row_of(world, "pixel_bomb")["url"])[2]
    assert len(bomb) < 100_000
    assert int.from_bytes(bomb[16:20], "big") == BOMB_SIDE_PX
    assert len(get(row_of(world, "oversized")["url"])[2]) > OVERSIZED_BYTES


def test_redirects_have_their_targets(world: World, base_url: str) -> None:
    assert 300 < get(row_of(world, "redirect")["url"])[0] < 400
    assert get(row_of(world, "redirect_metadata")["url"])[1]["Location"].startswith("http://169.254.169.254/")
    assert get(row_of(world, "redirect_private")["url"])[1]["Location"].startswith("http://10.0.0.1/")
    assert get(row_of(world, "redirect_scheme")["url"])[1]["Location"].startswith("file:")


def test_a_running_server_of_the_same_world_is_reused_and_left_running(world: World, base_url: str) -> None:
    with serve(world.folder) as url:
        assert url == base_url
    assert get(f"{base_url}/healthz")[0] == 200


@pytest.mark.slow
def test_a_port_taken_by_another_program_is_one_sentence(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    small = build_world(tmp_path / "w", num_parts=1, rows_per_part=10, port=port)
    with (
        pytest.raises(ThroughlineError, match=f"127.0.0.1:{port}: taken by another program; stop it"),
        serve(small.folder),
    ):
        pass
    command = [sys.executable, "-m", "demo.web", "--world", str(small.folder)]
    direct = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=30, check=False)
    server.shutdown()
    server.server_close()
    assert direct.returncode == 1
    assert direct.stderr.strip().count("\n") == 0
    assert "taken by another program" in direct.stderr


@pytest.mark.slow
def test_the_server_stops_with_the_process_that_started_it(tmp_path: Path) -> None:
    small = build_world(tmp_path / "w", num_parts=1, rows_per_part=10, port=free_port())
    script = f"""
import time
from demo.web import serve
with serve({str(small.folder)!r}):
    print("up", flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "up\n"
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            get(f"http://127.0.0.1:{small.port}/healthz")
        except ConnectionRefusedError:
            return
        except OSError:
            pass  # it stopped during the response
        time.sleep(0.1)
    pytest.fail("the server outlived its owner by 10 seconds")


def test_a_port_that_differs_from_the_worlds_is_refused(world: World) -> None:
    with pytest.raises(ThroughlineError, match="its URLs use port"), serve(world.folder, world.port + 1):
        pass
