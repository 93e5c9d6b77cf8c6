"""Worker processes that decode pictures, and that may hang or die without taking the job along.

They are forks of a server (`multiprocessing`'s own) that loaded the libraries once: a new worker takes milliseconds and
shares their memory. A fork of this process would copy its threads halfway.
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
"""Raised where a worker is wanted of a server that was killed and is not quite gone; later, a new one is started."""
_SERVER_SECONDS = 10.0
_ANSWER_SECONDS = 5.0
_START_ATTEMPTS = 2
Decoder = Callable[[bytes, ImageTransform], DecodeOutcome]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What a worker is told once, so that nothing but bodies travels to it."""

    decoder: Decoder
    transform: ImageTransform
    seconds: float


_work: _Work | None = None


def _start_worker(work: _Work) -> None:
    """Load all that decoding needs before a picture's clock runs, and end this worker when its parent is gone.

    An interrupt from the terminal reaches workers too; their parent is the one to act on it.
    """
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the executor ends workers with it; a shell may have it ignored
    prepare_to_decode()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class DecodePool:
    """Decodes in `workers` processes.

    When a worker dies or hangs, every picture in flight is suspect. Each of them is decoded again alone in a process
    of its own, so that the one that kills is found and named, and the others lose nothing but time.
    """

    def __init__(self, workers: int, seconds: float, transform: ImageTransform, decoder: Decoder = decode) -> None:
        self._work = _Work(decoder, transform, seconds)
        self._workers = workers
        self._slots = asyncio.Semaphore(2 * workers)
        self._starting = asyncio.Lock()
        self._alone = asyncio.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._pool_of_one: ProcessPoolExecutor | None = None
        self._waiting = 0
        self.has_room = asyncio.Event()
        """Set while few pictures wait in line; a download that awaits it cannot fill the memory."""
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
        """Return the picture made from `body`, or why there is none."""
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
            if self._pool is pool:  # the first of those in flight to notice clears it away for all
                self._pool = None
                _log.warning("a decode worker died or hung; the pictures in flight are tried one by one")
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
        except (RuntimeError, *_SERVER_ENDED) as error:  # RuntimeError: shut down meanwhile, because a worker died
            raise BrokenProcessPool(str(error)) from error
        except OSError as error:  # one more worker was to be started
            raise _cannot_start(error) from error
        # In its turn after one other picture at most, each ended by its alarm. What never comes is half a result: of a
        # worker that was killed while it wrote, and that the executor waits for as long as another worker lives.
        try:
            async with asyncio.timeout(3 * self._work.seconds + _ANSWER_SECONDS):
                # Shielded: a future that is cancelled while a worker dies ends the executor's own thread (Python 3.11).
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError as error:
            raise BrokenProcessPool("a decode worker gives no answer") from error


def _decode_in_time(body: bytes) -> DecodeOutcome:
    """Decode, or be killed by the alarm: nothing milder ends a loop inside a C library."""
    assert _work is not None
    signal.setitimer(signal.ITIMER_REAL, _work.seconds)
    try:
        return _work.decoder(body, _work.transform)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _new_pool(workers: int, work: _Work) -> ProcessPoolExecutor:
    """Return a pool whose first worker runs; starting the server and its libraries takes a second or more."""
    deadline = time.monotonic() + _SERVER_SECONDS
    ended = 0
    while True:
        try:
            return _start_pool(workers, work)
        except _SERVER_ENDED as error:
            if time.monotonic() > deadline:
                raise ThroughlineError(
                    f"decode workers cannot be started: their server ends again and again ({first_line(error)}); where "
                    "memory is short the system kills it, so lower images.decode_workers"
                ) from error
            time.sleep(0.05)
        except OSError as error:
            raise _cannot_start(error) from error
        except BrokenProcessPool as error:
            ended += 1
            if ended == _START_ATTEMPTS:
                raise ThroughlineError(
                    f"decode workers cannot be started: {ended} in a row ended before they took a picture, for the "
                    "reason above, or killed by the system where memory is short; then lower images.decode_workers"
                ) from error


def _cannot_start(error: OSError) -> ThroughlineError:
    said = f"decode workers cannot be started: {os_error_message(error)}"
    if error.errno in (None, errno.ENAMETOOLONG, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOSPC):
        # Without a number: the socket's path, which has room for about 100 characters, is too long.
        said += (
            f"; their server needs a socket in a folder for temporary files ({tempfile.gettempdir()}): name one that "
            "can be written to, with a short path, by TMPDIR"
        )
    return ThroughlineError(said)


def _start_pool(workers: int, work: _Work) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.download.decode_pool", "pipelines.download.resize"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(work,))
    pool.submit(os.getpid).result()
    return pool


def _end(pool: ProcessPoolExecutor) -> list[int | None]:
    """End the workers at once, hung ones too, and return their exit codes."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.kill()
    # A worker that was killed while it wrote leaves half a result: its reader waits for more unless the pipe ends too.
    pool._result_queue._writer.close()  # type: ignore[attr-defined]
    pool.shutdown(wait=True)  # an exit code can be read once, and until here the executor's thread may do it
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]
