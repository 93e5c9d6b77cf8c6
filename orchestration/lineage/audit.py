"""The audit: walks manifests from a result back to the rows, and recomputes every digest on the way.

It trusts nothing but file names: each manifest's own digest, each file's SHA-256, the fingerprint, and the row counts
are computed anew, and every input must be where its data version says.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestration.console import CROSS, TICK
from orchestration.defs.asset_checks import conservation_problems
from orchestration.graph.graph import FILE_TAG, STAGE_TAG
from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, InputRef, Manifest
from pipelines.runner.outputs import StageOutput, find_input
from pipelines.storage.mirror import location_of, store_of, sync_manifests

if TYPE_CHECKING:
    from dagster import AssetMaterialization

_MIN_PREFIX = 4


@dataclass
class AuditNode:
    """One output as the audit found it."""

    stage: str
    partition: str | None
    data_version: str
    problems: list[str] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0
    rows: str = ""
    inputs: dict[str, list["AuditNode"]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.stage} {self.partition}" if self.partition else self.stage


@dataclass
class Audit:
    """A finished audit: its roots, and every output by data version."""

    roots: list[AuditNode]
    nodes: dict[tuple[str, str], AuditNode]

    @property
    def passed(self) -> bool:
        return not any(node.problems for node in self.nodes.values())

    def lines(self) -> Iterator[str]:
        """Yield the tree as text; an output that was shown before is named, not repeated."""
        shown: set[tuple[str, str]] = set()
        for root in self.roots:
            yield from _tree(root, "", "", shown)

    def as_json(self) -> dict[str, Any]:
        """Return the audit as a JSON value."""
        return {
            "passed": self.passed,
            "roots": [root.data_version for root in self.roots],
            "outputs": [
                {
                    "stage": node.stage,
                    "partition": node.partition,
                    "data_version": node.data_version,
                    "passed": not node.problems,
                    "problems": node.problems,
                    "num_files": node.num_files,
                    "num_bytes": node.num_bytes,
                    "inputs": {name: [item.data_version for item in items] for name, items in node.inputs.items()},
                }
                for node in self.nodes.values()
            ],
        }


def _tree(node: AuditNode, lead: str, branch: str, shown: set[tuple[str, str]]) -> Iterator[str]:
    mark = CROSS if node.problems else TICK
    key = (node.stage, node.data_version)
    again = key in shown
    size = f"{node.num_files} files, {_size(node.num_bytes)}"
    tail = "(shown above)" if again else f"{size}{f', {node.rows}' if node.rows else ''}"
    yield f"{lead}{branch}{mark} {node.label}  {node.data_version[:12]}  {tail}"
    inner = lead + ({"├─ ": "│  ", "└─ ": "   "}.get(branch, ""))
    if again:
        return
    shown.add(key)
    for problem in node.problems:
        yield f"{inner}   {problem}"
    children = [item for items in node.inputs.values() for item in items]
    for number, child in enumerate(children):
        yield from _tree(child, inner, "└─ " if number == len(children) - 1 else "├─ ", shown)


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


class Auditor:
    """Audits outputs under one root; each output is read once, however many results lead to it."""

    def __init__(self, output_root: Path) -> None:
        self._root = output_root
        self._nodes: dict[tuple[str, str], AuditNode] = {}
        self._outputs: list[StageOutput] = []
        self._files: deque[tuple[AuditNode, str, InputRef]] = deque()
        """Inputs that are one file of an output, with who reads them under which name."""

    def audit(self, refs: Sequence[InputRef]) -> Audit:
        """Return the audit of some outputs and of everything they were made from.

        Raises ThroughlineError where one of `refs` is a file that no output holds.
        """
        roots = [self._visit(ref if ref.file is None else find_input(self._root, ref).ref) for ref in refs]
        while self._files:
            self._visit_holder(*self._files.popleft())
        return Audit(roots, self._nodes)

    def _visit_holder(self, reader: AuditNode, name: str, ref: InputRef) -> None:
        """Visit the output that holds the very file that was read: one that the audit came across, if it can be."""
        try:
            holder = find_input(self._root, ref, self._outputs)
        except ThroughlineError as error:
            reader.problems.append(str(error))
            return
        reader.inputs[name].append(self._visit(holder.ref))

    def _visit(self, ref: InputRef) -> AuditNode:
        key = (ref.stage, ref.data_version)
        if key in self._nodes:
            return self._nodes[key]
        node = self._nodes[key] = AuditNode(ref.stage, ref.partition, ref.data_version)
        folder = self._root / ref.stage / ref.data_version
        try:
            output = StageOutput.load(folder / MANIFEST_NAME)
        except ThroughlineError as error:
            node.problems.append(str(error))
            return node
        manifest = output.manifest
        node.num_files = len(manifest.files)
        node.num_bytes = sum(entry.num_bytes for entry in manifest.files)
        node.problems += _identity_problems(manifest, ref)
        if not node.problems:
            self._outputs.append(output)
        damaged = output.damaged(read_bytes=True)
        if output.store is not None:
            damaged += output.store.damaged(manifest)
        node.problems += damaged
        if manifest.conservation is not None:
            node.rows = f"{manifest.conservation.rows_in:,} rows in, {manifest.conservation.rows_out:,} out"
            node.problems += _row_problems(output) if not damaged else []
        for name, items in manifest.inputs.items():
            node.inputs[name] = [self._visit(item) for item in items if item.file is None]
            self._files.extend((node, name, item) for item in items if item.file is not None)
        return node


def _identity_problems(manifest: Manifest, ref: InputRef) -> list[str]:
    problems = []
    if (manifest.stage, manifest.partition) != (ref.stage, ref.partition):
        problems.append(
            f"the manifest is of {manifest.stage} {manifest.partition or ''}, expected {ref.stage} "
            f"{ref.partition or ''}".strip()
        )
    if manifest.data_version != ref.data_version:
        problems.append(f"the manifest is of data version {manifest.data_version}, expected {ref.data_version}")
    fingerprint = digest_json(
        {
            "stage": manifest.stage,
            "code_version": manifest.code_version,
            "partition": manifest.partition,
            "config": manifest.config,
            "inputs": {name: [item.data_version for item in items] for name, items in sorted(manifest.inputs.items())},
        }
    )
    if fingerprint != manifest.fingerprint:
        problems.append(f"its fingerprint is {fingerprint}, the manifest says {manifest.fingerprint}")
    return problems


def _row_problems(output: StageOutput) -> list[str]:
    try:
        return conservation_problems(output)
    except (OSError, ValueError, KeyError) as error:
        return [f"its dropped rows can't be read: {error}"]


def find_output(output_root: Path, prefix: str) -> list[InputRef]:
    """Return the outputs whose data version starts with `prefix`.

    Raises ThroughlineError where it is none, or more than one.
    """
    if len(prefix) < _MIN_PREFIX:
        raise ThroughlineError(f"{prefix!r}: give at least {_MIN_PREFIX} digits of a data version")
    store = store_of(output_root)
    for stage in store.stages() if store is not None else ():
        sync_manifests(output_root, stage, prefix)
    found = sorted(output_root.glob(f"*/{prefix}*/{MANIFEST_NAME}"))
    if not found:
        raise ThroughlineError(
            f"no output under {location_of(output_root)} has a data version that starts with {prefix}"
        )
    refs = [_ref_of(path) for path in found]
    if len({ref.data_version for ref in refs}) > 1:
        raise ThroughlineError(f"{prefix}: {len(refs)} outputs start with it; give more digits")
    return refs


def _ref_of(manifest_path: Path) -> InputRef:
    """Name an output by its place, so that an altered manifest is audited and not trusted."""
    try:
        partition = StageOutput.load(manifest_path).manifest.partition
    except ThroughlineError:
        partition = None
    folder = manifest_path.parent
    return InputRef(stage=folder.parent.name, partition=partition, data_version=folder.name)


def _ref_of_event(event: "AssetMaterialization") -> InputRef:
    tags = event.tags or {}
    version, file = tags.get("dagster/data_version", ""), tags.get(FILE_TAG)
    stage = event.asset_key.to_user_string()
    if file is not None:
        return InputRef(stage=tags[STAGE_TAG], partition=None, data_version=version, file=file)
    return InputRef(stage=stage, partition=event.partition, data_version=version)


def refs_of_run(home: Path, run_id: str) -> list[InputRef]:
    """Return the outputs that a Dagster run materialized, by the start of its id."""
    from dagster import DagsterEventType

    from orchestration.defs.instance import open_instance

    with open_instance(home) as instance:
        runs = [run for run in instance.get_runs() if run.run_id.startswith(run_id)]
        if len(runs) != 1:
            raise ThroughlineError(
                f"{run_id}: neither a data version nor the start of one run's id ({len(runs)} match)"
            )
        entries = instance.all_logs(runs[0].run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION)
        events = [entry.asset_materialization for entry in entries]
        refs = [_ref_of_event(event) for event in events if event is not None]
    if not refs:
        raise ThroughlineError(f"run {runs[0].run_id} materialized nothing")
    return refs
