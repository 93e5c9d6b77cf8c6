"""The manifest: the JSON file, written last, that records a stage's output and its inputs."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.core.atomic import write_json
from pipelines.core.digest import digest_json, file_sha256
from pipelines.core.errors import ThroughlineError

MANIFEST_NAME = "manifest.json"
DROPPED_NAME = "dropped.parquet"
EARLIER = "earlier"
"""Name of the input that holds the stage's own earlier output; the new output replaces it."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Record):
    """One file of an output: `path` relative to the manifest, digest of the whole file, and row count of a table."""

    path: str
    sha256: str
    num_bytes: int
    num_rows: int | None = None


class SourceFile(_Record):
    """A file from outside the graph: its location, and its digest when it was read."""

    name: str
    sha256: str
    num_bytes: int


class InputRef(_Record):
    """An input of a stage, identified by content: its folder is ``<output root>/<stage>/<data_version>``.

    With `file`, the input is that one file: `data_version` is its SHA-256, and any output of the stage that contains it
    will do (`pipelines.runner.outputs` finds them).
    """

    stage: str
    partition: str | None
    data_version: str
    file: str | None = Field(default=None, exclude_if=lambda value: value is None)


class Conservation(_Record):
    """rows_in = rows_out + sum of dropped by reason; ``dropped.parquet`` lists the dropped keys."""

    rows_in: int
    rows_out: int
    dropped: dict[str, int] = Field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return self.rows_in == self.rows_out + sum(self.dropped.values())


class ModelRecord(_Record):
    """A model that was used: hub id or local name, and the revision that was loaded."""

    role: str
    id: str
    revision: str


class Environment(_Record):
    """Machine, software and time of a run; recorded, but not part of the data version."""

    git_commit: str | None
    python: str
    packages: dict[str, str]
    host: str
    accelerator: str
    started_at: str
    ended_at: str
    seconds: float


class Manifest(_Record):
    """Record of a stage's output, its inputs and its configuration.

    `data_version` is the digest of everything except `environment`, `measurements` and `execution`: two machines that
    produce the same bytes from the same inputs agree on it. `fingerprint` is the digest of everything that determines
    the output, known before the stage runs.
    """

    format: int = 1
    stage: str
    partition: str | None
    code_version: str
    fingerprint: str
    config: dict[str, Any]
    models: tuple[ModelRecord, ...] = ()
    inputs: dict[str, tuple[InputRef, ...]] = Field(default_factory=dict)
    sources: tuple[SourceFile, ...] = ()
    files: tuple[FileEntry, ...] = ()
    conservation: Conservation | None = None
    seeds: dict[str, int] = Field(default_factory=dict)
    summary: dict[str, Any] = Field(default_factory=dict)
    """Key results, readable without opening a file; identical on every run."""
    execution: dict[str, Any] = Field(default_factory=dict)
    """Configuration that does not change the result: workers, paths, ports."""
    measurements: dict[str, Any] = Field(default_factory=dict)
    """Values that differ from run to run: rates, seconds, memory."""
    environment: Environment | None = None
    data_version: str = ""

    def content_digest(self) -> str:
        """Return the digest that `data_version` must equal."""
        volatile = {"data_version", "environment", "measurements", "execution"}
        return digest_json(self.model_dump(mode="json", exclude=volatile))

    def sealed(self) -> "Manifest":
        """Return this manifest with its data version filled in."""
        return self.model_copy(update={"data_version": self.content_digest()})

    def file(self, path: str) -> FileEntry:
        """Return the entry of `path`; raises ThroughlineError if the output has no such file."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise ThroughlineError(f"{self.stage} {self.data_version}: no file {path} in its manifest")

    def write(self, folder: Path) -> Path:
        path = folder / MANIFEST_NAME
        write_json(path, self.model_dump(mode="json"))
        return path


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and verify its digest.

    Raises ThroughlineError if the file is missing, is not a manifest, or was altered.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ThroughlineError(f"{path}: no manifest here; the stage did not finish, run it again") from error
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, name: str) -> Manifest:
    """Parse a manifest and verify its digest as `read_manifest` does; error messages call it `name`."""
    try:
        manifest = Manifest.model_validate_json(data)
    except (ValidationError, json.JSONDecodeError) as error:
        raise ThroughlineError(
            f"{name}: not a readable manifest ({str(error).splitlines()[0]}); re-run its stage"
        ) from error
    digest = manifest.content_digest()
    if digest != manifest.data_version:
        raise ThroughlineError(
            f"{name}: content digest {digest} differs from its data version {manifest.data_version}; "
            f"the manifest was altered, re-run stage {manifest.stage}"
        )
    return manifest


def damaged_files(folder: Path, manifest: Manifest, *, read_bytes: bool) -> list[str]:
    """Return a message for each file of an output that is missing or differs from its manifest entry.

    Compares the SHA-256 of every file with `read_bytes`, and only sizes without.
    """
    problems = []
    for entry in manifest.files:
        path = folder / entry.path
        if not path.is_file():
            problems.append(f"{path}: missing; re-run {manifest.stage} {manifest.partition or ''}".rstrip())
        elif (num_bytes := path.stat().st_size) != entry.num_bytes:
            problems.append(f"{path}: {num_bytes} bytes, manifest says {entry.num_bytes}; re-run {manifest.stage}")
        elif read_bytes and (digest := file_sha256(path)) != entry.sha256:
            problems.append(
                f"{path}: SHA-256 {digest[:12]}..., manifest says {entry.sha256[:12]}...; re-run {manifest.stage}"
            )
    return problems
