"""Checks a folder of WebDataset tars, of this project or of any other, and names whatever a reader would stumble over.

Every tar is read once, front to back; nothing in it is run, extracted or unpickled.
"""

import gzip
import hashlib
import io
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipelines.core.digest import file_sha256
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, FileEntry, Manifest, read_manifest
from pipelines.shards.format import index_path, read_index
from pipelines.shards.tar import DamagedTarError, Entry, walk

KINDS = {
    "empty": "a tar without a sample",
    "header": "no tar header where one should be",
    "cut_short": "the file ends inside a member",
    "no_end_mark": "the file ends without the two empty blocks of a finished tar",
    "bytes_after_end": "data behind the end mark, which no reader sees",
    "not_a_file": "a link, device or pipe",
    "unsafe_name": "a name that leaves the folder it is unpacked into",
    "no_key": "a name without key and suffix",
    "duplicate_member": "one name twice",
    "split_sample": "the members of a sample do not follow each other",
    "unsorted": "keys out of order in a shard of this project",
    "duplicate_key": "one key in several shards",
    "missing_member": "a sample lacks what the others of its shard have",
    "json_unreadable": "JSON that cannot be parsed, or is no object",
    "text_unreadable": "text that is not UTF-8",
    "caption_disagrees": "the JSON states another caption than the text",
    "key_disagrees": "the JSON states another key than the member's name",
    "hash_disagrees": "bytes that are not those whose digest the JSON or the manifest states",
    "index_disagrees": "an index that is not its tar's",
    "image_unreadable": "an image whose header, or with --decode whose pixels, cannot be read",
    "image_suffix": "an image of another format than its suffix says",
    "pickle": "a member that runs code when it is loaded",
    "manifest": "a manifest that was altered or cannot be read",
    "file_missing": "a file of the manifest that is not there",
    "file_unlisted": "a tar that the manifest of its folder does not name",
    "count_disagrees": "another number of samples than the manifest states",
}
"""Kind of a finding -> what it means."""

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGE_FORMATS = {
    "jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF",
    "tiff": "TIFF", "ppm": "PPM", "pgm": "PPM", "avif": "AVIF",
}  # fmt: skip
_TEXT_SUFFIXES = ("txt", "text", "caption")
_PICKLE_SUFFIXES = ("pkl", "pickle", "pyd", "pt", "pth", "joblib", "dill")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_MAX_PIXELS = 1 << 28
# What Pillow's plug-ins raise on bytes that lie about themselves.
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError,
                 RuntimeError, MemoryError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: `kind` is a word of `KINDS`; `shard` is relative to the folder; `key` may be empty."""

    kind: str
    shard: str
    key: str
    detail: str

    def line(self) -> str:
        return f"{self.shard}  {self.key or '-'}  {self.kind}: {self.detail}"


@dataclass(slots=True)
class LintReport:
    """What was looked at and what was found, in the order of shards."""

    folder: Path
    num_shards: int = 0
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    num_shards_with_digest: int = 0
    """Shards whose bytes were compared with the digest in a manifest."""
    findings: list[Finding] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return kind -> findings, most frequent first."""
        return dict(Counter(finding.kind for finding in self.findings).most_common())

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "shards": self.num_shards,
            "samples": self.num_samples,
            "members": self.num_members,
            "bytes": self.num_bytes,
            "shards_with_digest": self.num_shards_with_digest,
            "counts": self.counts(),
            "findings": [
                {"kind": item.kind, "shard": item.shard, "key": item.key, "detail": item.detail}
                for item in self.findings
            ],
        }


def find_shards(folder: Path) -> list[Path]:
    """Return the tars under a folder at any depth, sorted; raises ThroughlineError where there is none."""
    if not folder.is_dir():
        raise ThroughlineError(f"{folder}: no such folder; name one that holds WebDataset tars")
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(_TAR_SUFFIXES) and path.is_file())
    if not paths:
        raise ThroughlineError(f"{folder}: no tars here ({', '.join(_TAR_SUFFIXES)}); name a folder of WebDataset tars")
    return paths


def lint_folder(
    folder: Path, *, decode: bool = False, on_shard: Callable[[LintReport], None] = lambda report: None
) -> LintReport:
    """Check every tar under `folder`; `decode` decodes each image whole instead of its header alone.

    Shards below one manifest of this project are one set, all others under `folder` are one set: keys must be unique in
    a set. `on_shard` is called after each shard.
    """
    report = LintReport(folder)
    manifests: dict[Path, Manifest | None] = {}
    homes: dict[tuple[Path, str], str] = {}
    for path in find_shards(folder):
        if path.parent not in manifests:
            manifests[path.parent] = _manifest(path.parent, report)
        manifest = manifests[path.parent]
        name = path.relative_to(folder).as_posix()
        entry = _entry(manifest, path.name)
        shard = _Shard(name, report, decode=decode, is_ours=entry is not None)
        _read_shard(path, shard, entry, report)
        for key in shard.keys:
            first = homes.setdefault((path.parent if manifest else folder, key), name)
            if first != name:
                shard.found("duplicate_key", key, f"also in {first}")
        if manifest is not None and entry is None:
            shard.found("file_unlisted", "", f"{MANIFEST_NAME} of {manifest.stage} does not name it")
        on_shard(report)
    for parent, manifest in manifests.items():
        if manifest is not None:
            _check_other_files(parent, manifest, report)
    return report


