"""Locks on outputs: one process at a time computes a fingerprint; others wait and name the process they wait for.

Uses POSIX record locks (`fcntl.lockf` on the whole lock file). The kernel releases them when their owner ends for any
reason, and a forked child never holds them, as it would with `flock`. They work between machines if the file system
supports them: NFS (not mounted with ``nolock`` or ``local_lock``), CephFS, GPFS, Lustre (mounted with ``flock``, not
``localflock``). A machine that loses its network keeps its locks until the server's lease expires, some minutes at
most. An NFS client may not see a file that another machine has just created while it caches the folder (``acdirmax``);
the work is then done twice and the first copy is kept.

A lock file is never removed: another process may have it open, and a second file of that name would be a second lock.
"""

import errno
import fcntl
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Self

from pipelines.core.errors import ThroughlineError

WAITING = "waiting: "
"""Prefix of lines that explain a wait; tools that display a run must show these lines."""
_POLL_SECONDS = 0.5
_RECORD_BYTES = 4096
_TAKEN = {errno.EAGAIN, errno.EACCES}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock, as recorded in the lock file."""

    pid: int
    host: str
    since: str
    """Date and time in UTC."""
    token: str
    """Distinguishes two locks held in turn by one process."""

    @classmethod
    def here(cls) -> Self:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(pid=os.getpid(), host=platform.node(), since=now, token=secrets.token_hex(8))

    @classmethod
    def read(cls, data: bytes) -> Self | None:
        """Return the holder in a record, or None if the record is empty or incomplete."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class OutputLock:
    """A lock that this process holds."""

    def __init__(self, path: Path, label: str, stream: BinaryIO, holder: LockHolder) -> None:
        self._path = path
        self._label = label
        self._stream = stream
        self._holder = holder

    def check(self) -> None:
        """Raise ThroughlineError if this process no longer holds the lock file.

        That happens if someone deletes it, or if a file server grants the lock to another machine.
        """
        try:
            same = os.path.samestat(os.fstat(self._stream.fileno()), self._path.stat())
        except OSError:
            same = False
        if not same or LockHolder.read(os.pread(self._stream.fileno(), _RECORD_BYTES, 0)) != self._holder:
            raise ThroughlineError(
                f"{self._label}: its lock {self._path} was removed or taken by another run in the meantime, so nothing "
                "was published; run again, finished units are kept"
            )


# Record locks belong to a process: they do not exclude its other threads, and closing any descriptor of the file
# releases them. So a process checks this table first, and never opens a lock file that it holds.
_guard = threading.Lock()
_held: dict[Path, LockHolder] = {}


@contextmanager
def hold(path: Path, label: str, wait_seconds: float | None = None) -> Iterator[OutputLock]:
    """Hold the lock at `path` while the block runs; `label` names the output in messages.

    While another process or thread holds it, waits up to `wait_seconds` (None: without limit) and names the holder on
    standard error. Raises ThroughlineError if the wait times out, and if the file system does not support locks or
    does not allow writing.
    """
    path = path.resolve()
    stream, holder = _acquire(path, label, wait_seconds)
    try:
        yield OutputLock(path, label, stream, holder)
    finally:
        with _guard:
            del _held[path]
            stream.close()


def _acquire(path: Path, label: str, wait_seconds: float | None) -> tuple[BinaryIO, LockHolder]:
    deadline = None if wait_seconds is None else time.monotonic() + wait_seconds
    reported: str | None = None
    while True:
        stream, holder = _try(path)
        if stream is not None and holder is not None:
            return stream, holder
        owner = "another process" if holder is None else str(holder)
        pause = _POLL_SECONDS
        if deadline is not None:
            pause = min(pause, deadline - time.monotonic())
            if pause <= 0:
                raise ThroughlineError(
                    f"{label}: is being computed by {owner}; this run waited {wait_seconds:g} s for it; "
                    "run again when that one has ended, or raise lock_wait_seconds"
                )
        if owner != reported:
            sys.stderr.write(f"{WAITING}{label} is being computed by {owner}; its result will be reused\n")
            sys.stderr.flush()
            reported = owner
        time.sleep(pause)


def _try(path: Path) -> tuple[BinaryIO | None, LockHolder | None]:
    """Return the locked stream with this process as holder; or no stream, and the holder if it is known."""
    with _guard:
        own = _held.get(path)
        if own is not None and own.pid == os.getpid():
            return None, own
        stream = _open(path)
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = LockHolder.here()
            stream.truncate(0)
            stream.write(json.dumps(asdict(holder)).encode())
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            with stream:
                if error.errno in _TAKEN:
                    return None, LockHolder.read(os.pread(stream.fileno(), _RECORD_BYTES, 0))
            if error.errno in _UNSUPPORTED:
                raise ThroughlineError(
                    f"{path}: this file system does not support locks ({error.strerror}), so two runs could write the "
                    "same files; mount it with locks (NFS without nolock, Lustre with flock), or choose another root"
                ) from error
            raise
        _held[path] = holder
        return stream, holder


def _open(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b")
    except PermissionError as error:
        raise ThroughlineError(
            f"{error.filename}: not writable by this user ({error.strerror}); users who share an output root "
            "need write access to all of it: one group, setgid folders, umask 002"
        ) from error
