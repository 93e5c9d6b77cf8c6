"""`throughline ui`: Dagster's web interface and daemon on the loopback interface, over the outputs of a profile."""

import argparse
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from orchestration.cli.options import add_profile_arguments, load_execution
from orchestration.cli.run import Run
from orchestration.defs.assets import register_parts
from orchestration.defs.instance import open_instance
from orchestration.graph.execution import Execution
from orchestration.graph.resolution import INDEX
from orchestration.launch.launcher import PROJECT_ROOT, end_with_parent
from pipelines.core.environment import HOME, PROFILE, home_folder, profile_name
from pipelines.core.errors import ThroughlineError

_HOST = "127.0.0.1"
_DEFAULT_PORT = 3000
_LAST_PORT = 65535
_STOP_SECONDS = 60


def serve(execution: Execution, profile: str | None, changes: Sequence[str], port: int) -> int:
    """Prepare the profile, then serve until stopped; return the exit status."""
    from orchestration.console import Console

    check_port(port)
    console = Console()
    plan, home = execution.plan, home_folder()
    with open_instance(home) as instance:
        # The index registers parts as Dagster partitions. Until then "Materialize all" finds none for the data assets.
        Run(execution, instance, console).execute("selected", [plan.graph[INDEX]])
        register_parts(instance, plan)
    environment = {**os.environ, HOME: str(home), PROFILE: _profile_for_children(execution, profile, changes)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    # `dagster dev` warns at each start that `dg dev` is preferred, which only a package for developers provides.
    command = [sys.executable, "-W", "ignore::Warning", "-m", "dagster", "dev", "-m", "orchestration.definitions"]
    command += ["--host", _HOST, "--port", str(port)]
    console.line(f"Dagster: http://{_HOST}:{port}  (stop with Ctrl-C)")
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_prepare_child)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        return 0


def _prepare_child() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background command ignores SIGINT
    end_with_parent()


def check_port(port: int) -> None:
    """Raise ThroughlineError if the port number is invalid, or the port is taken or otherwise unusable."""
    if not 1 <= port <= _LAST_PORT:
        raise ThroughlineError(f"--port {port}: expected 1 to {_LAST_PORT}; omit it for the default")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ThroughlineError(
                    f"port {port} on {_HOST} can't be used ({error.strerror}); choose another port with --port"
                ) from error
            raise ThroughlineError(
                f"port {port} on {_HOST} is taken ({error.strerror}); stop the process that uses it, or choose another "
                "port with --port"
            ) from error


def _profile_for_children(execution: Execution, name: str | None, changes: Sequence[str]) -> str:
    """Return a profile name that other processes can load; a profile with changes is written to a file."""
    base = name or profile_name()
    if not changes:
        return base
    profile = execution.plan.profile
    content = profile.model_dump(mode="json")
    path = home_folder() / "profiles" / f"{profile.name}-changed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"base": profile.name, **content}, indent=1))
    return str(path)


def add_ui_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ui`."""
    add_profile_arguments(parser)
    parser.add_argument(
        "--port", type=int, default=_DEFAULT_PORT, help=f"port on the loopback interface; default {_DEFAULT_PORT}"
    )


def run_ui(arguments: argparse.Namespace) -> int:
    """Serve until stopped; return the exit status."""
    return serve(load_execution(arguments), arguments.profile, arguments.changes, arguments.port)
