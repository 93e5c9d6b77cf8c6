"""Runs a command and takes it, with all that it started, down when this process is asked to end.

The launcher has the kernel send SIGTERM here when the launcher dies, even by SIGKILL. That reaches one process only,
and `accelerate launch` would leave its workers behind; the whole process group goes instead. Standard library alone,
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
_LOOK_SECONDS = 0.05


def _is_in_company() -> bool:
    """Whether another process of this group lives still.

    Not the place for `Popen.wait`, which waits in vain where a signal has interrupted a wait for the same process.
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
    """Run ``<launcher's pid> <command>``, and end as the command ends."""
    launcher_pid, command = int(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(command)

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while _is_in_company() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    if os.getppid() != launcher_pid:
        stop(signal.SIGTERM, None)  # the launcher died before the signal was arranged
    status = process.wait()
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
