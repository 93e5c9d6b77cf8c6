"""The checks of one shard, member by member, and the findings they report."""

import hashlib
import io
import json
import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.core.errors import ThroughlineError
from pipelines.shards.format import index_path, read_index
from pipelines.shards.tar import Entry

KINDS = {
    "empty": "a tar without samples",
    "header": "a missing or invalid tar header",
    "cut_short": "the file ends inside a member",
    "no_end_mark": "the file ends without the two empty blocks of a complete tar",
    "bytes_after_end": "data after the end mark, which readers ignore",
    "not_a_file": "a link, device or pipe",
    "unsafe_name": "a path outside the folder that the tar is unpacked into",
    "no_key": "a name without key and suffix",
    "duplicate_member": "a name that occurs twice",
    "split_sample": "the members of a sample are not consecutive",
    "unsorted": "keys out of order in a shard of this project",
    "duplicate_key": "the same key in several shards",
    "missing_member": "a sample without a member that most samples of its shard have",
    "json_unreadable": "invalid JSON, or JSON that is not an object",
    "text_unreadable": "text that is not UTF-8",
    "caption_disagrees": "the caption in the JSON differs from the text",
    "key_disagrees": "the key in the JSON differs from the member's name",
    "hash_disagrees": "the digest in the JSON or the manifest is not that of the bytes",
    "index_disagrees": "the index does not match its tar",
    "image_unreadable": "an image whose header, or with --decode whose pixels, cannot be read",
    "image_suffix": "an image whose format does not match its suffix",
    "pickle": "a member that runs code when it is loaded",
    "manifest": "a manifest that was altered or cannot be read",
    "file_missing": "a file in the manifest does not exist",
    "file_unlisted": "a tar that the manifest of its folder does not list",
    "count_disagrees": "the number of samples differs from the manifest's",
}
"""Kind of a finding -> meaning."""

_IMAGE_FORMATS = {
    "jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF",
    "tiff": "TIFF", "ppm": "PPM", "pgm": "PPM", "avif": "AVIF",
}  # fmt: skip
_TEXT_SUFFIXES = ("txt", "text", "caption")
_PICKLE_SUFFIXES = ("pkl", "pickle", "pyd", "pt", "pth", "joblib", "dill")
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_MAX_PIXELS = 1 << 28
# Raised by Pillow's plug-ins on malformed bytes.
_IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, TypeError, AttributeError,
                 RuntimeError, MemoryError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem: `kind` is a key of `KINDS`; `shard` is relative to the folder; `key` may be empty."""

    kind: str
    shard: str
    key: str
    detail: str

    def line(self) -> str:
        return f"{self.shard}  {self.key or '-'}  {self.kind}: {self.detail}"


@dataclass(slots=True)
class LintReport:
    """Counts of what was checked, and the findings in shard order."""

    folder: Path
    num_shards: int = 0
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    num_shards_with_digest: int = 0
    """Shards compared with the digest in a manifest."""
    findings: list[Finding] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Return kind -> number of findings, most frequent first."""
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


