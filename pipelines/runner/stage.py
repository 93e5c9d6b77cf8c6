"""The stage runner: fingerprints, reuse, resume after a kill, conservation, and the manifest, which is written last.

An output root looks like this::

    <root>/<stage>/<data_version>/            finished and immutable: files, dropped.parquet, manifest.json
    <root>/<stage>/fingerprints/<fingerprint> contains the data version that this fingerprint produced
    <root>/<stage>/unfinished/<fingerprint>/  a running or killed run: out/ (files), units/ (journal), scratch/
    <root>/<stage>/unfinished/<fingerprint>.lock  held by the process that works in that folder, and names it
    <root>/<stage>/logs/                      training curves by run; not part of any output, may be deleted

With a ``store.json`` in the root, finished outputs are mirrored in an object store, see `pipelines.storage.mirror`.

A stage's work is split into units (one shard, one file, one table). A unit's journal entry is written when all its
files are in place, so a run that was killed at any line resumes at the first unit without an entry.
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
from pipelines.runner.checks import AnyCheck
from pipelines.runner.cost import CostModel
from pipelines.runner.locks import hold
from pipelines.runner.outputs import Inputs, StageOutput, Verify
from pipelines.runner.preview import Preview
from pipelines.runner.publication import publish
from pipelines.runner.request import StageRequest, format_validation_error
from pipelines.runner.rows import RowLookup
from pipelines.runner.units import ConfigT, FinishedUnit, StageResult, StageRun
from pipelines.storage.mirror import OutputStore, bind, store_of

_UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[ConfigT]):
    """A step of the graph: a plain function, and everything that other tools need to know about its outputs.

    All fields are required, so that no stage forgets one: those that do not apply are stated as `NO_ROWS`, `()` or
    None. Functions import heavy libraries inside, so that the graph can load its stages without them.
    """

    name: str
    code_version: str
    """Raised by hand whenever the same inputs would give other bytes."""
    config_type: type[ConfigT]
    produce: Callable[[StageRun[ConfigT]], StageResult | None]
    description: str
    """One sentence about the output, shown in Dagster."""
    rows: RowLookup
    """How a trace finds sample keys in an output."""
    checks: tuple[AnyCheck, ...]
    """Checks of an output, besides conservation and digest."""
    preview: Preview | None
    """Markdown that Dagster shows with an output."""
    funnel_label: str | None
    """Label of the stage's step in the report's funnel of rows; None if it is not a step."""
    cost: CostModel | None
    """Estimates rows, bytes and time before anything runs; None if they are negligible."""

    def fingerprint(self, config: ConfigT, inputs: Inputs, partition: str | None = None) -> str:
        """Return the digest of everything the output is computed from."""
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

        If the root is mirrored in an object store, the output must be finished there; with `verify` "digest" every byte
        in the store is read. Raises StorageError if the store is not accessible.
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

        A second process that requests the same output waits for the first, up to `lock_wait_seconds` if given, and then
        reuses its result, or resumes it if the first was killed. Raises ThroughlineError for errors that the user can
        fix; after any exception, finished units are kept for the next attempt.
        """
        fingerprint = self.fingerprint(config, inputs, partition)
        stage_root = output_root / self.name
        work_folder = stage_root / _UNFINISHED / fingerprint
        label = f"{self.name} {partition}" if partition else self.name
        with hold(stage_root / _UNFINISHED / f"{fingerprint}.lock", label, lock_wait_seconds) as lock:
            finished = self.find_finished(config, inputs, output_root, partition, verify)
            if finished is not None:
                shutil.rmtree(work_folder, ignore_errors=True)  # left by a kill between rename and clean-up
                return finished
            store = store_of(output_root)
            if store is not None:
                local = self._find_in_folder(fingerprint, output_root, "digest")
                if local is not None:  # a run finished it but could not upload it, or the store's copy is damaged
                    shutil.rmtree(work_folder, ignore_errors=True)
                    if store.publish(local.folder, local.manifest, read_bytes=verify == "digest"):
                        return local
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
            raise ThroughlineError(
                f"{self.name}: its output disappeared from {store.config.url} during the run; run it again"
            )
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
        """Run requests in turn in this process, so that a model is loaded once.

        Prints the path of each manifest on standard output; on failure prints one sentence on standard error and exits
        with status 1.
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
                    "another output root, then run again: it resumes at the first unfinished shard"
                )

    def run_request(self, request: StageRequest) -> StageOutput:
        """Run a resolved request."""
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