def _manifest(folder: Path, report: LintReport) -> Manifest | None:
    """Return the manifest of this project that lies in a folder; other tools may use the same file name."""
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
        report.findings.append(Finding("manifest", name, "", _printable(str(error))))
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
            report.findings.append(Finding("file_missing", name, "", f"{MANIFEST_NAME} of {manifest.stage} names it"))
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


def _read_shard(path: Path, shard: "_Shard", entry: FileEntry | None, report: LintReport) -> None:
    is_whole = True
    with path.open("rb") as stream:
        reader = _HashingReader(stream)
        source = io.BufferedReader(_Gunzip(reader)) if path.name.endswith("gz") else reader
        try:
            for member in walk(source):
                shard.add(member)
        except DamagedTarError as error:
            is_whole = False
            shard.found(error.kind, "", str(error))
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            is_whole = False
            shard.found("cut_short", "", f"the compression is damaged ({error})")
        shard.finish()
        while reader.read(1 << 20):
            pass
    report.num_shards += 1
    report.num_bytes += reader.num_bytes
    if is_whole:
        shard.check_index(path, reader.num_bytes)
    if entry is None:
        return
    report.num_shards_with_digest += 1
    if reader.hash.hexdigest() != entry.sha256:
        shard.found("hash_disagrees", "", "not the SHA-256 that the manifest states")
    if is_whole and entry.num_rows is not None and len(shard.keys) != entry.num_rows:
        shard.found("count_disagrees", "", f"{len(shard.keys)} samples, the manifest says {entry.num_rows}")