class ShardChecks:
    """The checks of one shard, member by member."""

    def __init__(self, name: str, report: LintReport, *, decode: bool, is_ours: bool) -> None:
        self._name, self._report, self._decode, self._is_ours = name, report, decode, is_ours
        self.keys: dict[str, set[str]] = {}
        """Key -> suffixes of its members."""
        self._key = ""
        self._members: dict[str, bytes] = {}
        self._positions: list[tuple[str, str, int, int]] = []
        """(key, suffix, offset, size) of each member."""

    def report(self, kind: str, key: str, detail: str) -> None:
        assert kind in KINDS
        self._report.findings.append(Finding(kind, printable(self._name), printable(key), printable(detail)))

    def add(self, entry: Entry) -> None:
        """Add the next member; a sample is checked when the next one begins."""
        self._report.num_members += 1
        if entry.kind == "folder":
            return
        path = PurePosixPath(entry.name)
        if path.is_absolute() or ".." in path.parts:
            self.report("unsafe_name", entry.name, "absolute, or outside the folder that the tar is unpacked into")
        if entry.kind != "file":
            self.report("not_a_file", entry.name, f"is {entry.kind}")
            return
        if path.name.startswith("__") and path.name.endswith("__"):
            return  # metadata of the whole shard, by webdataset's convention
        match = _NAME.fullmatch(entry.name)
        if match is None:
            self.report("no_key", entry.name, "expected <key>.<suffix>; readers skip it or fail")
            return
        key, suffix = match[1], match[2].lower()
        if key != self._key:
            self._begin(key)
        if suffix in self.keys[key]:
            self.report("duplicate_member", key, f"{suffix} occurs twice")
        self.keys[key].add(suffix)
        self._positions.append((key, suffix, entry.offset, len(entry.data)))
        self._members[suffix] = entry.data

    def _begin(self, key: str) -> None:
        self._check_sample()
        if key in self.keys:
            self.report("split_sample", key, "its members are not consecutive; readers see two samples")
        elif self._is_ours and key < self._key:
            self.report("unsorted", key, f"comes after {self._key}")
        self.keys.setdefault(key, set())
        self._key, self._members = key, {}

    def finish(self) -> None:
        """Check the last sample, and compare the samples with each other."""
        self._check_sample()
        self._members = {}
        if not self.keys:
            self.report("empty", "", "no samples")
        counts = Counter(suffix for suffixes in self.keys.values() for suffix in suffixes)
        expected = {suffix for suffix, count in counts.items() if 2 * count >= len(self.keys)}
        for key, suffixes in self.keys.items():
            if missing := expected - suffixes:
                of_all = f"of {len(self.keys)} samples"
                listed = ", ".join(f"{suffix} (in {counts[suffix]} {of_all})" for suffix in sorted(missing))
                self.report("missing_member", key, f"lacks {listed}")
        self._report.num_samples += len(self.keys)

    def check_index(self, path: Path, num_bytes: int) -> None:
        """Compare the shard with its index, if it has one."""
        if not index_path(path).is_file():
            return
        try:
            index = read_index(index_path(path))
        except ThroughlineError as error:
            self.report("index_disagrees", "", str(error))
            return
        if index.num_bytes != num_bytes:
            self.report("index_disagrees", "", f"the tar has {num_bytes} bytes, its index says {index.num_bytes}")
        stated = [
            (key, suffix, offset, size)
            for key, row in zip(index.keys, index.rows, strict=True)
            for suffix, (offset, size) in zip(index.suffixes, row, strict=True)
        ]
        differing = next((pair for pair in zip(self._positions, stated, strict=False) if pair[0] != pair[1]), None)
        if differing is not None:
            (key, suffix, offset, size), other = differing
            self.report("index_disagrees", key, f"{suffix} has {size} bytes at {offset}, the index says {other}")
        elif len(stated) != len(self._positions):
            self.report("index_disagrees", "", f"{len(self._positions)} members, the index says {len(stated)}")

    def _check_sample(self) -> None:
        if not self._members:
            return
        texts = {suffix: self._text(suffix) for suffix in self._members if suffix in _TEXT_SUFFIXES}
        for suffix, data in self._members.items():
            last = suffix.rpartition(".")[2]
            if last in _PICKLE_SUFFIXES or _is_pickle(data):
                self.report("pickle", self._key, f"{suffix} is a pickle, which runs code when it is loaded")
            elif last in _IMAGE_FORMATS:
                self._check_image(suffix, last, data)
            elif last == "json":
                self._check_json(suffix, data, texts)

    def _text(self, suffix: str) -> str | None:
        try:
            return self._members[suffix].decode()
        except UnicodeDecodeError as error:
            self.report("text_unreadable", self._key, f"{suffix} is not UTF-8 ({error.reason} at byte {error.start})")
            return None

    def _check_json(self, suffix: str, data: bytes, texts: dict[str, str | None]) -> None:
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            self.report("json_unreadable", self._key, f"{suffix}: {error}")
            return
        if suffix != "json":
            return
        if not isinstance(record, dict):
            self.report("json_unreadable", self._key, f"{suffix} is a {type(record).__name__}, not an object")
            return
        self._check_digests(record)
        caption, text = record.get("caption"), texts.get("txt")
        if isinstance(caption, str) and text is not None and caption != text:
            self.report("caption_disagrees", self._key, f"JSON says {caption!r:.60}, txt says {text!r:.60}")
        for name in ("sample_key", "key"):
            stated = record.get(name)
            if isinstance(stated, str) and stated != self._key.rpartition("/")[2]:
                self.report("key_disagrees", self._key, f"JSON says {name} {stated}")

    def _check_digests(self, record: dict[str, Any]) -> None:
        image = next((suffix for suffix in self._members if suffix in _IMAGE_FORMATS), None)
        for name, suffix in (("image_sha256", image), ("caption_sha256", "txt")):
            data = self._members.get(suffix or "")
            if name in record and data is not None and record[name] != hashlib.sha256(data).hexdigest():
                self.report("hash_disagrees", self._key, f"{suffix} does not have the {name} of its JSON")

    def _check_image(self, suffix: str, last: str, data: bytes) -> None:
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(io.BytesIO(data)) as image:
                    if image.format not in (_IMAGE_FORMATS[last], "MPO" if _IMAGE_FORMATS[last] == "JPEG" else None):
                        self.report("image_suffix", self._key, f"{suffix} holds {image.format}")
                    if image.width * image.height > _MAX_PIXELS:
                        self.report("image_unreadable", self._key, f"{suffix} claims {image.width} x {image.height} px")
                    elif self._decode:
                        image.load()
            except (Image.DecompressionBombError, *_IMAGE_ERRORS) as error:
                start = f"{len(data)} bytes, starting with {data[:8].hex()}" if data else "no bytes"
                reason = str(error) if self._decode and "identify" not in str(error) else type(error).__name__
                self.report("image_unreadable", self._key, f"{suffix}: {reason} ({start})")


def _is_pickle(data: bytes) -> bool:
    """Return whether bytes are a pickle of protocol 2 or later, a torch file, or a numpy file of objects."""
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and data.endswith(b"."):
        return True
    if data.startswith(b"PK\x03\x04"):
        return b"data.pkl" in data
    return data.startswith(b"\x93NUMPY") and b"|O" in data[:256]


def printable(text: str) -> str:
    """Return text without control characters, which could move a terminal's cursor or break a line."""
    return text if text.isprintable() else ascii(text)[1:-1]
