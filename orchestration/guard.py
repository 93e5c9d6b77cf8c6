"""Runs a command and takes it, with all that it started, down when this process is asked to end.

The launcher has the kernel send SIGTERM here when the launcher dies, even by SIGKILL. That reaches one process only,
and `accelerate launch` would leave its workers behind; the whole process group goes instead. Standard library alone,
because it starts before every stage.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

_STOP_SECONDS = 10.0


def main() -> None:
    """Run ``<launcher's pid> <command>``, and end as the command ends."""
    launcher_pid, command = int(sys.argv[1]), sys.argv[2:]
    process = subprocess.Popen(command)

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
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
