"""Finds everything that an output was made from, by following its manifests through the output root."""

from collections import deque
from collections.abc import Iterable
from typing import Any

from pipelines.core.errors import ThroughlineError
from pipelines.core.manifest import InputRef
from pipelines.runner.outputs import StageOutput, find_input

STAGE_ORDER = (
    "laion_index", "laion_subset", "laion_selection", "images", "captions", "shards", "latents", "text_features",
    "dataset", "checkpoint", "prompt_sets", "samples", "scores", "judge_calibration", "fusion_analysis",
    "trajectory_analysis", "results",
)  # fmt: skip


def collect(outputs: Iterable[StageOutput]) -> dict[str, list[StageOutput]]:
    """Return the given outputs and all that they were made from: stage -> outputs, in the order of the graph.

    Where one file of an output was an input, the output that is among the others anyway is taken for it. Raises
    ThroughlineError where an input is missing or altered.
    """
    found: dict[tuple[str, str], StageOutput] = {}
    waiting = deque(outputs)
    files: deque[tuple[StageOutput, InputRef]] = deque()
    while waiting or files:
        if not waiting:
            reader, ref = files.popleft()
            waiting.append(_load(reader, ref, found.values()))
        output = waiting.popleft()
        key = (output.manifest.stage, output.data_version)
        if key in found:
            continue
        found[key] = output
        for refs in output.manifest.inputs.values():
            files.extend((output, ref) for ref in refs if ref.file is not None)
            wholes = [ref for ref in refs if ref.file is None and (ref.stage, ref.data_version) not in found]
            waiting.extend(_load(output, ref) for ref in wholes)
    by_stage: dict[str, list[StageOutput]] = {}
    for output in sorted(found.values(), key=_place):
        by_stage.setdefault(output.manifest.stage, []).append(output)
    return by_stage


def _place(output: StageOutput) -> tuple[Any, ...]:
    stage = output.manifest.stage
    number = STAGE_ORDER.index(stage) if stage in STAGE_ORDER else len(STAGE_ORDER)
    return (number, stage, output.manifest.partition or "", output.data_version)


def _load(output: StageOutput, ref: InputRef, known: Iterable[StageOutput] = ()) -> StageOutput:
    try:
        return find_input(output.folder.parent.parent, ref, known)
    except ThroughlineError as error:
        label = f"{output.manifest.stage} {output.manifest.partition or ''}".rstrip()
        raise ThroughlineError(
            f"{label} was made from {ref.stage} {ref.data_version}, which is lost: {error}"
        ) from error
