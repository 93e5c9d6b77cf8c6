"""The stage runner: fingerprint, reuse, resume after a kill, conservation, and the manifest that is written last.

An output root looks like this::

    <root>/<stage>/<data_version>/            finished and immutable: files, dropped.parquet, manifest.json
    <root>/<stage>/fingerprints/<fingerprint> names the data version that this fingerprint gave
    <root>/<stage>/unfinished/<fingerprint>/  a run under way or killed: out/ (files), units/ (journal), scratch/
    <root>/<stage>/unfinished/<fingerprint>.lock  held by the process that works in that folder; names it
    <root>/<stage>/logs/                      curves for people, by run; no part of any output, deleted at will

With a ``store.json`` in the root all that is finished also lies in an object store, see `pipelines.storage.mirror`.

A stage's work is split into units (one shard, one file, one table). A unit's journal entry is written when all its
files are in place, so a run that was killed at any line goes on at the first unit without an entry.
"""

import errno
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from pydantic import ValidationError

from pipelines.core.config import FrozenConfig, ModelRef, identity_of
from pipelines.core.digest import digest_json
from pipelines.core.environment import Clock
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import (
    MANIFEST_NAME,
    Conservation,
    Manifest,
    ModelRecord,
    damaged_files,
    read_manifest,
)
from pipelines.runner.locks import hold
from pipelines.runner.outputs import Inputs, StageOutput, Verify
from pipelines.runner.publication import publish
from pipelines.runner.request import StageRequest, format_validation_error
from pipelines.runner.units import ConfigT, FinishedUnit, StageResult, StageRun
from pipelines.storage.mirror import OutputStore, bind, store_of

_UNFINISHED = "unfinished"


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
            store.delete_damaged_copies(output.folder, output.manifest)
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

    def run_requests(self, paths: Sequence[Path]) -> None:
        """Run requests, one after the other in this process, so that a model is loaded once.

        Prints the path of each manifest on standard output; a failure is one sentence on standard error and exit
        status 1.
        """
        for request_path in paths:
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

    def run_request(self, request: StageRequest) -> StageOutput:
        """Run what a resolved request asks for."""
        if request.stage != self.name:
            raise ThroughlineError(f"request is for stage {request.stage!r}, this is {self.name!r}")
        try:
            config = self.config_type.model_validate(request.config)
        except ValidationError as error:
            raise ThroughlineError(f"configuration of {self.name}: {format_validation_error(error)}") from error
        inputs = {name: [StageOutput.load(Path(path)) for path in paths] for name, paths in request.inputs.items()}
        root = Path(request.output_root)
        return self.run(config, inputs, root, request.partition, request.verify, request.lock_wait_seconds)


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
