"""Finished outputs: the manifest with its files, as inputs of other stages, and how they are found under a root."""

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
    """A finished output: its manifest, and the folder that holds it and its files; or one of its files alone.

    A stage that reads one file of a large output takes that file as its input: then its fingerprint follows the file,
    and whatever else the output holds may change. Where the output root is mirrored in an object store, files are
    fetched into the folder when they are asked for.
    """

    folder: Path
    manifest: Manifest
    only: str | None = None
    """The one file that is meant; the others can't be reached then."""

    @classmethod
    def load(cls, address: Path) -> "StageOutput":
        """Read the output of a manifest's path, or the one file of an output by its own path.

        Raises ThroughlineError where the manifest is missing or altered, or has no such file.
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
        """Return this output as an input that is one of its files; raises ThroughlineError where it has no such file.

        The file must lie at the top of the output.
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
        """Return the path of a file that the manifest lists; `alone` fetches nothing that belongs to it."""
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
        """See to it that files lie in the folder, all where `names` is None; nothing to do without an object store.

        What belongs to a file, as a shard to its index, comes along unless `alone`.
        """
        store = self.store
        if store is not None:
            store.fetch(self.folder, self.manifest, self._names() if names is None else names, alone=alone)

    @property
    def is_here(self) -> bool:
        """Whether every file lies in the folder, and none is in an object store alone."""
        return self.store is None or all((self.folder / name).is_file() for name in self._names())

    def damaged(self, *, read_bytes: bool) -> list[str]:
        """Return one sentence for each file in the folder that differs from the manifest, or should be there."""
        store = self.store
        manifest = self.manifest if store is None else store.cached(self.folder, self.manifest)
        return damaged_files(self.folder, manifest, read_bytes=read_bytes)


Inputs = Mapping[str, Sequence[StageOutput]]


def find_input(output_root: Path, ref: InputRef, known: Iterable[StageOutput] = ()) -> StageOutput:
    """Return the whole output that `ref` names, or that holds the file it names.

    Several outputs may hold one file: the first of `known` that does is taken, then the newest under the root. Raises
    ThroughlineError where there is none, or where its manifest is altered.
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
    """Yield the outputs of a stage whose manifests are sound; the others hold nothing that can be relied on.

    `on_broken` is told the data version under which another lies, and what is wrong with it.
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
            on_broken(
                path.parent.name, f"{path}: is the manifest of data version {output.data_version}; re-run {stage}"
            )


def _age(output: StageOutput) -> tuple[str, int, str]:
    """Sort by when an output was made; its file tells apart those of one second."""
    environment = output.manifest.environment
    ended_at = environment.ended_at if environment else ""
    return ended_at, output.manifest_path.stat().st_mtime_ns, output.data_version
