"""Finds everything that an output was made from, by following its manifests through the output root."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import InputRef
from pipelines.runner.outputs import StageOutput, find_input
from pipelines.runner.registry import is_installed, load_stage
from pipelines.runner.stage import Stage

Lineage = Mapping[str, Sequence[StageOutput]]
"""Stage -> outputs."""


def collect(outputs: Iterable[StageOutput], order: Sequence[str] = ()) -> dict[str, list[StageOutput]]:
    """Return the given outputs and all that they were made from: stage -> outputs, upstream first.

    Stages in `order` come first, in that order. If an input was one file of an output, takes an output that is in the
    lineage anyway, if it holds the file. Raises ThroughlineError if an input is missing or altered.
    """
    found: dict[tuple[str, str], StageOutput] = {}
    pending = deque(outputs)
    files: deque[tuple[StageOutput, InputRef]] = deque()
    while pending or files:
        if not pending:
            reader, ref = files.popleft()
            pending.append(_load(reader, ref, found.values()))
        output = pending.popleft()
        key = (output.manifest.stage, output.data_version)
        if key in found:
            continue
        found[key] = output
        for refs in output.manifest.inputs.values():
            files.extend((output, ref) for ref in refs if ref.file is not None)
            others = [ref for ref in refs if ref.file is None and (ref.stage, ref.data_version) not in found]
            pending.extend(_load(output, ref) for ref in others)
    by_stage: dict[str, list[StageOutput]] = {}
    for output in sorted(found.values(), key=lambda output: (output.manifest.partition or "", output.data_version)):
        by_stage.setdefault(output.manifest.stage, []).append(output)
    return {stage: by_stage[stage] for stage in _sorted_stages(by_stage, order)}


def _sorted_stages(by_stage: Lineage, order: Sequence[str]) -> list[str]:
    """Return the stages in `order`, then the others, upstream first."""
    upstream = {
        stage: {ref.stage for item in items for refs in item.manifest.inputs.values() for ref in refs} - {stage}
        for stage, items in by_stage.items()
    }

    def depth(stage: str) -> int:
        return max((depth(other) + 1 for other in upstream.get(stage, ())), default=0)

    listed = [stage for stage in order if stage in by_stage]
    return listed + sorted(by_stage.keys() - set(listed), key=lambda stage: (depth(stage), stage))


def stages_of(lineage: Lineage, modules: Sequence[str] = ()) -> dict[str, Stage[Any]]:
    """Return the stages of a lineage by name: those that `modules` define, else installed ones, if any."""
    stages = {stage.name: stage for stage in map(load_stage, modules)}
    installed = {name: load_stage(name) for name in lineage if name not in stages and is_installed(name)}
    return {**stages, **installed}


def _load(output: StageOutput, ref: InputRef, known: Iterable[StageOutput] = ()) -> StageOutput:
    try:
        return find_input(output.folder.parent.parent, ref, known)
    except ThroughlineError as error:
        label = f"{output.manifest.stage} {output.manifest.partition or ''}".rstrip()
        raise ThroughlineError(
            f"{label} was made from {ref.stage} {ref.data_version}, which is lost: {error}"
        ) from error
