"""Options that several commands share, and checks of the folders that users name, made before anything starts.

Importing it loads only the standard library, so that `throughline --help` is quick.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.core.errors import ThroughlineError

if TYPE_CHECKING:
    from orchestration.graph.execution import Execution
    from orchestration.profiles.profile import Profile


class UnusableFolder(ThroughlineError):
    """A folder that can't be used: the problem, and the command or option that names another."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}; name another with: {fix}")
        self.problem, self.fix = problem, fix


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose a profile and change it."""
    parser.add_argument(
        "--profile", help="demo, single_gpu, paper, or a TOML file with a base; default: THROUGHLINE_PROFILE, or demo"
    )
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE",
        help="change a field of the profile, such as training.steps=50; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--output-root", dest="changes", action="append", type=_output_root, metavar="FOLDER|s3://BUCKET/PREFIX",
        help="where outputs are stored; default: `outputs` under THROUGHLINE_HOME",
    )  # fmt: skip


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declare ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def _output_root(location: str) -> str:
    """Return the change of a profile that sets its output root."""
    if not location:
        raise ThroughlineError(
            "--output-root '': expected a folder or s3://bucket/prefix, found none (an unset shell "
            "variable?); name one, or omit the option"
        )
    return f"outputs={json.dumps(location if '://' in location else str(Path(location).absolute()))}"


def load_profile(name: str | None, changes: Sequence[str]) -> "Profile":
    """Return the named profile with changes applied; None names that of the environment."""
    from orchestration.profiles import loading
    from pipelines.core.environment import home_folder, profile_name

    return loading.load_profile(name or profile_name(), home_folder(), changes)


def load_execution(arguments: argparse.Namespace) -> "Execution":
    """Return the graph under the chosen profile, ready to run; raises ThroughlineError if its storage can't be used."""
    from orchestration.demo_services import service_hooks
    from orchestration.graph.execution import Execution
    from orchestration.graph.nodes import GRAPH
    from orchestration.graph.resolution import Plan
    from pipelines.storage.mirror import store_of

    profile = load_profile(arguments.profile, arguments.changes)
    root = usable_root(profile)
    store = store_of(root)
    if store is not None:
        store.check()
    return Execution(plan=Plan(GRAPH, profile, root), log_folder=profile.log_folder, hooks=service_hooks(profile))


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def require_folder(folder: Path, name: str, fix: str, *, writable: bool = False) -> None:
    """Raise UnusableFolder if `folder` or one of its parents is a file, or if `writable` and it can't be written to.

    `name` is what the user knows the folder as, `fix` what names another. The folder need not exist.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        found = "a file" if nearest == folder.absolute() else f"the file {nearest} in its path"
        if nearest.is_symlink() and not nearest.exists():
            found = f"the broken link {nearest}"
        raise UnusableFolder(f"{name} {folder}: expected a folder, found {found}", fix)
    if writable and not os.access(nearest, os.W_OK | os.X_OK):
        raise UnusableFolder(f"{name} {folder}: expected a writable folder, can't write to {nearest}", fix)


def require_home(home: Path, *, writable: bool = False) -> None:
    """Raise UnusableFolder if outputs, logs and history can't be stored under a home."""
    from pipelines.core.environment import HOME

    require_folder(home, HOME, f"export {HOME}=/a/folder", writable=writable)


def require_output_root(profile: "Profile", *, writable: bool = False) -> None:
    """Raise UnusableFolder if the output root can't be a folder."""
    require_folder(profile.output_root, "output root", "--output-root /a/folder", writable=writable)


def usable_root(profile: "Profile") -> Path:
    """Return the opened output root; raises UnusableFolder if it or the profile's home can't be a folder."""
    require_home(Path(profile.home))
    require_output_root(profile)
    return profile.open_output_root()
