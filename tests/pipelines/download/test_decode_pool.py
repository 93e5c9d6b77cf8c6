"""Decoders that crash, hang, or cannot start."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core.errors import ThroughlineError
from pipelines.download.config import ImageTransform
from pipelines.download.decode_pool import DecodePool
from tests.pipelines.download.bad_decoder import UnloadableDecoder, decode_or_misbehave, decode_to_much
from tests.pipelines.download.hostile_server import JPEG

TRANSFORM = ImageTransform(min_source_side_px=8, max_source_aspect=10)


@pytest.mark.slow
def test_a_crashed_or_hung_decoder_affects_no_other_image() -> None:
    async def run() -> list[str]:
        bodies = [JPEG, b"die", JPEG, b"hang", JPEG]
        async with DecodePool(2, 1.0, TRANSFORM, decode_or_misbehave) as pool:
            return [outcome.status.value for outcome in await asyncio.gather(*map(pool.decode, bodies))]

    assert asyncio.run(run()) == ["ok", "decoder_crashed", "ok", "decode_timeout", "ok"]


@pytest.mark.slow
def test_decoding_continues_with_a_new_fork_server_if_the_first_dies() -> None:
    async def run() -> list[str]:
        bodies = [JPEG, b"end the server", JPEG, JPEG]
        async with DecodePool(2, 5.0, TRANSFORM, decode_or_misbehave) as pool:
            outcomes = [*await asyncio.gather(*map(pool.decode, bodies)), await pool.decode(JPEG)]
            return [outcome.status.value for outcome in outcomes]

    assert asyncio.run(run()) == ["ok", "decoder_crashed", "ok", "ok", "ok"]


@pytest.mark.slow
def test_a_worker_killed_while_returning_an_image_is_not_waited_for() -> None:
    async def run() -> list[str]:
        async with DecodePool(2, 1.5, TRANSFORM, decode_or_misbehave) as pool:
            await asyncio.gather(pool.decode(JPEG), pool.decode(JPEG))
            bodies = [b"die while handing over", JPEG]
            return [outcome.status.value for outcome in await asyncio.gather(*map(pool.decode, bodies))]

    assert asyncio.run(run()) == ["decoder_crashed", "ok"]


@pytest.mark.slow
def test_a_busy_pool_can_be_stopped() -> None:
    code = "from tests.pipelines.download.test_decode_pool import stop_busy_pools; stop_busy_pools()"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def stop_busy_pools() -> None:
    async def run(seconds: float) -> None:
        async with DecodePool(2, 5.0, TRANSFORM, decode_to_much) as pool:
            await pool.decode(JPEG)
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(pool.decode(JPEG) for _ in range(100)))

    for attempt in range(8):
        with pytest.raises(TimeoutError):
            asyncio.run(run(0.05 + attempt / 100))


@pytest.mark.slow
def test_an_error_names_an_unusable_folder_for_temporary_files(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    code = "from tests.pipelines.download.test_decode_pool import decode_one; decode_one()"
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "decode workers cannot be started: AF_UNIX path too long" in last
    assert str(folder) in last
    assert "TMPDIR" in last


def decode_one() -> None:
    async def run() -> None:
        async with DecodePool(1, 5.0, TRANSFORM) as pool:
            await pool.decode(JPEG)

    asyncio.run(run())


def test_workers_that_cannot_start_give_a_clear_error() -> None:
    async def run() -> None:
        async with DecodePool(1, 5.0, TRANSFORM, UnloadableDecoder()) as pool:
            await pool.decode(JPEG)

    with pytest.raises(ThroughlineError, match="decode workers cannot be started"):
        asyncio.run(run())
