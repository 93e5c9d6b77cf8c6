"""Requirements on every node of a Ray cluster, checked on the node itself."""

import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pipelines.core.environment import package_versions
from pipelines.core.errors import ThroughlineError

_PACKAGES = ("numpy", "pillow", "pyarrow")
"""Packages that determine the bytes of the data stages: their versions must be the same on every node."""
_TOKEN_FILE = "token"


@dataclass(frozen=True)
class NodeRequirements:
    """The output folder must be mounted and writable, and package versions must be those of the driver."""

    folder: Path
    token: str
    """Content of a file in `folder`, which proves that a node sees the same folder."""
    versions: dict[str, str]

    def write_token(self) -> None:
        (self.folder / _TOKEN_FILE).write_text(self.token)

    def check(self) -> None:
        """Raise ThroughlineError, naming this node, if a requirement is not met."""
        node = f"node {platform.node()} ({_node_address()})"
        try:
            is_mounted = (self.folder / _TOKEN_FILE).read_text() == self.token
        except OSError:
            is_mounted = False
        if not is_mounted:
            raise ThroughlineError(
                f"{node} of the Ray cluster does not see {self.folder}; mount the output folder on every node at the "
                "same path, or set the stage's workers.ray_address to null"
            )
        if not os.access(self.folder, os.W_OK):
            raise ThroughlineError(f"{node} of the Ray cluster cannot write to {self.folder}; mount it read-write")
        found = local_versions()
        if found != self.versions:
            name = next(name for name in _PACKAGES if found.get(name) != self.versions.get(name))
            raise ThroughlineError(
                f"{node} of the Ray cluster has {name} {found.get(name, '(not installed)')}, this process "
                f"{self.versions.get(name, '(not installed)')}; install the same version on every node, or outputs "
                "would differ"
            )


@lru_cache
def local_versions() -> dict[str, str]:
    """Return this process's versions of the packages that must be the same on every node."""
    return {name: version for name, version in package_versions().items() if name in _PACKAGES}


def _node_address() -> str:
    import ray

    return ray.util.get_node_ip_address()
