"""Finished outputs: a manifest with its files, read as input of other stages and found under an output root."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, InputRef, Manifest, damaged_files, read_manifest
from pipelines.storage.mirror import OutputStore, store_of, sync_manifests

Verify = Literal["size", "digest"]


@dataclass(frozen=True)
class StageOutput:
    """A finished output: its manifest and the folder of its files; or a single file of it.

    A stage that reads one file of a large output takes that file as its input: its fingerprint then depends on that
    file alone, and other files may change. If the output root is mirrored in an object store, files are downloaded into
    the folder on first use.
    """

    folder: Path
    manifest: Manifest
    only: str | None = None
    """The single file this input consists of; the others are not accessible."""

    @classmethod
    def load(cls, address: Path) -> "StageOutput":
        """Read the output whose manifest, or single file, is at `address`.

        Raises ThroughlineError if the manifest is missing or altered, or does not list the file.
        """
        path = address.parent / MANIFEST_NAME
        if not path.is_file() and len(path.parents) > 2:
            stage_root, version = path.parents[1], path.parent.name
            store = store_of(stage_root.parent)
            if store is not None:
                store.fetch_manifest(stage_root.name, version)
        output = cls(address.parent, read_manifest(path))
        return output if address.name == MANIFEST_NAME else output.only_file(address.name)

    def only_file(self, name: str) -> "StageOutput":
        """Return one file of this output as an input; raises ThroughlineError if there is no such file.

        The file must be in the output's top folder.
        """
        self.manifest.file(name)
        return replace(self, only=name)

    @property
    def data_version(self) -> str:
        return self.manifest.data_version if self.only is None else self.manifest.file(self.only).sha256

    @property
    def ref(self) -> InputRef:
        manifest = self.manifest
        return InputRef(
            stage=manifest.stage, partition=manifest.partition, data_version=self.data_version, file=self.only
        )

    @property
    def manifest_path(self) -> Path:
        return self.folder / MANIFEST_NAME

    @property
    def address(self) -> Path:
        """The path that `load` takes."""
        return self.folder / (self.only or MANIFEST_NAME)

    def path(self, name: str, *, alone: bool = False) -> Path:
        """Return the path of a listed file; with `alone`, companion files are not downloaded with it."""
        if self.only not in (None, name):
            raise ThroughlineError(f"{self.manifest.stage}: the input is its file {self.only} alone, not {name}")
        entry = self.manifest.file(name)
        self.fetch([entry.path], alone=alone)
        return self.folder / entry.path

    def files(self, suffix: str) -> list[Path]:
        """Return the listed files whose name ends with `suffix`, sorted by name."""
        names = [name for name in self._names() if name.endswith(suffix)]
        self.fetch(names)
        return sorted(self.folder / name for name in names)

    def _names(self) -> list[str]:
        return [self.only] if self.only else [entry.path for entry in self.manifest.files]

    @property
    def store(self) -> OutputStore | None:
        """The object store that the output root is mirrored in."""
        return store_of(self.folder.parent.parent)

    def fetch(self, names: Sequence[str] | None = None, *, alone: bool = False) -> None:
        """Download files that are missing in the folder, all if `names` is None; no-op without an object store.

        Companion files come along unless `alone`, such as the shard of an index.
        """
        store = self.store
        if store is not None:
            store.fetch(self.folder, self.manifest, self._names() if names is None else names, alone=alone)

    @property
    def is_here(self) -> bool:
        """Whether every file is in the folder, none only in an object store."""
        return self.store is None or all((self.folder / name).is_file() for name in self._names())

    def damaged(self, *, read_bytes: bool) -> list[str]:
        """Return one sentence for each file that differs from the manifest or is missing in the folder."""
        store = self.store
        manifest = self.manifest if store is None else store.cached(self.folder, self.manifest)
        return damaged_files(self.folder, manifest, read_bytes=read_bytes)


Inputs = Mapping[str, Sequence[StageOutput]]


def find_input(output_root: Path, ref: InputRef, known: Iterable[StageOutput] = ()) -> StageOutput:
    """Return the output that `ref` names, or an output that holds the file it names.

    If several outputs hold the file, returns the first of `known`, else the newest under the root. Raises
    ThroughlineError if there is none, or its manifest is altered.
    """
    if ref.file is None:
        return StageOutput.load(output_root / ref.stage / ref.data_version / MANIFEST_NAME)
    for output in known:
        if _holds(output, ref):
            return output
    holders = [output for output in sound_outputs(output_root, ref.stage) if _holds(output, ref)]
    if not holders:
        raise ThroughlineError(
            f"no sound output of {ref.stage} under {output_root} holds {ref.file} with SHA-256 "
            f"{ref.data_version[:12]}...; re-run {ref.stage}"
        )
    return max(holders, key=_age)


def _holds(output: StageOutput, ref: InputRef) -> bool:
    manifest = output.manifest
    if (manifest.stage, manifest.partition) != (ref.stage, ref.partition):
        return False
    return any(entry.path == ref.file and entry.sha256 == ref.data_version for entry in manifest.files)


def sound_outputs(
    output_root: Path, stage: str, on_broken: Callable[[str, str], object] = lambda version, problem: None
) -> Iterator[StageOutput]:
    """Yield the outputs of a stage whose manifests are sound.

    For each of the others calls `on_broken` with the data version that its folder names, and the problem.
    """
    sync_manifests(output_root, stage)
    for path in sorted((output_root / stage).glob(f"*/{MANIFEST_NAME}")):
        try:
            output = StageOutput.load(path)
        except ThroughlineError as error:
            on_broken(path.parent.name, str(error))
            continue
        if output.data_version == path.parent.name:
            yield output
        else:
            on_broken(path.parent.name, f"{path}: the manifest has data version {output.data_version}; re-run {stage}")


def _age(output: StageOutput) -> tuple[str, int, str]:
    """Sort key by creation time; the manifest's file time orders outputs of the same second."""
    environment = output.manifest.environment
    ended_at = environment.ended_at if environment else ""
    return ended_at, output.manifest_path.stat().st_mtime_ns, output.data_version
