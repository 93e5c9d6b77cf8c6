"""Serves a demo world on the loopback interface, with the misbehaviour of the real web that its pages define.

The only state is a request count per flaky page, and no outcome depends on where that count starts: restarting the
crawl or the server changes nothing.
"""

import argparse
import asyncio
import http.client
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from aiohttp import web
from yarl import URL

from demo.web_pages import OVERSIZED_BYTES, Page, PageKind
from demo.world import DEFAULT_PORT, HOST, PACK_NAME, PAGES_NAME, World
from pipelines.core.errors import ThroughlineError

HEALTH_PATH = "/healthz"
SLOW_SECONDS = 0.4
DRIP_SECONDS = 0.2
"""Pause between single bytes of a drip: within any read time-out, but far too long for a whole image."""
_PROJECT = Path(__file__).resolve().parent.parent
_ADDRESS_IN_USE = 98
_START_SECONDS = 30.0


class DemoWeb:
    """Answers the requests of one world."""

    def __init__(self, world: World) -> None:
        self._world = world
        records = json.loads((world.folder / PAGES_NAME).read_text())
        # Keyed by the normalised path, since clients differ in percent-encoding.
        self._pages = {
            _path_of(path): Page(**{**record, "kind": PageKind(record["kind"])}) for path, record in records.items()
        }
        with (world.folder / PACK_NAME).open("rb") as pack:
            self._bodies = mmap.mmap(pack.fileno(), 0, access=mmap.ACCESS_READ)
        self._requests: Counter[str] = Counter()

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get(HEALTH_PATH, self._health)
        application.router.add_get("/{path:.*}", self._answer)
        return application

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"server": "throughline-demo-web", "world": self._world.id})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = _path_of(request.raw_path)
        page = self._pages.get(path)
        if page is None:
            return web.Response(status=404, text="no such page in this world\n")
        body = self._bodies[page.offset : page.offset + page.num_bytes]
        match page.kind:
            case PageKind.FAIL_THEN_BODY:
                turn = self._requests[path] % (page.num_failures + 1)
                self._requests[path] += 1
                if turn < page.num_failures:
                    return web.Response(status=page.status, headers=_without_type(page), text="try again\n")
                return web.Response(body=body, content_type=page.headers["Content-Type"])
            case PageKind.STALL:
                await asyncio.sleep(3600)
            case PageKind.SLOW:
                await asyncio.sleep(SLOW_SECONDS)
            case PageKind.DRIP:
                return await self._drip(request, page, body)
            case PageKind.OVERSIZED:
                return await self._oversized(request, page, body)
            case PageKind.DISCONNECT:
                return _hang_up(request, web.Response())
            case PageKind.SHORT_BODY:
                return await self._short(request, page, body)
        return web.Response(status=page.status, headers=page.headers, body=body)

    async def _drip(self, request: web.Request, page: Page, body: bytes) -> web.StreamResponse:
        response = await _begin(request, page, len(body))
        for position in range(len(body)):
            await response.write(body[position : position + 1])
            await asyncio.sleep(DRIP_SECONDS)
        return response

    async def _oversized(self, request: web.Request, page: Page, body: bytes) -> web.StreamResponse:
        """Send a valid image followed by padding, in chunks without a stated length."""
        response = await _begin(request, page, None)
        await response.write(body)
        padding = bytes(1 << 18)
        for _ in range(OVERSIZED_BYTES // len(padding)):
            await response.write(padding)
        return response

    async def _short(self, request: web.Request, page: Page, body: bytes) -> web.StreamResponse:
        response = await _begin(request, page, len(body))
        await response.write(body[: len(body) // 2])
        return _hang_up(request, response)


def _path_of(path: str) -> str:
    return URL(path, encoded=False).raw_path_qs


def _without_type(page: Page) -> dict[str, str]:
    return {name: value for name, value in page.headers.items() if name != "Content-Type"}


async def _begin(request: web.Request, page: Page, num_bytes: int | None) -> web.StreamResponse:
    response = web.StreamResponse(status=page.status, headers=page.headers)
    if num_bytes is None:
        response.enable_chunked_encoding()
    else:
        response.content_length = num_bytes
    await response.prepare(request)
    return response


def _hang_up(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    if request.transport is not None:
        request.transport.close()
    return response


async def run_server(world: World, *, until_stdin_closes: bool = False) -> None:
    """Serve `world` on the port of its URLs until SIGTERM, SIGINT or, optionally, the end of stdin.

    Raises ThroughlineError if the port is taken.
    """
    # Handlers that stall must not outlive their clients.
    runner = web.AppRunner(
        DemoWeb(world).application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.2
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, world.port).start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == _ADDRESS_IN_USE:
            raise ThroughlineError(_taken(world.port, "another program")) from error
        raise ThroughlineError(f"{HOST}:{world.port}: can't be served ({error.strerror})") from error
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    if until_stdin_closes:
        loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 1) else stopped.set())
    await stopped.wait()
    await runner.cleanup()


@contextmanager
def serve(world_dir: Path, port: int | None = None) -> Iterator[str]:
    """Serve the world in `world_dir` while the context lasts; yield its base URL, such as ``http://127.0.0.1:8765``.

    The server is a separate process that ends with this one, even if this one is killed. A server of the same world
    that already runs on the port is used, and left running. Raises ThroughlineError if there is no world, if `port` is
    not that of the world's URLs, or if another program listens on it.
    """
    world = World.open(Path(world_dir))
    if port is not None and port != world.port:
        raise ThroughlineError(f"{world_dir}: its URLs use port {world.port}, not {port}; rebuild it with port {port}")
    base_url = f"http://{HOST}:{world.port}"
    if _is_up(world):
        yield base_url
        return
    command = [sys.executable, "-m", "demo.web", "--world", str(world.folder), "--until-stdin-closes"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=_PROJECT, start_new_session=True
        )
        try:
            _await_health(world, process, log)
            yield base_url
        finally:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _await_health(world: World, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            if _is_up(world):  # another process has started the same server
                return
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise ThroughlineError(f"demo web server: exited at start: {last[0]}")
        if _is_up(world):
            return
        time.sleep(0.05)
    raise ThroughlineError(f"demo web server: no response on {HOST}:{world.port} within {_START_SECONDS:.0f} s; retry")


def _is_up(world: World) -> bool:
    """Return whether a server of this world responds; raises ThroughlineError if another program does."""
    connection = http.client.HTTPConnection(HOST, world.port, timeout=5)
    try:
        connection.request("GET", HEALTH_PATH)
        health = json.loads(connection.getresponse().read(1 << 16))
        found = health["world"]
    except ConnectionRefusedError:
        return False
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise ThroughlineError(_taken(world.port, "another program")) from error
    finally:
        connection.close()
    if found != world.id:
        raise ThroughlineError(_taken(world.port, f"the server of another demo world ({found[:8]}...)"))
    return True


def _taken(port: int, by: str) -> str:
    return (
        f"{HOST}:{port}: taken by {by}; stop it, or choose another port for the demo world "
        f"(its URLs contain the port, so it is rebuilt)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder made by `python -m demo.world`")
    parser.add_argument("--port", type=int, default=None, help=f"must be the world's ({DEFAULT_PORT} by default)")
    parser.add_argument("--until-stdin-closes", action="store_true", help="exit with the process that started this one")
    options = parser.parse_args()
    try:
        world = World.open(options.world)
        if options.port not in (None, world.port):
            raise ThroughlineError(
                f"{options.world}: its URLs use port {world.port}, not {options.port}; rebuild it with that port"
            )
        print(f"world {world.id} on http://{HOST}:{world.port}", flush=True)
        asyncio.run(run_server(world, until_stdin_closes=options.until_stdin_closes))
    except ThroughlineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