class _Gunzip(io.RawIOBase):
    def __init__(self, stream: _HashingReader) -> None:
        self._file = gzip.GzipFile(fileobj=stream, mode="rb")  # type: ignore[call-overload]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Shard:
    """The checks of one shard, member by member."""

    def __init__(self, name: str, report: LintReport, *, decode: bool, is_ours: bool) -> None:
        self._name, self._report, self._decode, self._is_ours = name, report, decode, is_ours
        self.keys: dict[str, set[str]] = {}
        """Key -> suffixes of its members."""
        self._key = ""
        self._members: dict[str, bytes] = {}
        self._places: list[tuple[str, str, int, int]] = []

    def found(self, kind: str, key: str, detail: str) -> None:
        assert kind in KINDS
        self._report.findings.append(Finding(kind, _printable(self._name), _printable(key), _printable(detail)))

    def add(self, entry: Entry) -> None:
        """Take the next member; a sample is checked when the next one begins."""
        self._report.num_members += 1
        if entry.kind == "folder":
            return
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts:
            self.found("unsafe_name", entry.name, "absolute, or leads out of the folder it is unpacked into")
        if entry.kind != "file":
            self.found("not_a_file", entry.name, f"is {entry.kind}")
            return
        if path.name.startswith("__") and path.name.endswith("__"):
            return  # metadata of a whole shard, by the convention of webdataset
        match = _NAME.fullmatch(entry.name)
        if match is None:
            self.found("no_key", entry.name, "expected <key>.<suffix>; readers pass it over or fail")
            return
        key, suffix = match[1], match[2].lower()
        if key != self._key:
            self._begin(key)
        if suffix in self.keys[key]:
            self.found("duplicate_member", key, f"{suffix} stands there twice")
        self.keys[key].add(suffix)
        self._places.append((key, suffix, entry.offset, len(entry.data)))
        self._members[suffix] = entry.data

    def _begin(self, key: str) -> None:
        self._check_sample()
        if key in self.keys:
            self.found("split_sample", key, "its members do not follow each other; readers see two samples")
        elif self._is_ours and key < self._key:
            self.found("unsorted", key, f"does not come after {self._key}")
        self.keys.setdefault(key, set())
        self._key, self._members = key, {}

    def finish(self) -> None:
        """Check the last sample, and the samples against each other."""
        self._check_sample()
        self._members = {}
        if not self.keys:
            self.found("empty", "", "no sample in it")
        counts = Counter(suffix for suffixes in self.keys.values() for suffix in suffixes)
        expected = {suffix for suffix, count in counts.items() if 2 * count >= len(self.keys)}
        for key, suffixes in self.keys.items():
            if missing := expected - suffixes:
                of_others = ", ".join(f"{suffix} ({counts[suffix]})" for suffix in sorted(missing))
                self.found("missing_member", key, f"lacks {of_others}, of {len(self.keys)} samples")
        self._report.num_samples += len(self.keys)

    def check_index(self, path: Path, num_bytes: int) -> None:
        """Compare the index beside the shard, if there is one, with what the shard holds."""
        at = index_path(path)
        if not at.is_file():
            return
        try:
            index = read_index(at)
        except ThroughlineError as error:
            self.found("index_disagrees", "", str(error))
            return
        if index.num_bytes != num_bytes:
            self.found("index_disagrees", "", f"the tar has {num_bytes} bytes, its index says {index.num_bytes}")
        stated = [
            (key, suffix, offset, size)
            for key, row in zip(index.keys, index.rows, strict=True)
            for suffix, (offset, size) in zip(index.suffixes, row, strict=True)
        ]
        differing = next((pair for pair in zip(self._places, stated, strict=False) if pair[0] != pair[1]), None)
        if differing is not None:
            (key, suffix, offset, size), other = differing
            self.found("index_disagrees", key, f"{suffix} has {size} bytes at {offset}, the index says {other}")
        elif len(stated) != len(self._places):
            self.found("index_disagrees", "", f"{len(self._places)} members, the index says {len(stated)}")

    def _check_sample(self) -> None:
        if not self._members:
            return
        texts = {suffix: self._text(suffix) for suffix in self._members if suffix in _TEXT_SUFFIXES}
        for suffix, data in self._members.items():
            last = suffix.rpartition(".")[2]
            if last in _PICKLE_SUFFIXES or _is_pickle(data):
                self.found("pickle", self._key, f"{suffix} is a pickle, which runs code when it is loaded")
            elif last in _IMAGE_FORMATS:
                self._check_image(suffix, last, data)
            elif last == "json":
                self._check_json(suffix, data, texts)

    def _text(self, suffix: str) -> str | None:
        try:
            return self._members[suffix].decode()
        except UnicodeDecodeError as error:
            self.found("text_unreadable", self._key, f"{suffix} is not UTF-8 ({error.reason} at byte {error.start})")
            return None

    def _check_json(self, suffix: str, data: bytes, texts: dict[str, str | None]) -> None:
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.found("json_unreadable", self._key, f"{suffix}: {error}")
            return
        if suffix != "json":
            return
        if not isinstance(record, dict):
            self.found("json_unreadable", self._key, f"{suffix} is no object but {type(record).__name__}")
            return
        self._check_digests(record)
        caption, text = record.get("caption"), texts.get("txt")
        if isinstance(caption, str) and text is not None and caption != text:
            self.found("caption_disagrees", self._key, f"JSON says {caption!r:.60}, txt says {text!r:.60}")
        for name in ("sample_key", "key"):
            stated = record.get(name)
            if isinstance(stated, str) and stated != self._key.rpartition("/")[2]:
                self.found("key_disagrees", self._key, f"JSON says {name} {stated}")

    def _check_digests(self, record: dict[str, Any]) -> None:
        image = next((suffix for suffix in self._members if suffix in _IMAGE_FORMATS), None)
        for name, suffix in (("image_sha256", image), ("caption_sha256", "txt")):
            data = self._members.get(suffix or "")
            if name in record and data is not None and record[name] != hashlib.sha256(data).hexdigest():
                self.found("hash_disagrees", self._key, f"{suffix} has not the {name} that its JSON states")

    def _check_image(self, suffix: str, last: str, data: bytes) -> None:
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(io.BytesIO(data)) as image:
                    if image.format not in (_IMAGE_FORMATS[last], "MPO" if _IMAGE_FORMATS[last] == "JPEG" else None):
                        self.found("image_suffix", self._key, f"{suffix} holds {image.format}")
                    if image.width * image.height > _MAX_PIXELS:
                        self.found("image_unreadable", self._key, f"{suffix} claims {image.width} x {image.height} px")
                    elif self._decode:
                        image.load()
            except (Image.DecompressionBombError, *_IMAGE_ERRORS) as error:
                start = f"{len(data)} bytes, starting with {data[:8].hex()}" if data else "no bytes"
                reason = str(error) if self._decode and "identify" not in str(error) else type(error).__name__
                self.found("image_unreadable", self._key, f"{suffix}: {reason} ({start})")


def _is_pickle(data: bytes) -> bool:
    """Whether bytes are a pickle of protocol 2 or later, a torch file, or a numpy file of objects."""
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and data.endswith(b"."):
        return True
    if data.startswith(b"PK\x03\x04"):
        return b"data.pkl" in data
    return data.startswith(b"\x93NUMPY") and b"|O" in data[:256]


def _printable(text: str) -> str:
    """Return text that cannot move a terminal's cursor or break a line."""
    return text if text.isprintable() else ascii(text)[1:-1]


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
