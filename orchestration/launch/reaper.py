"""Runs a command, and on SIGTERM stops the command with all its descendants.

The kernel sends SIGTERM when the launcher dies, even by SIGKILL. The signal reaches only this process, and `accelerate
launch` would leave its workers behind, so the whole process group is stopped. Imports only the standard library,
because it starts before every stage.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import FrameType

_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.05


def _group_is_alive() -> bool:
    """Return whether another process of this group is still alive.

    `Popen.wait` would block forever if the signal interrupted a wait for the same process.
    """
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    others = (int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit())
    for pid in others:
        with suppress(ProcessLookupError):
            if pid != os.getpid() and os.getpgid(pid) == os.getpgrp():
                return True
    return False


def main() -> None:
    """Run the command of ``<launcher's PID> <command>``, and exit with its status or signal."""
    launcher_pid, command = int(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(command)

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while _group_is_alive() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    if os.getppid() != launcher_pid:
        stop(signal.SIGTERM, None)  # the launcher died before the kernel was asked for the signal
    status = process.wait()
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
