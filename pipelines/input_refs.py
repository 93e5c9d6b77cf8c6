"""Finds outputs: all of a stage, and the one that an input in a manifest names, be it the whole or one file of it."""

from collections.abc import Callable, Iterable, Iterator
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
    know_outputs(output_root, stage)
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
