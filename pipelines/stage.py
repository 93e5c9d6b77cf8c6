"""The stage runner: fingerprint, reuse, resume after a kill, conservation, and the manifest that is written last.

An output root looks like this::

    <root>/<stage>/<data_version>/            finished and immutable: files, dropped.parquet, manifest.json
    <root>/<stage>/fingerprints/<fingerprint> names the data version that this fingerprint gave
    <root>/<stage>/unfinished/<fingerprint>/  a run under way or killed: out/ (files), units/ (journal), scratch/
    <root>/<stage>/unfinished/<fingerprint>.lock  held by the process that works in that folder; names it
    <root>/<stage>/logs/                      curves for people, by run; no part of any output, deleted at will

With a ``store.json`` in the root all that is finished also lies in an object store, see `pipelines.storage`.

A stage's work is split into units (one shard, one file, one table). A unit's journal entry is written when all its
files are in place, so a run that was killed at any line goes on at the first unit without an entry.
"""

import argparse
import errno
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pydantic import Field, ValidationError

from pipelines.atomic import atomic_writer, sync_folder, write_bytes, write_json
from pipelines.config import FrozenConfig, ModelRef, identity_of
from pipelines.digest import HashingWriter, digest_json, file_sha256
from pipelines.dropped import DropWriter, gather_drops
from pipelines.environment import Clock
from pipelines.errors import ThroughlineError
from pipelines.manifest import (
    DROPPED_NAME,
    MANIFEST_NAME,
    Conservation,
    FileEntry,
    InputRef,
    Manifest,
    ModelRecord,
    SourceFile,
    damaged_files,
    read_manifest,
)
from pipelines.object_store import StoreConfig
from pipelines.output_lock import hold
from pipelines.progress import Progress
from pipelines.publication import OUT, publish
from pipelines.storage import OutputStore, bind, store_of

if TYPE_CHECKING:
    import pyarrow as pa

