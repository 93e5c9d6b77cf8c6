"""Checks that a profile's Ray clusters are reachable, without importing Ray.

Resolves ``auto`` as Ray does: by RAY_ADDRESS, by the file that `ray start` writes, or by the processes of this machine.
It only checks that something listens there; Ray itself checks version and token.
"""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from pipelines.cluster.session import LOCAL_RAY
from pipelines.core.environment import RAY_ADDRESS, ray_address, ray_folder
from pipelines.core.errors import ThroughlineError

AUTO = "auto"
_SECONDS = 3.0
_CLIENT_SCHEME = "ray://"
_CLIENT_PORT = 10001
_FLAG = "--gcs-address="


def named_clusters(config: BaseModel) -> Mapping[str, list[str]]:
    """Return address -> names of the fields that hold it, for each cluster that a configuration uses."""
    found: dict[str, list[str]] = {}
    for path, address in _addresses(config, ""):
        if address != LOCAL_RAY:
            found.setdefault(address, []).append(path)
    return found


def _addresses(config: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    uses_http = any(getattr(value, "kind", None) == "openai" for value in fields.values())
    for name, value in fields.items():
        if name == "ray_address" and isinstance(value, str):
            yield prefix + name, value
        elif isinstance(value, BaseModel) and not (name == "pool" and uses_http):
            yield from _addresses(value, f"{prefix}{name}.")


def probe(address: str) -> str:
    """Return the ``host:port`` where an address's cluster listens; raises ThroughlineError if none does."""
    endpoint = _discovered() if address == AUTO else address
    if endpoint is None:
        raise ThroughlineError("no Ray cluster is known on this machine")
    host, colon, port = endpoint.removeprefix(_CLIENT_SCHEME).rpartition(":")
    if not colon and endpoint.startswith(_CLIENT_SCHEME):
        host, port = port, str(_CLIENT_PORT)
    if not host or not port.isdigit():
        raise ThroughlineError(f"{endpoint!r} is not the address of a Ray cluster, expected host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:  # a port over 65535 overflows
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ThroughlineError(f"nothing answers at {host}:{port} within {_SECONDS:g} s ({reason})") from error
    return f"{host}:{port}"


def _discovered() -> str | None:
    """Return the address that ``auto`` resolves to on this machine."""
    named = ray_address()
    if named is not None and named != AUTO:
        if named == LOCAL_RAY:
            raise ThroughlineError(f"{RAY_ADDRESS} is {LOCAL_RAY}, which overrides every other address")
        return named
    file = ray_folder() / "ray_current_cluster"
    written = file.read_text().strip() if file.is_file() else ""
    running = {address for path in Path("/proc").glob("[0-9]*/cmdline") for address in _of_process(path)}
    # Of several running clusters, join the one started last, which the file names.
    if len(running) == 1:
        return next(iter(running))
    return written or min(running, default=None)


def _of_process(command_line: Path) -> list[str]:
    try:
        words = command_line.read_bytes().split(b"\0")
    except OSError:
        return []  # it has exited, or belongs to another user
    if not words[0].endswith(b"/raylet"):
        return []
    return [word.decode().removeprefix(_FLAG) for word in words if word.startswith(_FLAG.encode())]
