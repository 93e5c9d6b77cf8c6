"""Whether a Ray cluster answers where a profile names one, found out without importing Ray.

Ray finds the cluster of ``auto`` by RAY_ADDRESS, by the file that `ray start` leaves behind, or among the processes of
this machine; so does this. That something listens there is all that is asked: version and token are Ray's business.
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
    """Return address -> fields that name it, of the clusters that some part of a configuration is to run on."""
    found: dict[str, list[str]] = {}
    for path, address in _addresses(config, ""):
        if address != LOCAL_RAY:
            found.setdefault(address, []).append(path)
    return found


def _addresses(config: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    fields = {name: getattr(config, name) for name in type(config).model_fields}
    asks_by_http = any(getattr(value, "kind", None) == "openai" for value in fields.values())
    for name, value in fields.items():
        if name == "ray_address" and isinstance(value, str):
            yield prefix + name, value
        elif isinstance(value, BaseModel) and not (name == "pool" and asks_by_http):
            yield from _addresses(value, f"{prefix}{name}.")


def probe(address: str) -> str:
    """Return where the cluster of an address listens, ``host:port``; raises ThroughlineError where none does."""
    where = _discovered() if address == AUTO else address
    if where is None:
        raise ThroughlineError("no Ray cluster is known on this machine")
    host, colon, port = where.removeprefix(_CLIENT_SCHEME).rpartition(":")
    if not colon and where.startswith(_CLIENT_SCHEME):
        host, port = port, str(_CLIENT_PORT)
    if not host or not port.isdigit():
        raise ThroughlineError(f"{where!r} is no address of a Ray cluster, expected host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except (OSError, OverflowError) as error:  # a port over 65535 overflows
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ThroughlineError(f"nothing answers at {host}:{port} within {_SECONDS:g} s ({reason})") from error
    return f"{host}:{port}"


def _discovered() -> str | None:
    """Return the address that ``auto`` stands for here."""
    named = ray_address()
    if named is not None and named != AUTO:
        if named == LOCAL_RAY:
            raise ThroughlineError(f"{RAY_ADDRESS} is {LOCAL_RAY}, which stands before every other address")
        return named
    file = ray_folder() / "ray_current_cluster"
    left_behind = file.read_text().strip() if file.is_file() else ""
    running = {address for path in Path("/proc").glob("[0-9]*/cmdline") for address in _of_process(path)}
    # Where several run, the one that was started last is joined; else the one that runs, whoever started it.
    if len(running) == 1:
        return next(iter(running))
    return left_behind or min(running, default=None)


def _of_process(command_line: Path) -> list[str]:
    try:
        words = command_line.read_bytes().split(b"\0")
    except OSError:
        return []  # it ended, or is somebody else's
    if not words[0].endswith(b"/raylet"):
        return []
    return [word.decode().removeprefix(_FLAG) for word in words if word.startswith(_FLAG.encode())]
