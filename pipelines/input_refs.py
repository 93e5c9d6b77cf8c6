"""Finds the output that an input in a manifest names, be it the whole output or one file of it."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.errors import ThroughlineError
from pipelines.manifest import MANIFEST_NAME, InputRef
from pipelines.stage import StageOutput
from pipelines.storage import know_outputs


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
    holders = [output for output in _outputs(output_root / ref.stage) if _holds(output, ref)]
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


def _outputs(stage_root: Path) -> Iterator[StageOutput]:
    """Yield the outputs of a stage whose manifests are sound; the others hold nothing that can be relied on."""
    know_outputs(stage_root.parent, stage_root.name)
    for path in stage_root.glob(f"*/{MANIFEST_NAME}"):
        try:
            output = StageOutput.load(path)
        except ThroughlineError:
            continue
        if output.data_version == path.parent.name:
            yield output


def _age(output: StageOutput) -> tuple[str, int, str]:
    """Sort by when an output was made; its file tells apart those of one second."""
    environment = output.manifest.environment
    ended_at = environment.ended_at if environment else ""
    return ended_at, output.manifest_path.stat().st_mtime_ns, output.data_version
