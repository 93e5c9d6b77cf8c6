"""Source files from outside the graph: finding them, digesting each once, locating them by content.

A remote file (see `pipelines.storage.remote_files`) is copied into the folder ``sources`` next to the digest cache when
it is first read.
"""

import glob
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.core.atomic import write_json
from pipelines.core.digest import file_sha256
from pipelines.core.environment import home_folder
from pipelines.core.errors import ThroughlineError
from pipelines.laion.config import EntryList, LaionIndexConfig, SourceContent
from pipelines.storage.remote_files import RemoteFile, file_name, find_files, is_url, with_stated_digest

SUFFIX = ".parquet"

SourcePlace = Path | RemoteFile


def find_sources(sources: Sequence[str]) -> dict[str, SourcePlace]:
    """Return name -> place of the parquet files in folders, globs, files and URLs, sorted by name.

    In folders, paths with a component that begins with ``.`` or ``_`` are skipped, as Spark and Hadoop do. Raises
    ThroughlineError where a source is missing, holds no parquet file, or two files share a name.
    """
    found: dict[str, SourcePlace] = {}
    for source in sources:
        for name, path in _expand(source):
            if name in found and found[name] != path:
                raise ThroughlineError(
                    f"{path} and {found[name]}: two metadata files share the name {name}; "
                    "name their common folder as the source instead"
                )
            found[name] = path
    return dict(sorted(found.items()))


def _expand(source: str) -> Sequence[tuple[str, SourcePlace]]:
    if is_url(source):
        return find_files(source, SUFFIX)
    path = Path(source)
    if path.is_dir():
        files = sorted(item for item in path.rglob(f"*{SUFFIX}") if item.is_file() and not _is_hidden(item, path))
        if not files:
            contents = "is empty" if not any(path.iterdir()) else f"holds no {SUFFIX} file"
            raise ThroughlineError(f"{source}: the folder {contents}; put LAION metadata there or name another source")
        return [(item.relative_to(path).as_posix(), item.absolute()) for item in files]
    if path.is_file():
        if path.suffix.lower() != SUFFIX:
            raise ThroughlineError(f"{source}: expected a {SUFFIX} file of LAION metadata")
        return [(path.name, path.absolute())]
    if glob.has_magic(source):
        files = sorted(Path(item) for item in glob.glob(source, recursive=True) if Path(item).is_file())  # noqa: PTH207 - absolute patterns
        if not files:
            raise ThroughlineError(f"{source}: no file matches this pattern; check the path")
        return [(item.name, item.absolute()) for item in files]
    raise ThroughlineError(f"{source}: no such file or folder; name LAION metadata as a folder, glob or parquet file")


def _could_hold(source: str, name: str) -> bool:
    """Return whether a source may hold a file of that name; the URL of a single file contains the name."""
    return not is_url(source) or not source.endswith(SUFFIX) or glob.has_magic(source) or file_name(source) == name


def local_path(place: SourcePlace, cache_file: Path | None = None) -> Path:
    """Return the local path of a file; a remote file is copied first."""
    return place if isinstance(place, Path) else place.copy(_copies(cache_file))


def size_of(place: SourcePlace) -> int:
    """Return the size of a file in bytes."""
    return place.stat().st_size if isinstance(place, Path) else place.num_bytes


def _copies(cache_file: Path | None) -> Path:
    return (home_folder() / "cache" if cache_file is None else cache_file.parent) / "sources"


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.relative_to(root).parts)


def digest_sources(files: Mapping[str, SourcePlace], cache_file: Path | None = None) -> tuple[SourceContent, ...]:
    """Return names, digests and sizes, reading only files that are new or changed since `cache_file` was written.

    For a remote file the digest stated by the server is used, if there is one.
    """
    cache = _DigestCache(cache_file)
    content = []
    for name, place in files.items():
        content.append(SourceContent(name=name, sha256=cache.digest(place), num_bytes=size_of(place)))
    cache.save()
    return tuple(content)


def scan_index(source: str | Path | Sequence[str], digest_cache: Path | None = None) -> LaionIndexConfig:
    """Return the configuration of the index over the parquet files of `source`.

    Files are read to digest them; with `digest_cache`, only if they are new or changed. Raises ThroughlineError where a
    folder or file is missing, or no parquet file is found.
    """
    sources = (str(source),) if isinstance(source, str | Path) else tuple(map(str, source))
    content = digest_sources(find_sources(sources), digest_cache)
    return LaionIndexConfig(
        source=sources, content=content, digest_cache=str(digest_cache) if digest_cache is not None else None
    )


def scan_entry_list(path: str | Path) -> EntryList:
    """Return a list file with its digest; raises ThroughlineError where it can't be read."""
    try:
        return EntryList(path=str(Path(path).absolute()), sha256=file_sha256(Path(path)))
    except OSError as error:
        raise ThroughlineError(f"{path}: the list can't be read ({error.strerror}); check the path") from error


def locate_source(content: SourceContent, sources: Sequence[str], cache_file: Path | None = None) -> Path:
    """Return the local path of the file of that name and content.

    Raises ThroughlineError where the file is missing, or has changed since the index registered it.
    """
    place = find_sources([source for source in sources if _could_hold(source, content.name)]).get(content.name)
    if place is None:
        raise ThroughlineError(f"{content.name}: registered in the index, but not found under {', '.join(sources)}")
    path = local_path(place, cache_file)
    found = digest_sources({content.name: path}, cache_file)[0]
    if found.sha256 != content.sha256:
        raise ThroughlineError(
            f"{place}: SHA-256 {found.sha256[:12]}..., the index registered {content.sha256[:12]}...; "
            "the file has changed, re-run laion_index"
        )
    return path


class _DigestCache:
    """Digests by path, valid while size, modification time and inode are unchanged."""

    def __init__(self, cache_file: Path | None) -> None:
        self._file = cache_file
        self._changed = False
        self._entries: dict[str, list] = {}
        if cache_file is not None and cache_file.exists():
            try:
                self._entries = json.loads(cache_file.read_bytes())
            except ValueError as error:
                raise ThroughlineError(f"{cache_file}: not a digest cache ({error}); delete it") from error

    def digest(self, place: SourcePlace) -> str:
        if isinstance(place, Path):
            stat = place.stat()
            state: list[int | str] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        else:
            state = [place.num_bytes, place.etag, "on a server"]
        entry = self._entries.get(str(place))
        if entry is not None and entry[:3] == state:
            return entry[3]
        if isinstance(place, RemoteFile):
            place = with_stated_digest(place)
            sha256 = place.sha256 or file_sha256(local_path(place, self._file))
        else:
            sha256 = file_sha256(place)
        self._entries[str(place)] = [*state, sha256]
        self._changed = True
        return sha256

    def save(self) -> None:
        if self._file is not None and self._changed:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may save at once: each writes its own file, and the last rename wins.
            own = self._file.with_name(f"{self._file.name}.{os.getpid()}-{threading.get_ident()}")
            write_json(own, self._entries)
            own.replace(self._file)
