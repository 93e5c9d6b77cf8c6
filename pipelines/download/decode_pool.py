"""Worker processes that decode images, and may hang or crash without taking down the job.

They are forked from `multiprocessing`'s fork server, which imported the libraries once: a new worker starts in
milliseconds and shares their memory. Forking this process, which has threads, would not be safe.
"""

import asyncio
import errno
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pipelines.core.errors import ThroughlineError, first_line, os_error_message
from pipelines.download.config import ImageTransform
from pipelines.download.decode import DecodeOutcome, decode, prepare_to_decode
from pipelines.download.status import FetchStatus

_SERVER_ENDED = (ConnectionError, EOFError)
"""Raised when a worker is requested from a fork server that is just being killed; soon after, a new one is started."""
_SERVER_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_START_ATTEMPTS = 2
Decoder = Callable[[bytes, ImageTransform], DecodeOutcome]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _DecodeJob:
    """Settings that a worker receives once, so that afterwards only bodies are sent to it."""

    decoder: Decoder
    transform: ImageTransform
    seconds: float


_work: _DecodeJob | None = None


def _start_worker(work: _DecodeJob) -> None:
    """Import everything before the time limit of an image starts, and end this worker when its parent dies.

    Ignores interrupts from the terminal, which the parent handles.
    """
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the executor ends workers with it; the parent may ignore it
    prepare_to_decode()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class DecodePool:
    """Decodes in `workers` processes.

    When a worker crashes or hangs, every image in flight is suspect. Each is decoded again, alone in a process, so that
    the culprit gets its status and the others only lose time.
    """

    def __init__(self, workers: int, seconds: float, transform: ImageTransform, decoder: Decoder = decode) -> None:
        self._work = _DecodeJob(decoder, transform, seconds)
        self._workers = workers
        self._slots = asyncio.Semaphore(2 * workers)
        self._starting = asyncio.Lock()
        self._alone = asyncio.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._pool_of_one: ProcessPoolExecutor | None = None
        self._waiting = 0
        self.has_room = asyncio.Event()
        """Set while the queue is short; a download that awaits it cannot fill the memory."""
        self.has_room.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._pool, self._pool_of_one):
            if pool is not None:
                _end(pool)

    async def decode(self, body: bytes) -> DecodeOutcome:
        """Return the image made from `body`, or the status of its failure."""
        self._count_waiting(1)
        try:
            async with self._slots:
                return await self._decode(body)
        finally:
            self._count_waiting(-1)

    def _count_waiting(self, change: int) -> None:
        self._waiting += change
        if self._waiting < 8 * self._workers:
            self.has_room.set()
        else:
            self.has_room.clear()

    async def _decode(self, body: bytes) -> DecodeOutcome:
        async with self._starting:
            if self._pool is None:
                self._pool = await asyncio.to_thread(_new_pool, self._workers, self._work)
            pool = self._pool
        try:
            return await self._decode_in(pool, body)
        except BrokenProcessPool:
            if self._pool is pool:  # the first caller to notice discards the pool for all
                self._pool = None
                _log.warning("a decode worker crashed or hung; retrying the images in flight one by one")
                _end(pool)
        async with self._alone:
            return await self._decode_alone(body)

    async def _decode_alone(self, body: bytes) -> DecodeOutcome:
        if self._pool_of_one is None:
            self._pool_of_one = await asyncio.to_thread(_new_pool, 1, self._work)
        pool = self._pool_of_one
        try:
            return await self._decode_in(pool, body)
        except BrokenProcessPool:
            self._pool_of_one = None
            hung = _end(pool) == [-signal.SIGALRM]
            return DecodeOutcome(status=FetchStatus.DECODE_TIMEOUT if hung else FetchStatus.DECODER_CRASHED)

    async def _decode_in(self, pool: ProcessPoolExecutor, body: bytes) -> DecodeOutcome:
        try:
            future = pool.submit(_decode_in_time, body)
        except (RuntimeError, *_SERVER_ENDED) as error:  # RuntimeError: the pool was shut down after a crash
            raise BrokenProcessPool(str(error)) from error
        except OSError as error:  # starting another worker failed
            raise _cannot_start(error) from error
        # At most one other image is ahead in the queue, and alarms limit both. Only half a result never arrives: if a
        # worker is killed while it writes, the executor waits for the rest for as long as another worker lives.
        try:
            async with asyncio.timeout(3 * self._work.seconds + _ANSWER_SECONDS):
                # Shielded: cancelling a future while a worker dies ends the executor's own thread (Python 3.11).
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError as error:
            raise BrokenProcessPool("a decode worker does not answer") from error


def _decode_in_time(body: bytes) -> DecodeOutcome:
    """Decode, or be killed by the alarm: nothing else ends a loop inside a C library."""
    assert _work is not None
    signal.setitimer(signal.ITIMER_REAL, _work.seconds)
    try:
        return _work.decoder(body, _work.transform)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _new_pool(workers: int, work: _DecodeJob) -> ProcessPoolExecutor:
    """Return a pool with one running worker; starting the fork server and importing libraries takes over a second."""
    deadline = time.monotonic() + _SERVER_SECONDS
    ended = 0
    while True:
        try:
            return _start_pool(workers, work)
        except _SERVER_ENDED as error:
            if time.monotonic() > deadline:
                raise ThroughlineError(
                    f"decode workers cannot be started: the fork server keeps dying ({first_line(error)}); if the "
                    "system kills it because memory is short, lower images.decode_workers"
                ) from error
            time.sleep(0.05)
        except OSError as error:
            raise _cannot_start(error) from error
        except BrokenProcessPool as error:
            ended += 1
            if ended == _START_ATTEMPTS:
                raise ThroughlineError(
                    f"decode workers cannot be started: {ended} in a row ended before their first image; see the error "
                    "above, or, if the system kills them because memory is short, lower images.decode_workers"
                ) from error


def _cannot_start(error: OSError) -> ThroughlineError:
    message = f"decode workers cannot be started: {os_error_message(error)}"
    if error.errno in (None, errno.ENAMETOOLONG, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOSPC):
        # No errno: the path of the socket is too long; it is limited to about 100 characters.
        message += (
            f"; the fork server needs a socket in the folder for temporary files ({tempfile.gettempdir()}): set TMPDIR "
            "to a writable folder with a short path"
        )
    return ThroughlineError(message)


def _start_pool(workers: int, work: _DecodeJob) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.download.decode_pool", "pipelines.download.resize"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(work,))
    pool.submit(os.getpid).result()
    return pool


def _end(pool: ProcessPoolExecutor) -> list[int | None]:
    """Kill the workers, hung ones included, and return their exit codes."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.kill()
    # A worker killed while writing leaves half a result, whose reader waits for more until the pipe is closed.
    pool._result_queue._writer.close()  # type: ignore[attr-defined]
    pool.shutdown(wait=True)  # an exit code can be read only once, and until now the executor's thread may do so
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
