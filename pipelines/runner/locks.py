"""Locks on outputs: one process at a time works on a fingerprint; others wait and say for whom.

What is relied upon: POSIX record locks (`fcntl.lockf` on the whole lock file). The kernel gives them back when their
owner ends, however it ends, and a child that the owner forked never holds them, which `flock` would let it. Between
machines they hold where the file system carries them: NFS (not mounted with ``nolock`` or ``local_lock``), CephFS,
GPFS, Lustre (mounted with ``flock``, not ``localflock``). A machine that falls off the network keeps its locks until
the server's lease on them ends, some minutes at most. A client may also take a name that another machine has just made
for missing for as long as it remembers folders (NFS: ``acdirmax``); the work is then done twice and the first copy
stays.

A lock file is never removed: another process may hold it open, and two files of one name would be two locks.
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
"""How a line begins that says what a run waits for; whoever shows a run shows these lines."""
_POLL_SECONDS = 0.5
_RECORD_BYTES = 4096
_TAKEN = {errno.EAGAIN, errno.EACCES}
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, as it wrote itself into the lock file."""

    pid: int
    host: str
    since: str
    """Date and time in UTC."""
    token: str
    """Tells two holdings of one process apart."""

    @classmethod
    def here(cls) -> Self:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(pid=os.getpid(), host=platform.node(), since=now, token=secrets.token_hex(8))

    @classmethod
    def read(cls, data: bytes) -> Self | None:
        """Return who wrote the record, or None where it is empty or half written."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class OutputLock:
    """A lock that this process holds."""

    def __init__(self, path: Path, label: str, stream: BinaryIO, holder: Holder) -> None:
        self._path = path
        self._label = label
        self._stream = stream
        self._holder = holder

    def check(self) -> None:
        """Raise ThroughlineError where the lock file is no longer this process's own.

        That happens when someone deletes it, or when a file server gave the lock to another machine.
        """
        try:
            same = os.path.samestat(os.fstat(self._stream.fileno()), self._path.stat())
        except OSError:
            same = False
        if not same or Holder.read(os.pread(self._stream.fileno(), _RECORD_BYTES, 0)) != self._holder:
            raise ThroughlineError(
                f"{self._label}: its lock {self._path} was removed or taken by another run in the meantime, so nothing "
                "was published; run again, what is finished is kept"
            )


# Record locks belong to a process: its threads do not keep each other out, and closing any descriptor of the file
# gives the lock back. So a process looks here first, and opens a lock file that it holds no second time.
_guard = threading.Lock()
_held: dict[Path, Holder] = {}


@contextmanager
def hold(path: Path, label: str, wait_seconds: float | None = None) -> Iterator[OutputLock]:
    """Hold the lock at `path` while the block runs; `label` names the output to people.

    While another process or thread holds it, waits up to `wait_seconds` (None: as long as it takes) and says on
    standard error for whom. Raises ThroughlineError when the wait is over, and where the file system gives no locks
    or no right to write.
    """
    path = path.resolve()
    stream, holder = _acquire(path, label, wait_seconds)
    try:
        yield OutputLock(path, label, stream, holder)
    finally:
        with _guard:
            del _held[path]
            stream.close()


def _acquire(path: Path, label: str, wait_seconds: float | None) -> tuple[BinaryIO, Holder]:
    deadline = None if wait_seconds is None else time.monotonic() + wait_seconds
    told: str | None = None
    while True:
        stream, holder = _try(path)
        if stream is not None and holder is not None:
            return stream, holder
        whom = "another process" if holder is None else str(holder)
        pause = _POLL_SECONDS
        if deadline is not None:
            pause = min(pause, deadline - time.monotonic())
            if pause <= 0:
                raise ThroughlineError(
                    f"{label}: is being computed by {whom}; this run waited {wait_seconds:g} s for it; "
                    "run again when that one has ended, or allow more with lock_wait_seconds"
                )
        if whom != told:
            sys.stderr.write(f"{WAITING}{label} is being computed by {whom}; its result will be reused\n")
            sys.stderr.flush()
            told = whom
        time.sleep(pause)


def _try(path: Path) -> tuple[BinaryIO | None, Holder | None]:
    """Return the locked stream and this process as its holder; or no stream, and the holder where it is known."""
    with _guard:
        own = _held.get(path)
        if own is not None and own.pid == os.getpid():
            return None, own
        stream = _open(path)
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = Holder.here()
            stream.truncate(0)
            stream.write(json.dumps(asdict(holder)).encode())
            stream.flush()
            os.fsync(stream.fileno())
        except OSError as error:
            with stream:
                if error.errno in _TAKEN:
                    return None, Holder.read(os.pread(stream.fileno(), _RECORD_BYTES, 0))
            if error.errno in _UNSUPPORTED:
                raise ThroughlineError(
                    f"{path}: this file system gives no locks ({error.strerror}), so two runs could write the same "
                    "files; mount it with locks (NFS without nolock, Lustre with flock), or use another output root"
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
            f"{error.filename}: may not be written by this user ({error.strerror}); whoever shares an output root "
            "needs write access to all of it: one group, setgid folders, umask 002"
        ) from error