_UNFINISHED = "unfinished"
ConfigT = TypeVar("ConfigT", bound=FrozenConfig)
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


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage says of itself at its end, beside its files.

    `conservation` is summed from the units unless given here. `summary` and `seeds` must be the same on every run of
    the same fingerprint; rates, seconds and memory belong into `measurements`.
    """

    summary: Mapping[str, Any] = field(default_factory=dict)
    measurements: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    sources: Sequence[SourceFile] = ()
    conservation: Conservation | None = None


class Unit:
    """One piece of a stage's work, such as a shard: its files, its row counts, its dropped keys, its notes."""

    def __init__(self, name: str, out_folder: Path, drops: DropWriter) -> None:
        self.name = name
        self._out_folder = out_folder
        self._files: list[FileEntry] = []
        self._drops = drops
        self._rows: tuple[int, int] | None = None
        self.notes: dict[str, Any] = {}
        """JSON values that the stage wants back when it sums up its units; deterministic."""

    @contextmanager
    def open(self, path: str, *, num_rows: int | None = None) -> Iterator[HashingWriter]:
        """Yield a stream for the output file `path` (relative); it is hashed while it is written."""
        target = self._out_folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(target) as stream:
            yield stream
        self._files.append(FileEntry(path=path, sha256=stream.sha256, num_bytes=stream.num_bytes, num_rows=num_rows))

    def write(self, path: str, data: bytes, *, num_rows: int | None = None) -> None:
        """Write the output file `path` whole."""
        with self.open(path, num_rows=num_rows) as stream:
            stream.write(data)

    def adopt(self, source: Path, path: str, *, num_rows: int | None = None) -> None:
        """Move a file that another library wrote into the output; it is read once, to be hashed."""
        target = self._out_folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        entry = FileEntry(path=path, sha256=file_sha256(source), num_bytes=source.stat().st_size, num_rows=num_rows)
        source.replace(target)
        sync_folder(target.parent)
        self._files.append(entry)

    def count_rows(self, path: str, num_rows: int) -> None:
        """State the rows of a file of this unit that was opened before they were known."""
        self._files = [
            entry.model_copy(update={"num_rows": num_rows}) if entry.path == path else entry for entry in self._files
        ]

    def drop(self, sample_key: str, reason: str, detail: str = "") -> None:
        """Record that a row ends here, and why: `reason` is a short snake_case word, `detail` says more."""
        self._drops.extend([sample_key], [reason], [detail])

    def drop_many(self, sample_keys: Sequence[str], reasons: Sequence[str], details: Sequence[str]) -> None:
        """Record that many rows end here, without holding them in memory."""
        self._drops.extend(sample_keys, reasons, details)

    def drop_arrays(self, sample_keys: "pa.Array", reasons: "pa.DictionaryArray", details: "pa.Array") -> None:
        """Record that many rows end here, without a Python object for each."""
        self._drops.extend_arrays(sample_keys, reasons, details)

    def account(self, *, rows_in: int, rows_out: int) -> None:
        """State the rows that entered and left; with the drops they must balance.

        Raises ThroughlineError where they do not.
        """
        num_dropped = self._drops.counts.total()
        if rows_in != rows_out + num_dropped:
            raise ThroughlineError(
                f"unit {self.name}: {rows_in} rows in, but {rows_out} out and {num_dropped} dropped; "
                "every lost row needs a reason"
            )
        self._rows = (rows_in, rows_out)

    def journal(self) -> dict[str, Any]:
        return {
            "files": [entry.model_dump() for entry in self._files],
            "rows": self._rows,
            "dropped": dict(sorted(self._drops.counts.items())),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class FinishedUnit:
    """A unit's journal entry, as read back."""

    name: str
    files: tuple[FileEntry, ...]
    rows: tuple[int, int] | None
    dropped: dict[str, int]
    """Reason -> rows; the keys stand in the output's dropped.parquet once the stage is finished."""
    notes: dict[str, Any]


class StageRun(Generic[ConfigT]):
    """What a stage's function works with: its configuration, its inputs, and the way to its output."""

    def __init__(
        self, stage_name: str, config: ConfigT, partition: str | None, inputs: Inputs, work_folder: Path
    ) -> None:
        self.stage_name = stage_name
        self.config = config
        self.partition = partition
        self.inputs = inputs
        self._out = work_folder / OUT
        self._units = work_folder / "units"
        self.scratch = work_folder / "scratch"
        """A folder for checkpoints of unfinished work; it survives a kill and goes when the stage finishes."""
        self.logs = work_folder.parent.parent / "logs" / f"{partition or stage_name}-{work_folder.name[:8]}"
        """A folder, made by who uses it, for what is worth watching and not part of the output; it stays."""
        for folder in (self._out, self._units, self.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        self._forget_incomplete_units()

    def _forget_incomplete_units(self) -> None:
        """Take back the journal entry of each unit whose files are no longer all there, so that it is done again."""
        for unit in self.finished_units():
            paths = [(self.out_path(entry.path), entry.num_bytes) for entry in unit.files]
            whole = all(path.is_file() and path.stat().st_size == num_bytes for path, num_bytes in paths)
            if not whole or (unit.dropped and not self._drops_path(unit.name).is_file()):
                (self._units / f"{unit.name}.json").unlink()

    def input(self, name: str) -> StageOutput:
        """Return the one input of that name."""
        outputs = self.inputs.get(name, ())
        if len(outputs) != 1:
            raise ThroughlineError(f"stage {self.stage_name}: expected one input {name!r}, got {len(outputs)}")
        return outputs[0]

    @property
    def label(self) -> str:
        return f"{self.stage_name} {self.partition}" if self.partition else self.stage_name

    def progress(self, total: int | None, noun: str, *, initial: int = 0) -> Progress:
        return Progress(self.label, total, noun, initial=initial)

    def is_finished(self, unit_name: str) -> bool:
        """Whether an earlier, interrupted run already finished this unit."""
        return (self._units / f"{unit_name}.json").exists()

    @contextmanager
    def unit(self, name: str) -> Iterator[Unit]:
        """Yield a unit to fill; when the block ends without error it is journalled as finished."""
        with DropWriter(self._drops_path(name), name) as drops:
            unit = Unit(name, self._out, drops)
            yield unit
        write_bytes(self._units / f"{name}.json", json.dumps(unit.journal(), allow_nan=False).encode())

    def _drops_path(self, unit_name: str) -> Path:
        return self._units / f"{unit_name}.dropped"

    def write_dropped(self) -> FileEntry | None:
        """Gather the drops of all units, in the order of their names, into one table; None where no row was lost."""
        drops = [(unit.name, self._drops_path(unit.name)) for unit in self.finished_units() if unit.dropped]
        return gather_drops(drops, self.out_path(DROPPED_NAME)) if drops else None

    def finished_units(self) -> list[FinishedUnit]:
        """Return the journal of all finished units, sorted by name."""
        return [_read_journal(path) for path in sorted(self._units.glob("*.json"))]

    def finished_unit(self, name: str) -> FinishedUnit:
        """Return the journal of one finished unit."""
        return _read_journal(self._units / f"{name}.json")

    def adopt(self, name: str, work_folder: Path) -> FinishedUnit:
        """Take over a unit that another process finished in a work folder of its own, on the same file system."""
        journal = work_folder / "units" / f"{name}.json"
        unit = _read_journal(journal)
        moves = [(work_folder / "out" / entry.path, self.out_path(entry.path)) for entry in unit.files]
        if unit.dropped:
            moves.append((journal.with_suffix(".dropped"), self._drops_path(name)))
        for source, target in [*moves, (journal, self._units / journal.name)]:  # as ever, the journal comes last
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            sync_folder(target.parent)
        shutil.rmtree(work_folder, ignore_errors=True)
        return unit

    def out_path(self, path: str) -> Path:
        """Return where an already written output file lies while the stage runs."""
        return self._out / path


def _read_journal(path: Path) -> FinishedUnit:
    entry = json.loads(path.read_bytes())
    return FinishedUnit(
        name=path.stem,
        files=tuple(FileEntry(**item) for item in entry["files"]),
        rows=tuple(entry["rows"]) if entry["rows"] else None,
        dropped=entry["dropped"],
        notes=entry["notes"],
    )


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[ConfigT]):
    """A step of the graph: a plain function with a name, a code version and a type of configuration.

    `code_version` is raised by hand whenever the same inputs would give other bytes. `produce` must import heavy
    libraries inside, so that the graph can know its stages without loading them.
    """

    name: str
    code_version: str
    config_type: type[ConfigT]
    produce: Callable[[StageRun[ConfigT]], StageResult | None]

    def fingerprint(self, config: ConfigT, inputs: Inputs, partition: str | None = None) -> str:
        """Return the digest of all that the output is computed from."""
        return digest_json(
            {
                "stage": self.name,
                "code_version": self.code_version,
                "partition": partition,
                "config": identity_of(config),
                "inputs": {name: [item.data_version for item in items] for name, items in sorted(inputs.items())},
            }
        )

    def find_finished(
        self, config: ConfigT, inputs: Inputs, output_root: Path, partition: str | None = None, verify: Verify = "size"
    ) -> StageOutput | None:
        """Return the finished output of the same fingerprint, if there is one and it verifies.

        Under a root that is mirrored in an object store it must be finished there; with `verify` "digest" every byte
        there is read. Raises StorageError where the store can't be asked.
        """
        fingerprint = self.fingerprint(config, inputs, partition)
        store = store_of(output_root)
        if store is not None:
            folder = store.find(self.name, fingerprint)
            output = None if folder is None else StageOutput.load(folder / MANIFEST_NAME)
            if output is None or verify == "size":
                return output
            store.forget_damaged_copies(output.folder, output.manifest)
            return None if store.damaged(output.manifest) else output
        return self._find_in_folder(fingerprint, output_root, verify)

    def _find_in_folder(self, fingerprint: str, output_root: Path, verify: Verify) -> StageOutput | None:
        pointer = output_root / self.name / "fingerprints" / fingerprint
        try:
            folder = output_root / self.name / pointer.read_text().strip()
            output = StageOutput(folder, read_manifest(folder / MANIFEST_NAME))
        except (FileNotFoundError, ThroughlineError):
            return None
        if damaged_files(folder, output.manifest, read_bytes=verify == "digest"):
            return None
        return output

    def run(
        self,
        config: ConfigT,
        inputs: Inputs,
        output_root: Path,
        partition: str | None = None,
        verify: Verify = "size",
        lock_wait_seconds: float | None = None,
    ) -> StageOutput:
        """Return the output for this configuration and these inputs: reused, resumed or computed.

        A second process that asks for the same output waits for the first, up to `lock_wait_seconds` where given, and
        then reuses its result, or resumes where the first was killed. Raises ThroughlineError for what the user can
        mend; whatever is raised, finished units stay for the next try.
        """
        fingerprint = self.fingerprint(config, inputs, partition)
        stage_root = output_root / self.name
        work_folder = stage_root / _UNFINISHED / fingerprint
        label = f"{self.name} {partition}" if partition else self.name
        with hold(stage_root / _UNFINISHED / f"{fingerprint}.lock", label, lock_wait_seconds) as lock:
            finished = self.find_finished(config, inputs, output_root, partition, verify)
            if finished is not None:
                shutil.rmtree(work_folder, ignore_errors=True)  # left where a kill fell between rename and clean-up
                return finished
            store = store_of(output_root)
            if store is not None:
                left = self._find_in_folder(fingerprint, output_root, "digest")
                if left is not None:  # finished here by a run that could not store it, or damaged in the store since
                    shutil.rmtree(work_folder, ignore_errors=True)
                    if store.publish(left.folder, left.manifest, read_bytes=verify == "digest"):
                        return left
                    return self._finished_elsewhere(store, fingerprint)
            clock = Clock()
            stage_run = StageRun(self.name, config, partition, inputs, work_folder)
            result = self.produce(stage_run) or StageResult()
            manifest = self._manifest(stage_run, result, fingerprint, clock)
            lock.check()
            published = publish(manifest, work_folder, stage_root)
            output = StageOutput(stage_root / published.data_version, published)
            if store is not None and not store.publish(output.folder, published, read_bytes=verify == "digest"):
                return self._finished_elsewhere(store, fingerprint)
            return output

    def _finished_elsewhere(self, store: OutputStore, fingerprint: str) -> StageOutput:
        folder = store.find(self.name, fingerprint)
        if folder is None:
            raise ThroughlineError(f"{self.name}: its output vanished from {store.config.url} meanwhile; run it again")
        return StageOutput.load(folder / MANIFEST_NAME)

    def _manifest(self, stage_run: StageRun[ConfigT], result: StageResult, fingerprint: str, clock: Clock) -> Manifest:
        units = stage_run.finished_units()
        files = [entry for unit in units for entry in unit.files]
        conservation = result.conservation or _conservation(units)
        if conservation is not None and not conservation.holds:
            raise ThroughlineError(f"{stage_run.label}: rows are not conserved: {conservation.model_dump()}")
        dropped = stage_run.write_dropped()
        if dropped is not None:
            files.append(dropped)
        return Manifest(
            stage=self.name,
            partition=stage_run.partition,
            code_version=self.code_version,
            fingerprint=fingerprint,
            config=identity_of(stage_run.config),
            models=tuple(_models_of(stage_run.config)),
            inputs={name: tuple(item.ref for item in items) for name, items in sorted(stage_run.inputs.items())},
            sources=tuple(result.sources),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            conservation=conservation,
            seeds=dict(result.seeds),
            summary=dict(result.summary),
            execution=stage_run.config.model_dump(mode="json"),
            measurements=dict(result.measurements),
            environment=clock.environment(),
        ).sealed()

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run as ``python -m <module> --config resolved.json [--config ...]``.

        Several configurations run one after the other in this process, so that a model is loaded once. Prints the path
        of each manifest on standard output; a failure is one sentence on standard error and exit status 1.
        """
        parser = argparse.ArgumentParser(description=f"Run stage {self.name}.")
        parser.add_argument("--config", type=Path, action="append", required=True, help="resolved request (JSON)")
        for request_path in parser.parse_args(argv).config:
            try:
                request = StageRequest.read(request_path)
                if request.store is not None:
                    bind(Path(request.output_root), request.store)
                print(self.run_request(request).manifest_path, flush=True)
            except ThroughlineError as error:
                sys.exit(f"error: {error}")
            except ModuleNotFoundError as error:
                sys.exit(
                    f"error: {self.name}: the package {error.name} is not installed; run `make setup`, or install the "
                    "extra 'cpu' or 'gpu' of this project"
                )
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                sys.exit(
                    f"error: {self.name}: the disk is full ({error.filename or request_path}); free space or choose "
                    "another output root, then run again: it goes on at the first unfinished shard"
                )

    def run_request(self, request: "StageRequest") -> StageOutput:
        """Run what a resolved request asks for."""
        if request.stage != self.name:
            raise ThroughlineError(f"request is for stage {request.stage!r}, this is {self.name!r}")
        try:
            config = self.config_type.model_validate(request.config)
        except ValidationError as error:
            raise ThroughlineError(f"configuration of {self.name}: {_sentence(error)}") from error
        inputs = {name: [StageOutput.load(Path(path)) for path in paths] for name, paths in request.inputs.items()}
        root = Path(request.output_root)
        return self.run(config, inputs, root, request.partition, request.verify, request.lock_wait_seconds)


class StageRequest(FrozenConfig):
    """A resolved request to run a stage: everything a fresh process needs, as JSON."""

    stage: str
    partition: str | None = None
    config: dict[str, Any]
    inputs: dict[str, list[str]] = Field(default_factory=dict)
    """Input name -> paths of manifests, or of single files that lie beside one."""
    output_root: str
    store: StoreConfig | None = None
    """The object store that the output root is mirrored in, for a machine that has not heard of it yet."""
    verify: Verify = "size"
    lock_wait_seconds: float | None = Field(None, ge=0)
    """Longest wait for another process at the same output; None waits as long as that one takes."""

    @classmethod
    def read(cls, path: Path) -> "StageRequest":
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError as error:
            raise ThroughlineError(f"{path}: no such request file") from error
        except ValidationError as error:
            raise ThroughlineError(f"{path}: not a stage request: {_sentence(error)}") from error


def _sentence(error: ValidationError) -> str:
    """Say in one line what is wrong with which field."""
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg']}" for item in error.errors())


def _conservation(units: Sequence[FinishedUnit]) -> Conservation | None:
    counted = [unit for unit in units if unit.rows is not None]
    if not counted:
        return None
    reasons = sum((Counter(unit.dropped) for unit in counted), Counter[str]())
    return Conservation(
        rows_in=sum(unit.rows[0] for unit in counted if unit.rows),
        rows_out=sum(unit.rows[1] for unit in counted if unit.rows),
        dropped=dict(sorted(reasons.items())),
    )


def _models_of(config: FrozenConfig) -> Iterator[ModelRecord]:
    for role in type(config).model_fields:
        value = getattr(config, role)
        if isinstance(value, ModelRef):
            yield ModelRecord(role=role, id=value.id, revision=value.revision)
        elif isinstance(value, FrozenConfig):
            yield from _models_of(value)


def write_request(path: Path, request: StageRequest) -> None:
    """Write a request where a stage's process can read it."""
    write_json(path, request.model_dump(mode="json"))
