"""Checks a folder of WebDataset tars, of this project or any other, for everything that would break a reader.

Every tar is read once, from start to end; nothing in it is run, extracted or unpickled.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from pipelines.shards.lint_checks import Finding, LintReport, ShardChecks, printable
from pipelines.shards.tar import DamagedTarError, walk

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def find_shards(folder: Path) -> list[Path]:
    """Return the tars under a folder at any depth, sorted; raises ThroughlineError if there is none."""
    if not folder.is_dir():
        raise ThroughlineError(f"{folder}: no such folder; name one that contains WebDataset tars")
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(_TAR_SUFFIXES) and path.is_file())
    if not paths:
        raise ThroughlineError(f"{folder}: no tars here ({', '.join(_TAR_SUFFIXES)}); name a folder of WebDataset tars")
    return paths


def lint_folder(
    folder: Path, *, decode: bool = False, on_shard: Callable[[LintReport], None] = lambda report: None
) -> LintReport:
    """Check every tar under `folder`; with `decode` all pixels of each image are decoded, not only its header.

    The shards of one manifest of this project form a set, and all other tars under `folder` form another: keys must be
    unique within a set. `on_shard` is called after each shard.
    """
    report = LintReport(folder)
    manifests: dict[Path, Manifest | None] = {}
    first_shards: dict[tuple[Path, str], str] = {}
    for path in find_shards(folder):
        if path.parent not in manifests:
            manifests[path.parent] = _manifest(path.parent, report)
        manifest = manifests[path.parent]
        name = path.relative_to(folder).as_posix()
        entry = _entry(manifest, path.name)
        shard = ShardChecks(name, report, decode=decode, is_ours=entry is not None)
        _read_shard(path, shard, entry, report)
        for key in shard.keys:
            first = first_shards.setdefault((path.parent if manifest else folder, key), name)
            if first != name:
                shard.report("duplicate_key", key, f"also in {first}")
        if manifest is not None and entry is None:
            shard.report("file_unlisted", "", f"{MANIFEST_NAME} of {manifest.stage} does not list it")
        on_shard(report)
    for parent, manifest in manifests.items():
        if manifest is not None:
            _check_other_files(parent, manifest, report)
    return report


def _manifest(folder: Path, report: LintReport) -> Manifest | None:
    """Return this project's manifest in a folder, or None; other tools may use the same file name."""
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        content, problem = None, str(error)
    else:
        if not isinstance(content, dict) or not {"stage", "data_version", "files"} <= content.keys():
            return None
        problem = ""
    try:
        return read_manifest(path) if content else _raise(problem)
    except ThroughlineError as error:
        name = path.relative_to(report.folder).as_posix()
        report.findings.append(Finding("manifest", name, "", printable(str(error))))
        return None


def _raise(problem: str) -> Manifest:
    raise ThroughlineError(f"not readable ({problem})")


def _entry(manifest: Manifest | None, name: str) -> FileEntry | None:
    return next((item for item in manifest.files if item.path == name), None) if manifest else None


def _check_other_files(folder: Path, manifest: Manifest, report: LintReport) -> None:
    for entry in manifest.files:
        path = folder / entry.path
        name = path.relative_to(report.folder).as_posix()
        if not path.is_file():
            report.findings.append(Finding("file_missing", name, "", f"{MANIFEST_NAME} of {manifest.stage} lists it"))
        elif not path.name.endswith(_TAR_SUFFIXES) and file_sha256(path) != entry.sha256:
            report.findings.append(Finding("hash_disagrees", name, "", "not the SHA-256 that the manifest states"))


class _HashingReader:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.hash = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self.hash.update(data)
        self.num_bytes += len(data)
        return data


def _read_shard(path: Path, shard: ShardChecks, entry: FileEntry | None, report: LintReport) -> None:
    is_intact = True
    with path.open("rb") as stream:
        reader = _HashingReader(stream)
        source = io.BufferedReader(_Gunzip(reader)) if path.name.endswith("gz") else reader
        try:
            for member in walk(source):
                shard.add(member)
        except DamagedTarError as error:
            is_intact = False
            shard.report(error.kind, "", str(error))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            is_intact = False
            shard.report("cut_short", "", f"the compressed data is damaged ({error})")
        shard.finish()
        while reader.read(1 << 20):
            pass
    report.num_shards += 1
    report.num_bytes += reader.num_bytes
    if is_intact:
        shard.check_index(path, reader.num_bytes)
    if entry is None:
        return
    report.num_shards_with_digest += 1
    if reader.hash.hexdigest() != entry.sha256:
        shard.report("hash_disagrees", "", "not the SHA-256 that the manifest states")
    if is_intact and entry.num_rows is not None and len(shard.keys) != entry.num_rows:
        shard.report("count_disagrees", "", f"{len(shard.keys)} samples, the manifest says {entry.num_rows}")


class _Gunzip(io.RawIOBase):
    def __init__(self, stream: _HashingReader) -> None:
        self._file = gzip.GzipFile(fileobj=stream, mode="rb")  # type: ignore[call-overload]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def lines(report: LintReport) -> Iterator[str]:
    """Yield the findings, one line each, and the counts."""
    for finding in report.findings:
        yield finding.line()
    compared = f", {report.num_shards_with_digest} compared with a manifest" if report.num_shards_with_digest else ""
    counted = ((report.num_shards, "shard"), (report.num_samples, "sample"), (report.num_members, "member"))
    yield f"{', '.join(_count(*item) for item in counted)}, {report.num_bytes} bytes{compared}"
    if report.findings:
        counts = ", ".join(f"{kind} {count}" for kind, count in report.counts().items())
        yield f"{_count(len(report.findings), 'finding')}: {counts}"
    else:
        yield "nothing found"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
