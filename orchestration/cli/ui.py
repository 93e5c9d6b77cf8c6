"""`throughline ui`: Dagster's web interface and daemon on the loopback, over the outputs of a profile."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from orchestration.cli.run import Run
from orchestration.defs.assets import register_parts
from orchestration.defs.instance import open_instance
from orchestration.graph.execution import Execution
from orchestration.graph.resolution import INDEX
from orchestration.launch.launcher import PROJECT_ROOT, end_with_parent
from pipelines.core.environment import HOME, PROFILE, home_folder, profile_name
from pipelines.core.errors import ThroughlineError

_HOST = "127.0.0.1"
_LAST_PORT = 65535
_STOP_SECONDS = 60


def serve(execution: Execution, profile: str | None, changes: Sequence[str], port: int) -> int:
    """Prepare the profile, then serve until stopped; return the exit status."""
    from orchestration.console import Console

    refuse_taken_port(port)
    console = Console()
    plan, home = execution.plan, home_folder()
    with open_instance(home) as instance:
        # Parts are Dagster partitions only once the index has registered them; without them "Materialize all" would
        # have nothing to divide the data assets by.
        Run(execution, instance, console).execute("selected", [plan.graph[INDEX]])
        register_parts(instance, plan)
    environment = {**os.environ, HOME: str(home), PROFILE: _profile_for_children(execution, profile, changes)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    # `dagster dev` says at each start that `dg dev` is preferred; that one comes with a package for developers alone.
    command = [sys.executable, "-W", "ignore::Warning", "-m", "dagster", "dev", "-m", "orchestration.definitions"]
    command += ["--host", _HOST, "--port", str(port)]
    console.line(f"Dagster: http://{_HOST}:{port}  (stop with Ctrl-C)")
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_listen_and_end_with_parent)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        return 0


def _listen_and_end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts in the background
    end_with_parent()


def refuse_taken_port(port: int) -> None:
    """Raise ThroughlineError where the port is none, or can't be listened on, most often since something does."""
    if not 1 <= port <= _LAST_PORT:
        raise ThroughlineError(f"--port {port}: expected 1 to {_LAST_PORT}; leave it out for the default")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ThroughlineError(
                    f"port {port} on {_HOST} can't be used ({error.strerror}); choose another with --port"
                ) from error
            raise ThroughlineError(
                f"port {port} on {_HOST} is taken ({error.strerror}); stop what listens there, or choose another "
                "with --port"
            ) from error


def _profile_for_children(execution: Execution, name: str | None, changes: Sequence[str]) -> str:
    """Return a profile name that other processes understand: changes are written to a file."""
    base = name or profile_name()
    if not changes:
        return base
    profile = execution.plan.profile
    content = profile.model_dump(mode="json")
    path = home_folder() / "profiles" / f"{profile.name}-changed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"base": profile.name, **content}, indent=1))
    return str(path)
