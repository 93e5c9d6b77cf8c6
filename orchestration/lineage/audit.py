"""The audit: follows manifests from a result back to the rows and recomputes every digest on the way.

It trusts only file names: each manifest's own digest, each file's SHA-256, the fingerprint and the row counts are
recomputed, and every input must exist under its data version.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.console import CROSS, TICK
from pipelines.core.digest import digest_json
from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import MANIFEST_NAME, InputRef, Manifest
from pipelines.runner.checks import conservation_problems
from pipelines.runner.outputs import StageOutput, find_input
from pipelines.storage.mirror import location_of, store_of, sync_manifests

_MIN_PREFIX = 4


@dataclass
class AuditNode:
    """The audit of one output."""

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
    """A finished audit: its roots, and every output by stage and data version."""

    roots: list[AuditNode]
    nodes: dict[tuple[str, str], AuditNode]

    @property
    def passed(self) -> bool:
        return not any(node.problems for node in self.nodes.values())

    def lines(self) -> Iterator[str]:
        """Yield the tree as text; an output that was already shown is not expanded again."""
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


def _tree(node: AuditNode, indent: str, branch: str, shown: set[tuple[str, str]]) -> Iterator[str]:
    mark = CROSS if node.problems else TICK
    key = (node.stage, node.data_version)
    is_repeated = key in shown
    size = f"{node.num_files} files, {_size(node.num_bytes)}"
    tail = "(shown above)" if is_repeated else f"{size}{f', {node.rows}' if node.rows else ''}"
    yield f"{indent}{branch}{mark} {node.label}  {node.data_version[:12]}  {tail}"
    inner = indent + ({"├─ ": "│  ", "└─ ": "   "}.get(branch, ""))
    if is_repeated:
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
    """Audits outputs under one root; reads each output once, even if several results lead to it."""

    def __init__(self, output_root: Path) -> None:
        self._root = output_root
        self._nodes: dict[tuple[str, str], AuditNode] = {}
        self._outputs: list[StageOutput] = []
        self._files: deque[tuple[AuditNode, str, InputRef]] = deque()
        """Inputs that are one file of an output, with the reader and the input's name."""

    def audit(self, refs: Sequence[InputRef]) -> Audit:
        """Return the audit of some outputs and everything they were made from.

        Raises ThroughlineError if one of `refs` is a file that no output holds.
        """
        roots = [self._visit(ref if ref.file is None else find_input(self._root, ref).ref) for ref in refs]
        while self._files:
            self._visit_file(*self._files.popleft())
        return Audit(roots, self._nodes)

    def _visit_file(self, reader: AuditNode, name: str, ref: InputRef) -> None:
        """Visit an output that holds the file, preferably one that the audit has already visited."""
        try:
            output = find_input(self._root, ref, self._outputs)
        except ThroughlineError as error:
            reader.problems.append(str(error))
            return
        reader.inputs[name].append(self._visit(output.ref))

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
            f"the manifest is for {manifest.stage} {manifest.partition or ''}, expected {ref.stage} "
            f"{ref.partition or ''}".strip()
        )
    if manifest.data_version != ref.data_version:
        problems.append(f"the manifest has data version {manifest.data_version}, expected {ref.data_version}")
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
        problems.append(f"the fingerprint is {fingerprint}, the manifest states {manifest.fingerprint}")
    return problems


def _row_problems(output: StageOutput) -> list[str]:
    try:
        return conservation_problems(output)
    except (OSError, ValueError, KeyError) as error:
        return [f"the dropped rows can't be read: {error}"]


def find_output(output_root: Path, prefix: str) -> list[InputRef]:
    """Return the outputs whose data version starts with `prefix`.

    Raises ThroughlineError if there is none, or more than one data version.
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
        raise ThroughlineError(f"{prefix}: {len(refs)} data versions start with it; give more digits")
    return refs


def _ref_of(manifest_path: Path) -> InputRef:
    """Return a reference from the folder's path, so that an altered manifest is audited, not trusted."""
    try:
        partition = StageOutput.load(manifest_path).manifest.partition
    except ThroughlineError:
        partition = None
    folder = manifest_path.parent
    return InputRef(stage=folder.parent.name, partition=partition, data_version=folder.name)
