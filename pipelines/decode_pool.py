"""Worker processes that decode pictures, and that may hang or die without taking the job along."""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self

from pipelines.fetch_status import FetchStatus
from pipelines.image_decode import DecodeOutcome, decode
from pipelines.stage_configs import ImageTransform

_ORPHAN_CHECK_SECONDS = 1.0
Decoder = Callable[[bytes, ImageTransform], DecodeOutcome]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Work:
    """What a worker is told once, so that nothing but bodies travels to it."""

    decoder: Decoder
    transform: ImageTransform
    seconds: float


_work: _Work | None = None


def _start_worker(parent: int, work: _Work) -> None:
    """End this worker when its parent is gone: a killed parent closes no pipe that a worker would notice.

    An interrupt from the terminal reaches workers too; their parent is the one to act on it.
    """
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_ORPHAN_CHECK_SECONDS)
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
        if self._pool is None:
            self._pool = _new_pool(self._workers, self._work)
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
            self._pool_of_one = _new_pool(1, self._work)
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
        except RuntimeError as error:  # it was shut down while this picture waited, because a worker of it died
            raise BrokenProcessPool(str(error)) from error
        # Shielded, because a future that is cancelled while a worker dies ends the executor's own thread (Python 3.11).
        return await asyncio.shield(asyncio.wrap_future(future))


def _decode_in_time(body: bytes) -> DecodeOutcome:
    """Decode, or be killed by the alarm: nothing milder ends a loop inside a C library."""
    assert _work is not None
    signal.setitimer(signal.ITIMER_REAL, _work.seconds)
    try:
        return _work.decoder(body, _work.transform)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _new_pool(workers: int, work: _Work) -> ProcessPoolExecutor:
    # Spawned, because this process has threads (name resolution, the executor's own) that a fork would copy halfway.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(os.getpid(), work))


def _end(pool: ProcessPoolExecutor) -> list[int | None]:
    """End the workers at once, hung ones too, and return their exit codes."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    pool.shutdown(wait=False)
    return [_exit_code(process) for process in processes]


def _exit_code(process: BaseProcess) -> int | None:
    """Return the exit code of a process that has ended.

    The executor's own thread waits for the same process. Whoever comes second is told that there is no such process,
    and sees no code until the first has written it down.
    """
    deadline = time.monotonic() + 1.0
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return process.exitcode
